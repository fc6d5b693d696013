"""The laws of docs/family.md, each for the dense and the low-rank twin."""

import pytest
import torch
from torch import Tensor

from poemerge.update import LowRank
from tests import reference
from tests.core.stacks import (
    LIMIT,
    SMALL,
    Pair,
    assert_close,
    dense,
    distance,
    factors,
    merge,
    pair,
    update,
)
from tests.core.stacks import product as products

SETTLED = {"max_steps": 200, "rtol": 1e-10}
TAILS = {
    "gaussian": ("gaussian_poe", {}),
    "cauchy": ("cauchy_poe", {**SETTLED, "scale": "equivariant"}),
    "cauchy-paper": ("cauchy_poe", {**SETTLED, "scale": "paper"}),
}
SHAPES = {
    "tall": (12, (3, 2, 4), 7),  # Σ ranks > I
    "wide": (7, (3, 2, 4), 12),  # Σ ranks > O
    "small ranks": (20, (2, 3, 2), 16),  # Σ ranks < both
    "full rank": (6, (6, 6, 6), 6),
}
WEIGHTS = (1.0, 0.5, 2.0)


@pytest.fixture(params=SHAPES)
def experts(request: pytest.FixtureRequest) -> list[Pair]:
    rows, ranks, columns = SHAPES[request.param]
    return [pair(rows, rank, columns, seed) for seed, rank in enumerate(ranks)]


