"""How a long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # tensors done, tensors in all


def silent(_done: int, _total: int) -> None:
    """No progress is wanted."""
