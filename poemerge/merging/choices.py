"""What a merge is asked for beside its method, and whether that fits its plan."""

from dataclasses import dataclass

import torch

from poemerge.device import STORED
from poemerge.errors import SettingError
from poemerge.merging.plan import Plan
from poemerge.poe.settings import ProductSettings

SAMPLERS = ("laplace", "langevin")


@dataclass(frozen=True)
class Draws:
    """Draws from the posterior.

    Attributes:
        count: of them; 0 is the mode alone.
        sampler: `laplace` or `langevin`.
        temperature: factor on their variance.
    """

    count: int = 0
    sampler: str = "laplace"
    temperature: float = 1.0


MODE_ALONE = Draws()


@dataclass(frozen=True)
class Choices:
    """What a merge is asked for beside its method.

    Attributes:
        device: where to solve.
        dtype: to store: `source`, `float32`, `bfloat16` or `float16`.
        output: `full` or `adapter`.
        seed: of methods that draw at random, and of draws from the posterior.
        rank: to which a merged adapter is truncated, or None.
        memory: budget in bytes, or None.
        draws: from the posterior, beside the mode.
    """

    device: torch.device
    dtype: str
    output: str
    seed: int
    rank: int | None = None
    memory: int | None = None
    draws: Draws = MODE_ALONE

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a tensor of the base's dtype is stored."""
        return STORED.get(self.dtype, dtype) if dtype.is_floating_point else dtype


def check_choices(plan: Plan, choices: Choices) -> None:
    """Refuse what the plan cannot do.

    Raises:
        SettingError: naming the choice.
    """
    if choices.dtype != "source" and choices.dtype not in STORED:
        raise SettingError(f"dtype is {choices.dtype!r}; choose source, {', '.join(STORED)}.")
    if choices.output not in {"full", "adapter"}:
        raise SettingError(f"output is {choices.output!r}; choose full or adapter.")
    if choices.rank is not None and (choices.rank < 1 or choices.output == "full"):
        raise SettingError(
            f"rank is {choices.rank}; it is the rank of a merged adapter: choose 1 or more, and "
            "output adapter."
        )
    if choices.output == "adapter":
        _check_adapter(plan)
    check_draws(plan, choices.draws)


def check_draws(plan: Plan, draws: Draws) -> None:
    """Refuse draws where there is no posterior.

    Raises:
        SettingError: naming the method or the choice.
    """
    if draws.count < 0:
        raise SettingError(f"samples is {draws.count}; choose 0 or more.")
    if draws.sampler not in SAMPLERS:
        raise SettingError(f"sampler is {draws.sampler!r}; choose {' or '.join(SAMPLERS)}.")
    if not 0 < draws.temperature < float("inf"):
        raise SettingError(f"temperature is {draws.temperature}; choose a number above 0.")
    if draws.count and not isinstance(plan.settings, ProductSettings):
        raise SettingError(
            f"{plan.method.name} has no posterior to draw samples from; choose a product of "
            "experts (gaussian_poe, cauchy_poe, student_t_poe)."
        )


def _check_adapter(plan: Plan) -> None:
    if plan.growth is not None:
        raise SettingError(
            f"{len(plan.growth.tokens)} tokens are added, whose rows a merged adapter does not "
            "hold; choose output full, or vocabulary base."
        )
    if not plan.method.factors(plan.settings):
        raise SettingError(
            f"{plan.method.name} makes dense updates with these settings, which no adapter holds; "
            "choose output full, or a method that keeps factors (`poemerge methods`)."
        )
    dense = [i.name for g in plan.groups if g.voters and not g.in_factors for i in g.tensors]
    if dense:
        raise SettingError(
            f"{dense[0]} has a dense update, which no adapter holds; choose output full, or give "
            "adapters only."
        )
