"""Which files of a folder make up a model: weights in the safest format, config, tokenizer."""

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from poemerge.checkpoint import read_json
from poemerge.errors import SourceError
from poemerge.layout import RECORD

SAFETENSORS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")
PICKLES = re.compile(r"(adapter_|pytorch_)model(-\d+-of-\d+)?\.bin")
INDEX = ".index.json"
# Code (*.py) is left out on purpose: nothing that is fetched is ever executed.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*")
ROOMS = ("", "peft/", "model/")  # MLflow keeps adapters and models of transformers in the last two,
TOKENIZER = "components/tokenizer/"  # and the tokenizer here


def select(where: str, names: Iterable[str]) -> tuple[str, ...]:
    """The files that make up the model, sorted; pickles only where there are no safetensors.

    Args:
        where: the source, for the message.
        names: paths of all its files; those in sub-folders are not considered.

    Raises:
        SourceError: there are no weights among them.
    """
    beside = sorted(name for name in names if "/" not in name)
    weights = [name for name in beside if SAFETENSORS.fullmatch(name)] or pickled(beside)
    if not weights:
        raise SourceError(
            f"{where} holds no model or adapter weights (*.safetensors or *.bin); give the folder "
            "of a checkpoint or of a PEFT adapter, or name a .gguf file itself."
        )
    kind = SAFETENSORS if SAFETENSORS.fullmatch(weights[0]) else PICKLES
    return tuple(sorted([*weights, *(name for name in beside if _goes_with(kind, name))]))


def find_room(names: Iterable[str]) -> str:
    """Where in a folder the weights lie: "", or a sub-folder of MLflow's with its slash."""
    folders = {
        name.removesuffix(file)
        for name in names
        if SAFETENSORS.fullmatch(file := name.rpartition("/")[2]) or PICKLES.fullmatch(file)
    }
    return next((room for room in ROOMS if room in folders), "")


def flat(where: str, names: Collection[str]) -> Mapping[str, str]:
    """Name that a file is to have → its path, of the files that make up the model.

    Args:
        where: the source, for the message.
        names: paths of all its files; the weights lie beside one another, on top or in a room.

    Raises:
        SourceError: there are no weights among them.
    """
    room = find_room(names)
    found: dict[str, str] = {}
    for folder in (TOKENIZER, room) if room else ("",):
        found |= {n.removeprefix(folder): n for n in names if n.startswith(folder)}
    return {name: found[name] for name in select(where, found)}


def pickled(names: Iterable[str]) -> list[str]:
    """Those of `names` that are weights in PyTorch's pickle format."""
    return [name for name in names if PICKLES.fullmatch(name)]


def check_index(folder: Path, names: Collection[str]) -> None:
    """Refuse an index that names a shard other than the files of `folder` listed in `names`.

    Raises:
        SourceError: a shard is missing, or lies outside the folder.
    """
    for index in (name for name in names if name.endswith(INDEX)):
        shards = read_json(folder / index).get("weight_map")
        if not isinstance(shards, dict):
            raise SourceError(
                f"{folder / index} has no weight_map of names to files; get it again."
            )
        for shard in sorted(set(map(str, shards.values())) - set(names)):
            raise SourceError(
                f"{folder / index} names the shard {shard}, which is not one of the weights beside "
                "it; get the complete folder from a source that you trust."
            )


def _goes_with(weights: re.Pattern[str], name: str) -> bool:
    if name.endswith(INDEX):
        return weights.fullmatch(name.removesuffix(INDEX)) is not None
    return name != RECORD and any(fnmatchcase(name, pattern) for pattern in COMPANIONS)
