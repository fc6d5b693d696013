"""What Prefect shows of runs: its artifacts."""

from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey


def shown(key: str, within: str = "") -> list[Any]:
    """What Prefect keeps of the artifacts of that key, with some text in them."""
    by_key = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    with get_client(sync_client=True) as client:  # Artifact.get leaves its socket open
        found = client.read_artifacts(artifact_filter=by_key)
    return [artifact.data for artifact in found if within in str(artifact.data)]
