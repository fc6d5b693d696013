"""MLflow reads `dvc://` through this: `models:/NAME@champion` downloads from DVC."""

import posixpath
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NoReturn

from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from poemerge.errors import SourceError
from tasks.dvc_store.reference import Blob, Reference, contents


class DvcArtifactRepository(ArtifactRepository):  # type: ignore[misc]
    """Read-only view of what a `dvc://` reference names.

    MLflow may cut a URI anywhere (`dvc://artifacts/merge/ties` and `<md5>.dir/config.json`), so a
    path is always read together with the URI before it.
    """

    def __init__(
        self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
    ) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        self._contents = cache(contents)  # per instance: a server must notice a new `dvc gc`

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """The files and folders directly under `path`; nothing for a file."""
        files, inside = self._locate(path)
        prefix = f"{inside}/" if inside else ""
        below = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
        folders = sorted({name.split("/")[0] for name in below if "/" in name})
        here = [name for name in below if "/" not in name]
        return [FileInfo(posixpath.join(path or "", name), True, None) for name in folders] + [
            FileInfo(
                posixpath.join(path or "", name), False, files[prefix + name].path.stat().st_size
            )
            for name in here
        ]

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> NoReturn:  # noqa: ARG002
        """Refused: what DVC holds is written by the pipeline."""
        message = f"{self.artifact_uri} is read-only; run the pipeline to add {local_file}."
        raise MlflowException(message)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> NoReturn:
        """Refused: what DVC holds is written by the pipeline."""
        self.log_artifact(local_dir, artifact_path)

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        files, inside = self._locate(remote_file_path)
        if inside not in files:
            message = f"{self.artifact_uri} has no {remote_file_path}; list it to see what it has."
            raise SourceError(message)
        files[inside].copy(Path(local_path))

    def _locate(self, path: str | None) -> tuple[Mapping[str, Blob], str]:
        reference, inside = Reference.parse(posixpath.join(self.artifact_uri, path or ""))
        return self._contents(reference), inside
