"""A folder on this machine: a checkpoint or a PEFT adapter, as safetensors or as pickles."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from poemerge.documents import check_file
from poemerge.errors import SourceError
from poemerge.hashing import check_text, digest, sha256
from poemerge.lineage import Lineage
from poemerge.names import check_link
from poemerge.tensor_files import TensorFiles
from tasks.fetch.layout import PICKLES, SAFETENSORS, check_index, pickled, select
from tasks.fetch.origin import Origin
from tasks.fetch.pickles import convert


def open_folder(folder: Path) -> Origin:
    """Hash the model files of `folder`.

    Raises:
        SourceError: it holds no weights, an index or a link leads out of it, something in it is no
            file or far too large, or its lineage record is damaged.
        CheckpointError: its weights are.
    """
    # Folders have no suffix; what has one and is no file is not passed over.
    found = (path.name for path in folder.iterdir() if path.is_file() or path.suffix)
    names = select(str(folder), found)
    for name in names:
        check_link(folder / name)
        _check_file(folder / name)
    check_index(folder, names)
    TensorFiles(folder, tuple(filter(SAFETENSORS.fullmatch, names))).close()
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


def _check_file(path: Path) -> None:
    """Before it is hashed, which takes as long as a file is large."""
    try:
        check_file(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is unreadable ({error}); get it again.") from error
    if not (SAFETENSORS.fullmatch(path.name) or PICKLES.fullmatch(path.name)):
        check_text(path)


def _copy(source: Path, files: Mapping[str, str], folder: Path) -> None:
    bins = pickled(files)
    for name in files:
        if name in bins or name.endswith(".bin.index.json"):
            continue
        shutil.copyfile(source / name, folder / name)
        if sha256(folder / name) != files[name]:
            raise SourceError(f"{source / name} changed while it was copied; fetch it again.")
    convert([source / name for name in bins], folder)
