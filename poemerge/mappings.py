"""Settings that are mappings: checked, and brought into one form."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from poemerge.errors import SettingError


def says(name: str, value: Any) -> dict[str, float | dict[str, float]]:
    """A mapping of names to weights, or to weights by name pattern."""
    if not isinstance(value, Mapping) or not all(map(_is_say, value.values())):
        raise SettingError(
            f"{name} is {reprlib.repr(value)}; give a mapping of expert names to numbers ≥ 0, or "
            "to mappings of tensor name patterns to numbers ≥ 0."
        )
    return {str(expert): _say(given) for expert, given in value.items()}


def _is_say(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(not isinstance(v, Mapping) and _is_say(v) for v in value.values())
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _say(given: Any) -> float | dict[str, float]:
    if isinstance(given, Mapping):
        return {str(pattern): float(say) for pattern, say in given.items()}
    return float(given)


def file_names(name: str, value: Any) -> dict[str, str]:
    """A mapping of names to files."""
    if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
        raise SettingError(
            f"{name} is {reprlib.repr(value)}; give a mapping of expert names to files."
        )
    return {str(expert): file for expert, file in value.items()}


def pattern_sizes(name: str, value: Any) -> dict[str, tuple[int, ...]]:
    """A mapping of name patterns to lists of sizes."""
    sound = isinstance(value, Mapping) and all(
        isinstance(sizes, (list, tuple))
        and len(sizes) > 1
        and all(isinstance(size, int) and size > 0 for size in sizes)
        for sizes in value.values()
    )
    if not sound:
        raise SettingError(
            f"{name} is {reprlib.repr(value)}; give a mapping of tensor name patterns to lists of "
            "two or more sizes."
        )
    return {str(pattern): tuple(sizes) for pattern, sizes in value.items()}