@pytest.fixture(params=["output", "input"])
def side(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=TAILS)
def tail(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return TAILS[request.param]


def orthogonal(size: int, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


Tail = tuple[str, dict[str, object]]


class Laws:
    """What every product of experts obeys, whatever its tail, side and kind of stack."""

    @staticmethod
    def twin(experts: list[Pair]) -> object:
        raise NotImplementedError

    def solve(
        self, experts: list[Pair], tail: Tail, weights: tuple[float, ...] = (), **settings: object
    ) -> Tensor:
        method, fixed = tail
        return update(merge(self.twin(experts), method, weights, **fixed | settings))

    def test_equals_the_reference(self, experts: list[Pair], tail: Tail, side: str) -> None:
        updates = [a if side == "output" else a.T for a in products(experts)]
        method, fixed = tail
        if method == "gaussian_poe":
            expected = reference.gaussian_poe(updates, WEIGHTS, 0.01)
        else:
            expected = reference.cauchy_poe(updates, WEIGHTS, 0.01, str(fixed["scale"]), 0.3)
            fixed = {**fixed, "epsilon": 0.3}
        actual = self.solve(experts, (method, fixed), WEIGHTS, side=side, ridge=0.01)
        assert_close(actual, expected if side == "output" else expected.T)

    def test_equals_its_twin(self, experts: list[Pair], tail: Tail, side: str) -> None:
        method, fixed = tail
        other = merge(dense(experts), method, WEIGHTS, **fixed, side=side)
        assert_close(self.solve(experts, tail, WEIGHTS, side=side), update(other))

    def test_order_of_experts(self, experts: list[Pair], tail: Tail, side: str) -> None:
        turned = self.solve(experts[::-1], tail, WEIGHTS[::-1], side=side)
        assert_close(turned, self.solve(experts, tail, WEIGHTS, side=side))

    def test_rotation_of_either_side(self, experts: list[Pair], tail: Tail, side: str) -> None:
        rows, columns = experts[0][0].shape[0], experts[0][1].shape[1]
        left, right = orthogonal(rows), orthogonal(columns)
        turned = self.solve([(left @ up, down @ right) for up, down in experts], tail, side=side)
        assert_close(turned, left @ self.solve(experts, tail, side=side) @ right)

    def test_orthogonal_spaces_give_the_sum(self, tail: Tail, side: str) -> None:
        """A_iᵀ A_j = 0 (column spaces) on the output side, A_i A_jᵀ = 0 (row spaces) on the input.

        Then every expert's residual along its own directions can be zero at once.
        """
        basis = orthogonal(9).split((2, 3, 4), dim=-1)
        experts = [(up, pair(9, up.shape[1], 11, seed)[1]) for seed, up in enumerate(basis)]
        if side == "input":
            experts = [(down.T, up.T) for up, down in experts]
        merged = self.solve(experts, tail, side=side, ridge=SMALL)
        assert_close(merged, sum(products(experts)), LIMIT)

    def test_identical_experts_give_themselves(self, tail: Tail, side: str) -> None:
        experts = [pair(10, 3, 8, seed=1)] * 3
        merged = self.solve(experts, tail, side=side, ridge=SMALL)
        assert_close(merged, products(experts)[0], LIMIT)

    def test_wide_cauchy_is_the_norm_weighted_gaussian(
        self, experts: list[Pair], side: str
    ) -> None:
        for scale in ("paper", "equivariant"):
            merged = self.solve(experts, ("cauchy_poe", {"scale": scale}), side=side, epsilon=1e10)
            sizes = reference.cauchy_scales(products(experts), scale, 1.0)
            weights = tuple(1 / size for size in sizes)
            gaussian = self.solve(experts, TAILS["gaussian"], weights, side=side)
            assert_close(merged, gaussian, LIMIT)

    def test_input_side_is_the_output_side_of_the_transposes(
        self, experts: list[Pair], tail: Tail
    ) -> None:
        flipped = [(down.T, up.T) for up, down in experts]
        merged = self.solve(experts, tail, WEIGHTS, side="input")
        assert_close(merged.T, self.solve(flipped, tail, WEIGHTS, side="output"))

    @pytest.mark.parametrize("factor", [1e-4, 30.0])
    @pytest.mark.parametrize("name", ["gaussian", "cauchy"])
    def test_updates_of_every_size_are_treated_alike(
        self, experts: list[Pair], side: str, name: str, factor: float
    ) -> None:
        scaled = [(factor * up, down) for up, down in experts]
        merged = self.solve(scaled, TAILS[name], side=side)
        assert_close(merged, factor * self.solve(experts, TAILS[name], side=side))

    def test_an_expert_of_zeros_has_no_say(
        self, experts: list[Pair], tail: Tail, side: str
    ) -> None:
        idle = (torch.zeros_like(experts[0][0]), experts[0][1])
        merged = self.solve([*experts, idle], tail, side=side)
        assert_close(merged, self.solve(experts, tail, side=side))

    def test_a_weight_of_two_is_the_expert_twice(
        self, experts: list[Pair], tail: Tail, side: str
    ) -> None:
        """Of a Gaussian exactly; a Cauchy starts elsewhere but ends in the same mode here."""
        twice = self.solve([experts[0], *experts], tail, side=side)
        assert_close(twice, self.solve(experts, tail, (2.0, 1.0, 1.0), side=side), LIMIT)


class TestDense(Laws):
    twin = staticmethod(dense)


class TestLowRank(Laws):
    twin = staticmethod(factors)

    def test_stays_in_factors(self, experts: list[Pair], tail: Tail, side: str) -> None:
        method, fixed = tail
        merged = merge(factors(experts), method, **fixed, side=side).update
        rows, columns = experts[0][0].shape[0], experts[0][1].shape[1]
        assert isinstance(merged, LowRank)
        assert merged.rank <= min(sum(up.shape[1] for up, _ in experts), rows, columns)


class OnGpu:
    """The same laws with the stack, and all that follows from it, on a GPU."""

    def solve(
        self, experts: list[Pair], tail: Tail, weights: tuple[float, ...] = (), **settings: object
    ) -> Tensor:
        method, fixed = tail
        stack = self.twin(experts).to(torch.device("cuda"))
        merged = update(merge(stack, method, weights, **fixed | settings))
        assert merged.is_cuda
        return merged.cpu()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.gpu
class TestDenseOnGpu(OnGpu, Laws):
    twin = staticmethod(dense)


@needs_gpu
@pytest.mark.gpu
class TestLowRankOnGpu(OnGpu, Laws):
    twin = staticmethod(factors)


def test_the_paper_scale_is_not_equivariant() -> None:
    """Why `equivariant` is the default: small updates make the paper's Cauchy a Gaussian."""
    experts = [pair(12, 3, 7, seed) for seed in range(3)]
    tiny = [(1e-4 * up, down) for up, down in experts]
    sizes = reference.cauchy_scales(products(experts), "paper", 1.0)
    gaussian = update(
        merge(dense(experts), "gaussian_poe", [1 / size for size in sizes], side="input")
    )
    shrunk = (
        update(merge(dense(tiny), "cauchy_poe", side="input", scale="paper", epsilon=0.1)) / 1e-4
    )
    full = update(merge(dense(experts), "cauchy_poe", side="input", scale="paper", epsilon=0.1))
    assert distance(shrunk, gaussian) < LIMIT
    assert distance(full, gaussian) > 0.01


def test_batches_are_solved_apart() -> None:
    """Matrices of one batch do not see each other, however different their sizes."""
    batch = [[pair(8, 3, 5, seed) for seed in range(3)] for _ in range(2)]
    batch[1] = [(1e3 * up, down) for up, down in batch[1]]
    batch[1][0] = pair(8, 3, 5, seed=7)
    for twin in (dense, factors):
        stacks = [twin(experts) for experts in batch]
        together = type(stacks[0])(*_join(stacks))
        merged = merge(together, "cauchy_poe", **SETTLED).update.dense()
        for index, stack in enumerate(stacks):
            assert_close(merged[index], update(merge(stack, "cauchy_poe", **SETTLED)))


def _join(stacks: list) -> list:
    if hasattr(stacks[0], "deltas"):
        return [torch.cat([stack.deltas for stack in stacks])]
    return [
        tuple(torch.cat(parts) for parts in zip(*(getattr(s, side) for s in stacks), strict=True))
        for side in ("ups", "downs")
    ]
