"""A model checkpoint: a folder of safetensors, single or sharded, and its config."""

import reprlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from poemerge import documents
from poemerge.errors import CheckpointError, SourceError
from poemerge.layout import INDEX, SINGLE
from poemerge.tensor_files import TensorFiles

# What is asked of a config, and what it must be where it is there.
CONFIG = {
    "_name_or_path": str,
    "architectures": list,
    "is_encoder_decoder": bool,
    "model_type": str,
    "text_config": dict,
    "tie_word_embeddings": bool,
    "vocab_size": int,
}


class Checkpoint(TensorFiles):
    """A model checkpoint: weights and, where present, its config.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Raises:
        SourceError: there is no such folder, or no weights in it.
        CheckpointError: a file is truncated, corrupt or quantised, or an index leaves the folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise SourceError(f"{folder} is not a folder; give a checkpoint or an adapter folder.")
        self.config = read_json(folder / "config.json")
        if "quantization_config" in self.config:
            raise CheckpointError(
                f"{folder} is quantised (quantization_config in config.json); merge the "
                "unquantised checkpoint, or a .gguf file, which is dequantised on request."
            )
        _check_config(folder / "config.json", self.config)
        super().__init__(folder, weight_files(folder))
        self._check_index()

    @cached_property
    def index(self) -> Mapping[str, str]:
        """Tensor name → shard; empty for a single file."""
        return _weight_map(self.folder / INDEX) if documents.is_there(self.folder / INDEX) else {}

    @property
    def ties_embeddings(self) -> bool:
        """True if the config says that the output head is the input embedding."""
        return bool(self._text.get("tie_word_embeddings", self.config.get("tie_word_embeddings")))

    @property
    def vocabulary(self) -> int | None:
        """Rows of the vocabulary matrices as the config states them."""
        return self._text.get("vocab_size")

    @property
    def _text(self) -> Mapping[str, Any]:
        """The part of the config that is about text, where the model has others."""
        return self.config.get("text_config") or self.config

    def _check_index(self) -> None:
        for name, file in self.index.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.folder / INDEX} promises {name} in {file}, which does not hold it; "
                    "fetch the checkpoint again."
                )


def weight_files(folder: Path) -> tuple[str, ...]:
    """Names of the safetensors files that make up the checkpoint in `folder`, sorted."""
    if documents.is_there(folder / INDEX):
        files = sorted(set(_weight_map(folder / INDEX).values()))
        for file in files:
            _check_inside(folder, file)
        return tuple(files)
    if (folder / SINGLE).exists():
        return (SINGLE,)
    raise SourceError(
        f"{folder} holds neither {SINGLE} nor {INDEX} nor adapter_config.json; "
        "`poemerge merge` converts .bin and .gguf files, other formats must be converted first."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is absent.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    if not documents.is_there(path):
        return {}
    try:
        value = documents.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is unreadable ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object; fetch it again.")
    return value


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """See that what is asked of a config later on is of the type that transformers gives it."""
    for name, kind in CONFIG.items():
        value = config.get(name)
        if value is not None and type(value) is not kind:
            raise CheckpointError(
                f"{path} has {name}={reprlib.repr(value)}, where transformers has a "
                f"{kind.__name__}; fetch it again."
            )
    if text := config.get("text_config"):
        _check_config(path, text)


def _weight_map(index: Path) -> Mapping[str, str]:
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(f, str) for f in entries.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files; fetch it again.")
    return entries


def _check_inside(folder: Path, file: str) -> None:
    if Path(file).name != file:
        raise CheckpointError(
            f"{folder / INDEX} names {file}, which is outside its folder; this index is not to be "
            "trusted."
        )
    try:
        documents.check_file(folder / file)
    except (OSError, ValueError) as error:
        message = f"{folder / file} is missing (named in {INDEX}); fetch it again."
        raise CheckpointError(message) from error
