"""Where a tensor stands in the model, read from its name: which layer, which module of it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MOST = 24  # kinds of matrices that are told apart: each gets a panel
_LAYER = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<layer>\d+)\.(?P<rest>.+)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# The order in which a transformer computes; modules of other names follow.
USUAL = ("q", "k", "v", "o", "gate", "up", "down")

Key = tuple[str, str]  # the stack of layers, and the rest of a name in it


@dataclass(frozen=True)
class Place:
    """A matrix that every layer of a stack has, or several of one kind.

    Attributes:
        module: its name in the layer, as short as leaves it unlike all others.
        layer: from 0.
    """

    module: str
    layer: int


def natural(name: str) -> tuple[str | int, ...]:
    """Sorts layer 2 before layer 10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def places(names: Iterable[str]) -> dict[str, Place]:
    """Tensor name → place, module by module; what stands in no layer is left out.

    Where there are many modules, those that a number alone tells apart are one, as are the experts
    of a mixture; where there are still many, all are.
    """
    found = {name: match for name in names if (match := _LAYER.fullmatch(name))}
    keys = {name: _key(match) for name, match in found.items()}
    if len(set(keys.values())) > MOST:
        keys = {name: (stack, _NUMBER.sub("*", rest)) for name, (stack, rest) in keys.items()}
    if len(set(keys.values())) > MOST:
        keys = dict.fromkeys(keys, ("", "all"))
    short = _shortest(sorted(set(keys.values())))
    placed = {name: Place(short[keys[name]], int(found[name]["layer"])) for name in found}
    order = {module: index for index, module in enumerate(USUAL)}

    def position(name: str) -> tuple[int, str, int]:
        place = placed[name]
        return order.get(place.module, len(order)), place.module, place.layer

    return {name: placed[name] for name in sorted(placed, key=position)}


def _key(match: re.Match[str]) -> Key:
    return match["stack"] or "", match["rest"].removesuffix(".weight")


def _shortest(keys: Sequence[Key]) -> dict[Key, str]:
    """The last part of a name if that tells all modules apart, else more of it."""
    ways = (
        [rest.rpartition(".")[2].removesuffix("_proj") for _, rest in keys],
        [rest for _, rest in keys],
        [f"{stack}.{rest}" for stack, rest in keys],
    )
    chosen = next((way for way in ways if len(set(way)) == len(keys)), ways[-1])
    return dict(zip(keys, chosen, strict=True))
