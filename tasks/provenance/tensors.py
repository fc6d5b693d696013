"""In what two files differ, tensor by tensor where they hold tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from poemerge.names import listed

SUFFIX = ".safetensors"
SHOWN = 5  # tensors that are named
OTHER = "has other bytes"


def difference(old: Path, new: Path) -> str:
    """In words, what is other in `new`; one tensor of each is in memory at a time.

    Args:
        old: a file, whatever its name.
        new: another, whose name says what it holds.
    """
    if new.suffix != SUFFIX:
        return OTHER
    from safetensors import safe_open  # noqa: PLC0415 - imports torch

    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        moved = list(_moved(before, after))
    if not moved:
        return "has the same tensors, in other bytes"
    return f"differs in {listed(moved, SHOWN)}"


def _moved(before: Any, after: Any) -> Iterator[str]:
    then, now = set(before.keys()), set(after.keys())
    for name in sorted(then | now):
        if name not in then & now:
            yield f"{name} ({'gone' if name in then else 'new'})"
            continue
        old, new = before.get_tensor(name), after.get_tensor(name)
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            yield f"{name} (another shape or dtype)"
        elif not old.equal(new):
            gap = (old.double() - new.double()).abs().max().item()
            yield f"{name} (by up to {gap:.1e})"
