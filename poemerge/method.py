"""What a merge method is, and the table that `poemerge.methods` fills."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from poemerge.settings import Settings
from poemerge.update import Update


@dataclass(frozen=True)
class Merged:
    """What a method returns: the updates of a batch, and a certificate for each if there is one."""

    update: Update  # (B, *shape)
    certificates: tuple[Mapping[str, Any], ...] = ()
    posterior: "Posterior | None" = None

    def draw(self) -> tuple[Update, tuple[Mapping[str, float], ...]]:
        """The next draw from the posterior, and its facts; the update where there is no other."""
        if self.posterior is None:
            return self.update, ()
        return next(self.posterior.draws), self.posterior.facts

    def mapped(self, change: Callable[[Update], Update]) -> "Merged":
        """The same with every update changed: the merged one, and all draws."""
        known = self.posterior
        draws = None if known is None else Posterior(known.facts, map(change, known.draws))
        return Merged(change(self.update), self.certificates, draws)


@dataclass(frozen=True)
class Posterior:
    """What a product of experts knows beside its mode (docs/posterior.md).

    Attributes:
        facts: one a tensor: `relative_std`, and `acceptance` of a Langevin sampler.
        draws: updates (B, *shape) from the posterior, without end.
    """

    facts: tuple[Mapping[str, float], ...]
    draws: Iterator[Update]


@dataclass(frozen=True)
class Sampling:
    """How the posterior is to be sampled.

    Attributes:
        seeds: one a tensor of the batch.
        sampler: `laplace` or `langevin`.
        temperature: factor on the variance of draws; 1 is the residuals' own.
    """

    seeds: tuple[int, ...]
    sampler: str = "laplace"
    temperature: float = 1.0

    def part(self, index: int) -> "Sampling":
        """That of one tensor of the batch."""
        return replace(self, seeds=self.seeds[index : index + 1])


@dataclass(frozen=True)
class Cut:
    """Pieces of a matrix, along its rows or columns.

    Attributes:
        axis: `rows` (O) or `columns` (I).
        sizes: of the pieces, in order; they add up to the axis.
        apart: True for fused projections: matrices of their own, with precisions of their own.
            False if only the experts' weights are cut.
    """

    axis: str
    sizes: tuple[int, ...]
    apart: bool = False

    @classmethod
    def into_blocks(cls, axis: str, length: int, size: int) -> "Cut | None":
        """Blocks of one size, the last maybe smaller; None where one block is all."""
        if size >= length:
            return None
        whole, rest = divmod(length, size)
        return cls(axis, (size,) * whole + (rest,) * bool(rest))


@dataclass(frozen=True)
class Call:
    """What a method needs beside the task vectors and its settings.

    Attributes:
        weights: say of each voting expert (B, E), fp64.
        seeds: B × E, from the run's seed, tensor and expert.
        curvature: what the experts' curvature files hold, (B, E, *shape) or (B, E, I, I).
        prepared: what `Method.prepare` found in the whole tensors (B, E), where rows are merged
            apart.
        cut: how the matrix falls into pieces, from the plan.
        sampling: how to sample the posterior, if it is asked for.
    """

    weights: Tensor
    seeds: tuple[tuple[int, ...], ...] = ()
    curvature: Tensor | None = None
    prepared: Tensor | None = None
    cut: Cut | None = None
    sampling: Sampling | None = None

    @property
    def draw_seeds(self) -> tuple[int, ...]:
        """Seeds of draws from the posterior, one a tensor; none if there are no draws."""
        return self.sampling.seeds if self.sampling else ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the pieces; none if the matrix is whole."""
        return self.cut.sizes if self.cut else ()


@dataclass(frozen=True)
class Matrix:
    """What a structured method is given, as far as its cost goes.

    Attributes:
        rows: O.
        columns: I.
        experts: E, those that vote.
        rank: Σ R_i of updates in factors; None where they are dense.
    """

    rows: int
    columns: int
    experts: int
    rank: int | None


@dataclass(frozen=True)
class Work:
    """What merging one matrix takes.

    Attributes:
        flops: floating-point operations, in fp64.
        bytes: held at once beside the updates and the merged weights.
    """

    flops: float
    bytes: int


Rule = Callable[[Any, Any, Call], Merged]  # a Stack; a StreamedStack where settings stream
Trait = Callable[[Any], bool]  # of a method, given its settings
Prepare = Callable[[Tensor, Any], Tensor]  # whole update (it may be spoilt), settings → a number
Effort = Callable[[Matrix], Work]


@dataclass(frozen=True)
class Method:
    """A named merge method.

    Attributes:
        merge: stack of task vectors → merged update, before `strength`.
        settings: the dataclass of its settings, with defaults and meanings.
        source: where the formula comes from.
        structured: True if it treats matrices as matrices; vectors are then averaged.
        factors: True if low-rank task vectors give a low-rank update.
        local: True if rows of a tensor can be merged apart, so that no tensor is ever too large.
        prepare: a number that it must know of each whole update before that.
        work: what a matrix takes, for `poemerge check`; None is that of a product of experts.
        passes: what an elementwise method takes of an expert's update, in times that memory could
            be passed over it; measured on a CPU, for `poemerge plan`.
    """

    name: str
    merge: Rule
    settings: type[Settings]
    source: str
    structured: Trait
    factors: Trait
    local: bool = False
    prepare: Prepare | None = None
    work: Effort | None = None
    passes: float = 0.0

    @property
    def summary(self) -> str:
        """First line of the method's docstring."""
        return (self.merge.__doc__ or "").strip().splitlines()[0]


METHODS: dict[str, Method] = {}


def never(_: Any) -> bool:
    """False, whatever the settings."""
    return False


def always(_: Any) -> bool:
    """True, whatever the settings."""
    return True


def register(
    *,
    settings: type[Settings],
    source: str,
    structured: Trait = never,
    factors: Trait = never,
    local: bool = False,
    prepare: Prepare | None = None,
    work: Effort | None = None,
    passes: float = 0.0,
) -> Callable[[Rule], Rule]:
    """Enter a function into the table under its own name."""

    def enter(rule: Rule) -> Rule:
        name = rule.__name__
        METHODS[name] = Method(
            name, rule, settings, source, structured, factors, local, prepare, work, passes
        )
        return rule

    return enter
