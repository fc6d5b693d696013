"""What a checkpoint consists of, without its bytes: from a hub, or from a config.json alone."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from poemerge.errors import SourceError
from poemerge.ghosts import Layout, in_shards, write_ghost
from poemerge.layout import is_ready
from poemerge.remote.places import locate
from poemerge.remote.stand_ins import stand_in
from poemerge.tensor_files import DTYPES
from poemerge.writer import ShardWriter
from tasks.fetch.hub import ADDRESS, endpoint, explained
from tasks.fetch.layout import SAFETENSORS, select

HUB = "hf://"
CONFIGS = ("config.json", "adapter_config.json", "model.safetensors.index.json")


def open_headers(source: str, folder: Path) -> Path:
    """A folder that `plan_merge` can open.

    Args:
        source: a folder that is complete, taken as it is; `hf://org/name@revision` or the URL of
            an object storage's folder, of which the headers alone are downloaded; or a
            config.json, whose model nobody has to have made.
        folder: to make, of sparse files, where `source` is no folder.

    Raises:
        SourceError: it is none of these, or is refused.
        UnreachableError: the hub does not answer.
    """
    place = locate(source)
    if isinstance(place, str):
        return stand_in(place, folder)
    if is_ready(place):
        return place
    if source.startswith(HUB):
        return _of_hub(source.removeprefix(HUB), folder)
    if place.suffix == ".json" and place.is_file():
        return _of_config(place, folder)
    raise SourceError(
        f"{source} cannot be planned with; give a checkpoint or adapter folder, a config.json, "
        "hf://org/name@revision, or s3://bucket/folder."
    )


def _of_hub(address: str, folder: Path) -> Path:
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise SourceError(f"{HUB}{address} is no model of a hub; write hf://org/name@revision.")
    repo, api = parts["repo"], HfApi(endpoint=endpoint())
    with explained(address):
        info = api.model_info(repo, revision=parts["revision"] or "main")
        names = select(f"{HUB}{address}", (each.rfilename for each in info.siblings or ()))
        folder.mkdir()
        for name in names:
            if name in CONFIGS:
                hf_hub_download(
                    repo, name, revision=info.sha, local_dir=folder, endpoint=endpoint()
                )
            elif SAFETENSORS.fullmatch(name):
                found = api.parse_safetensors_file_metadata(repo, name, revision=info.sha)
                ShardWriter(folder / name, _layout(f"{HUB}{address}", found.tensors)).close()
    if not is_ready(folder):
        message = f"{HUB}{address} has pickles alone, which have no headers; fetch it to plan."
        raise SourceError(message)
    return folder


def _layout(where: str, tensors: dict[str, Any]) -> Layout:
    for name, info in tensors.items():
        if info.dtype not in DTYPES:
            raise SourceError(f"{name} of {where} is stored as {info.dtype}, a quantised format.")
    return {name: (tuple(info.shape), DTYPES[info.dtype]) for name, info in tensors.items()}


def _of_config(path: Path, folder: Path) -> Path:
    """The model of a config, on no device at all."""
    import torch  # noqa: PLC0415 - seconds, as transformers
    import transformers  # noqa: PLC0415

    try:
        stated = json.loads(path.read_text("utf-8"))
        config = transformers.AutoConfig.for_model(**stated)
        with torch.device("meta"):
            model = _kind(stated)(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"{path} describes no model that transformers knows ({error})."
        raise SourceError(message) from error
    dtype = config.dtype or torch.float32
    known: dict[int, str] = {}  # a tied head is the embedding, and is not stored
    layout: dict[str, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if known.setdefault(id(tensor), name) == name:
            layout[name] = (
                tuple(tensor.shape),
                dtype if tensor.is_floating_point() else tensor.dtype,
            )
    return write_ghost(folder, in_shards(layout), stated)


def _kind(config: dict[str, Any]) -> Any:
    """The class that the config names, if it is one of a model, or else a causal language model."""
    import transformers  # noqa: PLC0415 - as above

    (name, *_) = config.get("architectures") or [""]
    found = getattr(transformers, str(name), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return transformers.AutoModelForCausalLM.from_config
