"""Names that do not collide."""

from collections.abc import Container


def unused_name(name: str, taken: Container[str]) -> str:
    """`name`, or `name-2`, `name-3` and so on where it is taken."""
    fresh, count = name, 2
    while fresh in taken:
        fresh, count = f"{name}-{count}", count + 1
    return fresh
