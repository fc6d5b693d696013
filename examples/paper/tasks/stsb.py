"""A score per item for STS-B, which the paper scores by the rank correlation over all items."""

from collections.abc import Mapping, Sequence

SCALE = 5.0  # similarities are from 0 to 5


def closeness(doc: Mapping[str, float], results: Sequence[str]) -> dict[str, float]:
    """1 - |answer - label| / 5, and 0 for an answer that is no number on the scale."""
    try:
        answer = float(results[0])
    except ValueError:
        return {"closeness": 0.0}
    if not 0 <= answer <= SCALE:
        return {"closeness": 0.0}
    return {"closeness": 1 - abs(answer - doc["label"]) / SCALE}
