"""What a search may choose from: for each setting of a method, a list of values or a range."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

from poemerge.errors import SettingError
from poemerge.methods import find
from poemerge.settings import default_of

BOUNDS = {"low", "high"}
RANGE = BOUNDS | {"log", "step"}
DIGITS = 3  # significant ones of a number drawn from a range


@dataclass(frozen=True)
class Values:
    """Values by name: their JSON, which any store can hold."""

    values: Mapping[str, Any]

    @classmethod
    def parse(cls, given: Any) -> Self:
        """From a list, or from one value that is fixed."""
        values = given if isinstance(given, list) else [given]
        if not values:
            raise SettingError("is an empty list; name a value.")
        return cls({json.dumps(value, sort_keys=True): value for value in values})

    @property
    def samples(self) -> tuple[Any, ...]:
        """Every value."""
        return tuple(self.values.values())

    def read(self, drawn: str) -> Any:
        """The value of that name."""
        return self.values[drawn]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        log: True if ratios count, not differences.
        step: between two numbers; None for all of them.
        whole: True for a setting that takes whole numbers.
    """

    low: float
    high: float
    log: bool
    step: float | None
    whole: bool

    @classmethod
    def parse(cls, given: Mapping[str, Any], *, whole: bool) -> Self:
        """From `low`, `high` and perhaps `log` or `step`."""
        log, step = given.get("log", False), given.get("step")
        numbers = [given[name] for name in ("low", "high", "step") if given.get(name) is not None]
        if not all(_is_number(number) for number in numbers) or not isinstance(log, bool):
            raise SettingError(f"is {dict(given)}; give numbers, and log as true or false.")
        if whole and any(number != int(number) for number in numbers):
            raise SettingError(f"is {dict(given)}; the setting takes whole numbers.")
        low, high = given["low"], given["high"]
        if not low < high or (log and low <= 0) or (step is not None and (log or step <= 0)):
            raise SettingError(
                f"is {dict(given)}; low lies below high (and above 0 with log), and a step is "
                "above 0, without log."
            )
        return cls(low, high, log, step, whole)

    @property
    def samples(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    def read(self, drawn: float) -> float:
        """A number with as many digits as a person would write."""
        if self.whole:
            return int(drawn)
        return min(max(float(f"{drawn:.{DIGITS}g}"), self.low), self.high)


@dataclass(frozen=True)
class Space:
    """The settings of one method that a search may choose."""

    method: str
    domains: Mapping[str, Values | Range]

    @classmethod
    def parse(cls, label: str, given: Mapping[str, Any]) -> Self:
        """Read one entry of `sweep.space`; whether the method takes the values is not looked at.

        Args:
            label: its key, and the method where no `method` is named.
            given: setting → list of values, range, or one value.

        Raises:
            SettingError: there is no such method, or what is given is no list or range.
        """
        rest = dict(given)
        method = str(rest.pop("method", label))
        known = find(method).settings.__dataclass_fields__
        defaults = {name: default_of(field) for name, field in known.items()}
        domains = {}
        for name, value in rest.items():
            try:
                domains[name] = _domain(value, defaults.get(name))
            except SettingError as error:
                raise SettingError(f"{name} {error}") from error
        return cls(method, domains)

    @property
    def is_finite(self) -> bool:
        """True if nothing but lists is searched."""
        return all(isinstance(domain, Values) for domain in self.domains.values())

    def points(self) -> list[dict[str, str]]:
        """Every combination of a finite space, the last setting fastest; as `settings` reads it."""
        names = [list(d.values) for d in self.domains.values() if isinstance(d, Values)]
        return [dict(zip(self.domains, point, strict=True)) for point in product(*names)]

    def samples(self) -> Iterator[dict[str, Any]]:
        """Each value, and both ends of each range, as a setting by itself."""
        for name, domain in self.domains.items():
            for value in domain.samples:
                yield {name: value}

    def settings(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the method, from what a sampler drew."""
        return {name: domain.read(drawn[name]) for name, domain in self.domains.items()}


def _domain(given: Any, default: Any) -> Values | Range:
    if not isinstance(given, Mapping):
        return Values.parse(given)
    if given.keys() >= BOUNDS and given.keys() <= RANGE:
        return Range.parse(given, whole=isinstance(default, int))
    if isinstance(default, Mapping):
        return Values.parse(given)
    raise SettingError(f"is {dict(given)}; write a list of values, or a range with low and high.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
