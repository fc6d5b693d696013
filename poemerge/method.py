"""What a merge method is, and the table that `poemerge.methods` fills."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poemerge.settings import Settings
from poemerge.task_vector import Stack, Update


@dataclass(frozen=True)
class Merged:
    """What a method returns: the updates of a batch, and a certificate for each if there is one."""

    update: Update  # (B, *shape)
    certificates: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Call:
    """What a method needs beside the task vectors and its settings."""

    weights: Tensor  # one per voting expert (E,), fp64
    seeds: tuple[tuple[int, ...], ...] = ()  # B × E, from the run's seed, tensor and expert


Rule = Callable[[Stack, Any, Call], Merged]


@dataclass(frozen=True)
class Method:
    """A named merge method.

    Attributes:
        merge: stack of task vectors → merged update, before `strength`.
        settings: the dataclass of its settings, with defaults and meanings.
        source: where the formula comes from.
        structured: True if it treats matrices as matrices; vectors are then averaged.
        factors: True if low-rank task vectors give a low-rank update.
    """

    name: str
    merge: Rule
    settings: type[Settings]
    source: str
    structured: bool = False
    factors: bool = False

    @property
    def summary(self) -> str:
        """First line of the method's docstring."""
        return (self.merge.__doc__ or "").strip().splitlines()[0]


METHODS: dict[str, Method] = {}


def register(
    *, settings: type[Settings], source: str, structured: bool = False, factors: bool = False
) -> Callable[[Rule], Rule]:
    """Enter a function into the table under its own name."""

    def enter(rule: Rule) -> Rule:
        name = rule.__name__
        METHODS[name] = Method(name, rule, settings, source, structured, factors)
        return rule

    return enter
