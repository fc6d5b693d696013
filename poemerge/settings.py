"""Settings of a method: a frozen dataclass whose fields carry their meaning, range and choices."""

import difflib
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

from poemerge.errors import SettingError
from poemerge.mappings import says


def setting(
    default: Any,
    meaning: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    check: Callable[[str, Any], Any] | None = None,
) -> Any:
    """A field of a settings class.

    Args:
        default: value where none is given.
        meaning: what it does, its unit and when it matters; shown by `poemerge methods`.
        low: smallest value allowed.
        high: largest value allowed.
        choices: the words allowed, for a word.
        words: the words allowed beside numbers, for a number.
        check: of a mapping: (name, value) → the value in its form, or SettingError.
    """
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    metadata |= {"words": words, "check": check}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Settings that every method has."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    strength: float = setting(
        1.0, "factor on the merged update before it is added to the base", low=0.0
    )
    weights: Mapping[str, float | Mapping[str, float]] = setting(
        {},
        "say of an expert, by its name: a number, or numbers by tensor name pattern "
        "(`*.mlp.*`), of which the first that fits counts; 1 where nothing is said",
        check=says,
    )

    def weight_of(self, expert: str, tensor: str) -> float:
        """Say of an expert in a tensor."""
        given = self.weights.get(expert, 1.0)
        if not isinstance(given, Mapping):
            return given
        return next((say for pattern, say in given.items() if fnmatchcase(tensor, pattern)), 1.0)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """Check `given` against the fields.

        Raises:
            SettingError: an unknown name, a wrong type, or a value out of range.
        """
        known = {f.name: f for f in fields(cls)}
        for name in given:
            if name not in known:
                raise SettingError(
                    f"Unknown setting {name!r}{nearest(name, known)}; it takes {', '.join(known)}."
                )
        preset = str(given.get("preset") or "")
        merged = {**cls.presets.get(preset, {}), **given}
        return cls(**{name: _checked(known[name], value) for name, value in merged.items()})

    @classmethod
    def describe(cls) -> list[tuple[str, Any, str]]:
        """(name, default, meaning) of every setting, in order."""
        return [(f.name, default_of(f), _meaning(f)) for f in fields(cls)]


def default_of(field_: Field[Any]) -> Any:
    """Default value of a dataclass field."""
    factory = field_.default_factory
    return field_.default if factory is MISSING else factory()


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`-like hint, or nothing where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _meaning(field_: Field[Any]) -> str:
    choices = [choice for choice in field_.metadata["choices"] if choice]
    return field_.metadata["meaning"] + (f": {' | '.join(choices)}" if choices else "")


def _checked(field_: Field[Any], value: Any) -> Any:
    default, check = default_of(field_), field_.metadata["check"]
    if check is not None:
        return check(field_.name, value)
    if value in field_.metadata["words"]:
        return value
    if isinstance(default, str):
        return _word(field_, value)
    return _number(field_, value, whole=isinstance(default, int))


def _word(field_: Field[Any], value: Any) -> str:
    choices = field_.metadata["choices"]
    if value not in choices:
        words = ", ".join(choice or "''" for choice in choices)
        raise SettingError(f"{field_.name} is {reprlib.repr(value)}; choose one of {words}.")
    return str(value)


def _number(field_: Field[Any], value: Any, *, whole: bool) -> float | int:
    kind = "a whole number" if whole else "a number"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or (whole and value != int(value)):
        words = "".join(f" or {word!r}" for word in field_.metadata["words"])
        raise SettingError(f"{field_.name} is {reprlib.repr(value)}; give {kind}{words}.")
    low, high = field_.metadata["low"], field_.metadata["high"]
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise SettingError(f"{field_.name} is {value:g}; it must be {bounds}.")
    return int(value) if whole else float(value)
