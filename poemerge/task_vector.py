"""The task vectors of all experts for a batch of tensors of one shape.

Both kinds of stack, dense and in factors, offer the same views, so that a method is written once:

    dense()           the updates themselves, (B, E, O, I)
    updates()         one update after the other, in factors where the stack is in factors
    inner()           inner products <A_i, A_j>, (B, E, E)
    combine(w)        Σ w_i A_i, in factors where the stack is in factors
    reduced(o, i)     smaller matrices with the same inner products, and the way back (subspace.py)
    express(m)        an update that comes in factors: so, or multiplied out, as the stack is
    mT, part(b)       the stack of the transposes, of one tensor
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poemerge import linalg
from poemerge.subspace import joint_basis
from poemerge.update import Dense, Lift, LowRank, Update


@dataclass(frozen=True)
class DenseStack:
    """Dense task vectors of E experts for B tensors of one shape (vectors and more axes too)."""

    deltas: Tensor  # (B, E, *shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one update."""
        return tuple(self.deltas.shape[2:])

    @property
    def mT(self) -> "DenseStack":  # noqa: N802 - as torch spells it
        """The stack of the transposes."""
        return DenseStack(self.deltas.mT)

    def to(self, device: torch.device) -> "DenseStack":
        """The same elsewhere."""
        return DenseStack(self.deltas.to(device))

    def double(self) -> "DenseStack":
        """The same in fp64."""
        return DenseStack(self.deltas.double())

    def part(self, index: int) -> "DenseStack":
        """The stack of one tensor of the batch."""
        return DenseStack(self.deltas[index : index + 1])

    def dense(self) -> Tensor:
        """The updates, (B, E, *shape)."""
        return self.deltas

    def updates(self) -> list[Update]:
        """E updates (B, *shape)."""
        return [Dense(delta) for delta in self.deltas.unbind(dim=1)]

    def inner(self) -> Tensor:
        """Inner products <A_i, A_j> (B, E, E), in fp64."""
        flat = self.deltas.reshape(*self.deltas.shape[:2], 1, -1)
        return torch.stack([linalg.inner(flat, each) for each in flat.unbind(dim=1)], dim=-1)

    def express(self, factors: LowRank) -> Update:
        """The update multiplied out."""
        return Dense(factors.dense())

    def combine(self, weights: Tensor) -> Update:
        """Σ w_i A_i for weights (B, E)."""
        return Dense(torch.einsum("be...,be->b...", self.deltas, weights.to(self.deltas)))

    def reduced(self, rows: bool, columns: bool) -> tuple[Tensor, Lift]:  # noqa: ARG002
        """The updates in their joint column space (B, E, K, I) where that is smaller, if `rows`.

        K = E · I < O: an orthonormal form of Woodbury's identity. Their rows are left alone: a
        basis of them costs more than it saves.
        """
        experts, tall, wide = self.deltas.shape[1:]
        if not rows or experts * wide >= tall:
            return self.deltas, Dense
        basis, parts = joint_basis(self.deltas.unbind(dim=1))
        return torch.stack(parts, dim=1), lambda inner: Dense(basis.to(inner) @ inner)


