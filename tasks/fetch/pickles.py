"""PyTorch's .bin weights, read without running the pickle and written as safetensors."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from poemerge.atomic import write_json
from poemerge.checkpoint import read_json
from poemerge.errors import SourceError
from poemerge.layout import INDEX
from tasks.fetch.layout import check_index, pickled

logger = logging.getLogger(__name__)


def settle(folder: Path, names: Collection[str]) -> None:
    """Make a folder of files that have arrived one that the core can read.

    Args:
        folder: what arrived; pickles in it are replaced by safetensors.
        names: of its files.

    Raises:
        SourceError: an index names another file, or a pickle is refused.
    """
    check_index(folder, names)
    bins = [folder / name for name in pickled(names)]
    convert(bins, folder)
    for leftover in [*bins, *folder.glob("*.bin.index.json")]:
        leftover.unlink()


def convert(files: Sequence[Path], folder: Path) -> None:
    """Write the tensors of `files` into `folder`, shard by shard, indexed if there are several.

    Args:
        files: `pytorch_model*.bin` or `adapter_model.bin`, sorted.
        folder: already holds config.json, which says whether the embeddings are tied.

    Raises:
        SourceError: a file is damaged, or holds anything but tensors.
    """
    tied = bool(read_json(folder / "config.json").get("tie_word_embeddings"))
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        tensors = _unshare(_load(file), tied=tied)
        shard = file.with_suffix(".safetensors").name.removeprefix("pytorch_")
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise anything
        raise SourceError(
            f"{file} was refused, for it is damaged or its pickle asks for more than tensors; get "
            "the model as safetensors, or convert it where you trust its author."
        ) from error
    if not isinstance(state, dict):
        raise SourceError(f"{file} holds no state dict; save `model.state_dict()` and fetch that.")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise SourceError(f"{name} in {file} is no dense tensor; save only the state dict.")
    return state


def _unshare(state: dict[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Give every tensor memory of its own, as safetensors asks.

    A second name of the very same memory is dropped where the config ties weights (the loader ties
    them again), and becomes a copy where it does not, for then nobody would restore it.
    """
    own: dict[str, Tensor] = {}
    storages, views = set(), set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        view = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tied and view in views:
            logger.info("%s is another name of a tied tensor and was left out", name)
            continue
        shared = storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes
        dense = tensor.detach().contiguous()
        own[name] = dense.clone() if shared and dense.data_ptr() == tensor.data_ptr() else dense
        storages.add(storage.data_ptr())
        views.add(view)
    return own
