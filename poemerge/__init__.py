"""Model merging as probabilistic inference: products of Gaussian and Cauchy experts.

from poemerge import merge_checkpoints
report = merge_checkpoints("base", ["expert-a", "expert-b"], "merged", method="cauchy_poe")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from poemerge.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from poemerge.errors import PoemergeError
    from poemerge.extract import extract_adapter
    from poemerge.extracting.report import ExtractReport
    from poemerge.merge import merge_checkpoints
    from poemerge.methods import METHODS
    from poemerge.posterior.uncertainty import describe_uncertainty
    from poemerge.report import MergeReport
    from poemerge.residuals.describe import describe_residuals

__all__ = [
    "METHODS",
    "ExtractReport",
    "MergeReport",
    "PoemergeError",
    "__version__",
    "describe_residuals",
    "describe_uncertainty",
    "extract_adapter",
    "merge_checkpoints",
]

_HOME = {
    "ExtractReport": "poemerge.extracting.report",
    "METHODS": "poemerge.methods",
    "MergeReport": "poemerge.report",
    "PoemergeError": "poemerge.errors",
    "describe_residuals": "poemerge.residuals.describe",
    "describe_uncertainty": "poemerge.posterior.uncertainty",
    "extract_adapter": "poemerge.extract",
    "merge_checkpoints": "poemerge.merge",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes a second, which `poemerge --help` should not pay."""
    if name not in _HOME:
        raise AttributeError(f"module 'poemerge' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
