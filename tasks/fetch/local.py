"""A folder on this machine: a checkpoint or a PEFT adapter, as safetensors or as pickles."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from poemerge.errors import SourceError
from poemerge.lineage import Lineage, digest, sha256
from poemerge.names import check_link
from tasks.fetch.layout import check_index, pickled, select
from tasks.fetch.origin import Origin
from tasks.fetch.pickles import convert


def open_folder(folder: Path) -> Origin:
    """Hash the model files of `folder`.

    Raises:
        SourceError: it holds no weights, an index or a link leads out of it, or its lineage record
            is damaged.
    """
    names = select(str(folder), (path.name for path in folder.iterdir() if path.is_file()))
    for name in names:
        check_link(folder / name)
    check_index(folder, names)
    files = {name: sha256(folder / name) for name in names}
    record = Lineage.find(folder)
    content = digest(files)
    return Origin(
        files,
        sha256=content,
        revision=content,
        write=partial(_copy, folder, files),
        parent=None if record is None else asdict(record),
    )


def _copy(source: Path, files: Mapping[str, str], folder: Path) -> None:
    bins = pickled(files)
    for name in files:
        if name in bins or name.endswith(".bin.index.json"):
            continue
        shutil.copyfile(source / name, folder / name)
        if sha256(folder / name) != files[name]:
            raise SourceError(f"{source / name} changed while it was copied; fetch it again.")
    convert([source / name for name in bins], folder)
