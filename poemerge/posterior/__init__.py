"""How sure a merge is: the posterior around its mode (docs/posterior.md)."""

from typing import Any

__all__ = ["describe_uncertainty"]


def __getattr__(name: str) -> Any:
    """Import on first use: what describes whole models rests on what merges them."""
    if name not in __all__:
        raise AttributeError(f"module 'poemerge.posterior' has no attribute {name!r}")
    from poemerge.posterior.uncertainty import describe_uncertainty  # noqa: PLC0415

    return describe_uncertainty
