"""Folders that DVC holds, named `dvc://artifacts/merge/cauchy_poe/<md5>.dir`.

MLflow loads `artifact_repository` by its entry point whenever it is imported. That is why this
package lies beside the stages (a stage imports Prefect), and why it imports nothing at its top.
"""

from typing import Any

SCHEME = "dvc"


def is_held(place: str) -> bool:
    """True for a place in DVC, however MLflow cut its URI."""
    return place.startswith(f"{SCHEME}:")


def artifact_repository(*args: Any, **kwargs: Any) -> Any:
    """MLflow's view of a `dvc://` URI; takes what MLflow passes on."""
    from tasks.dvc_store.artifacts import DvcArtifactRepository  # noqa: PLC0415  needs MLflow

    return DvcArtifactRepository(*args, **kwargs)