@dataclass(frozen=True)
class LowRankStack:
    """Task vectors in factors, of E experts for B matrices of one shape; ranks may differ."""

    ups: tuple[Tensor, ...]  # E × (B, O, R_i)
    downs: tuple[Tensor, ...]  # E × (B, R_i, I)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (O, I) of one update."""
        return self.ups[0].shape[-2], self.downs[0].shape[-1]

    @property
    def mT(self) -> "LowRankStack":  # noqa: N802 - as torch spells it
        """The stack of the transposes."""
        turned = [tuple(factor.mT for factor in side) for side in (self.downs, self.ups)]
        return LowRankStack(*turned)

    def to(self, device: torch.device) -> "LowRankStack":
        """The same elsewhere."""
        moved = [tuple(factor.to(device) for factor in side) for side in (self.ups, self.downs)]
        return LowRankStack(*moved)

    def double(self) -> "LowRankStack":
        """The same in fp64."""
        return LowRankStack(*(tuple(f.double() for f in side) for side in (self.ups, self.downs)))

    def part(self, index: int) -> "LowRankStack":
        """The stack of one tensor of the batch."""
        own = slice(index, index + 1)
        return LowRankStack(tuple(up[own] for up in self.ups), tuple(d[own] for d in self.downs))

    def dense(self) -> Tensor:
        """The updates multiplied out, (B, E, O, I), in fp32 or better."""
        return torch.stack([u @ d for u, d in zip(self.ups, self.downs, strict=True)], dim=1)

    def updates(self) -> list[LowRank]:
        """E updates in their factors."""
        return [LowRank(up, down) for up, down in zip(self.ups, self.downs, strict=True)]

    def inner(self) -> Tensor:
        """Inner products <A_i, A_j> (B, E, E) in fp64."""
        exact = self.double().updates()
        rows = [torch.stack([left.inner(right) for right in exact], dim=-1) for left in exact]
        return torch.stack(rows, dim=-2)

    def express(self, factors: LowRank) -> Update:
        """The update as it is."""
        return factors

    def combine(self, weights: Tensor) -> Update:
        """Σ w_i A_i for weights (B, E), exact in factors of rank Σ R_i."""
        say = weights.mT[:, :, None, None]  # (E, B, 1, 1)
        ups = [up * share.to(up) for up, share in zip(self.ups, say, strict=True)]
        return LowRank(torch.cat(ups, dim=-1), torch.cat(self.downs, dim=-2))

    def reduced(self, rows: bool, columns: bool) -> tuple[Tensor, Lift]:
        """The updates in their joint column space, row space or both, in fp64; exact.

        Args:
            rows: exchange O for K ≤ Σ R_i.
            columns: exchange I for K' ≤ Σ R_i.

        Returns:
            Ã (B, E, K or O, K' or I), and the way back, in factors if any axis was exchanged.
        """
        left, right, ups, downs = self._joint(rows, columns)
        small = torch.stack([up @ down.mT for up, down in zip(ups, downs, strict=True)], dim=1)
        return small, lambda inner: _lift(inner, left, right)

    @property
    def is_single(self) -> bool:
        """True for a batch of one matrix."""
        return self.ups[0].shape[0] == 1

    def reduced_bytes(self, rows: bool, columns: bool) -> int:
        """Size of what `reduced` returns."""
        rank = sum(down.shape[-2] for down in self.downs)
        tall, wide = (
            min(size, rank) if is_reduced else size
            for size, is_reduced in zip(self.shape, (rows, columns), strict=True)
        )
        return 8 * len(self.ups) * tall * wide * self.ups[0].shape[0]

    def streamed(self, rows: bool, columns: bool) -> "tuple[StreamedStack, Lift]":
        """`reduced`, of one matrix whose experts are too many to hold multiplied out."""
        assert self.is_single
        left, right, ups, downs = self._joint(rows, columns)
        shape = (ups[0].shape[-2], downs[0].shape[-2])

        def read(index: int) -> Tensor:
            return ups[index][0] @ downs[index][0].mT

        stream = StreamedStack(read, len(ups), shape, torch.float64)
        return stream, lambda inner: _lift(inner, left, right)

    def _joint(
        self, rows: bool, columns: bool
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor], Sequence[Tensor]]:
        """Bases (B, O, K) and (B, I, K'), where asked for, and the factors in them, in fp64."""
        ups: Sequence[Tensor] = [up.double() for up in self.ups]
        downs: Sequence[Tensor] = [down.double().mT for down in self.downs]
        left = right = None
        if rows:
            left, ups = joint_basis(ups)
        if columns:
            right, downs = joint_basis(downs)
        return left, right, ups, downs


def _lift(inner: Tensor, left: Tensor | None, right: Tensor | None) -> Update:
    """U X Vᵀ in factors, the smaller side taking X; a missing basis is the identity."""
    if left is None and right is None:
        return Dense(inner)
    if right is None or (left is not None and inner.shape[-2] <= inner.shape[-1]):
        assert left is not None
        return LowRank(left, inner if right is None else inner @ right.mT)
    return LowRank(inner if left is None else left @ inner, right.mT)


@dataclass(frozen=True)
class StreamedStack:
    """Task vectors of E experts for one matrix, too many to hold: read anew whenever needed.

    Args:
        read: index of an expert → its update (O, I), on the device.
        count: E.
        shape: (O, I).
        dtype: in which they are given.
    """

    read: Callable[[int], Tensor]
    count: int
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32

    @property
    def mT(self) -> "StreamedStack":  # noqa: N802 - as torch spells it
        """The stack of the transposes."""
        rows, columns = self.shape
        return replace(self, read=lambda index: self.read(index).mT, shape=(columns, rows))

    def double(self) -> "StreamedStack":
        """The same in fp64."""
        return replace(self, dtype=torch.float64)

    def to(self, device: torch.device) -> "StreamedStack":
        """The same elsewhere."""
        return replace(self, read=lambda index: self.read(index).to(device))

    def part(self, index: int) -> "StreamedStack":
        """The stack of the one matrix that there is."""
        assert index == 0
        return self

    def each(self) -> Iterator[Tensor]:
        """E updates (O, I), one after the other."""
        return (self.read(index).to(self.dtype) for index in range(self.count))

    def reduced(self, rows: bool, columns: bool) -> "tuple[StreamedStack, Lift]":  # noqa: ARG002
        """The updates as they are: a joint basis would have to hold them all."""
        return self, Dense


Stack = DenseStack | LowRankStack
