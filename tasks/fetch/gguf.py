"""A .gguf file: its weights are dequantised, its tokenizer and chat template taken over.

Dequantised is not restored: what quantisation rounded away stays lost.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from poemerge.errors import SettingError, SourceError
from poemerge.hashing import sha256
from tasks.fetch.gguf_header import check_header
from tasks.fetch.origin import Origin

DTYPES = ("bfloat16", "float16", "float32")
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# Pre-tokenizers that take every digit alone, as llama.cpp groups them; transformers' converter
# knows them not, and would split runs of white space before a number differently.
SINGLE_DIGITS = {
    "codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder",
}  # fmt: skip

logger = logging.getLogger(__name__)


def open_file(path: Path, dtype: str) -> Origin:
    """Hash the file at `path`.

    Args:
        path: a file in GGUF format.
        dtype: in which the dequantised weights are stored.

    Raises:
        SettingError: `dtype` is none that weights are stored in.
    """
    if dtype not in DTYPES:
        raise SettingError(f"dtype {dtype} is unknown to fetch; choose one of {', '.join(DTYPES)}.")
    content = sha256(path)
    return Origin(
        {path.name: content},
        sha256=content,
        revision=content,
        write=partial(_convert, path, dtype),
        settings={"dtype": dtype},
        tools=("gguf", "tokenizers", "transformers"),
    )


def _convert(path: Path, dtype: str, folder: Path) -> None:
    logger.info("dequantising %s to %s", path.name, dtype)
    with _alone(path) as home:
        try:
            check_header(path)
            model = _load_model(home, path, dtype)
            tokenizer = _load_tokenizer(home, path.name)
        except SourceError:
            raise
        except Exception as error:  # a damaged file makes the parsers raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise SourceError(
                f"{path} cannot be read as GGUF ({reason}); get the file again, or give the model "
                "as safetensors."
            ) from error
    model.save_pretrained(folder)
    if tokenizer is None:
        logger.warning("%s holds no tokenizer, so the folder made of it has none either", path)
    else:
        tokenizer.save_pretrained(folder)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A folder that holds nothing but `path`: transformers would read what lies beside it."""
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / path.name).symlink_to(path.resolve())
        yield Path(home)


def _load_model(home: Path, path: Path, dtype: str) -> Any:
    """The model with dense weights; the one that transformers loads refuses to be saved."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - its import takes 2 s

    loaded, found = AutoModelForCausalLM.from_pretrained(
        home, gguf_file=path.name, dtype=getattr(torch, dtype), output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[problem]:
            names = ", ".join(sorted(map(str, found[problem]))[:3])
            raise SourceError(
                f"{path} does not fit its own architecture ({problem.replace('_', ' ')}: {names}); "
                "get the file again."
            )
    del loaded.config.quantization_config
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(loaded.config)
    dense.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    dense.tie_weights()
    dense.generation_config = loaded.generation_config
    return dense


def _load_tokenizer(home: Path, name: str) -> Any:
    """The tokenizer with the special tokens that the file names; None if it names no tokens.

    transformers 5.17 converts vocabulary and merges, but mistakes `bos` for `eos` (Llama) and drops
    `pad`; the backend is therefore wrapped anew.
    """
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415
    from transformers.integrations.gguf import read_gguf_metadata  # noqa: PLC0415

    facts, _ = read_gguf_metadata(str(home / name))
    if "tokenizer.ggml.tokens" not in facts:
        return None
    backend = PreTrainedTokenizerFast.from_pretrained(home, gguf_file=name).backend_tokenizer
    if facts.get("tokenizer.ggml.pre") in SINGLE_DIGITS:
        backend.pre_tokenizer = _single_digits(backend.pre_tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=facts.get("tokenizer.chat_template"),
        model_max_length=facts[f"{facts['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **_special_tokens(backend, facts),
    )


def _single_digits(rest: Any) -> Any:
    from tokenizers.pre_tokenizers import Digits, Sequence  # noqa: PLC0415

    return Sequence([Digits(individual_digits=True), rest])


def _special_tokens(backend: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    ids = {role: facts.get(f"tokenizer.ggml.{key}_token_id") for role, key in ROLES.items()}
    tokens = {f"{role}_token": backend.id_to_token(i) for role, i in ids.items() if i is not None}
    adds = {f"add_{role}_token": facts.get(f"tokenizer.ggml.add_{role}_token") for role in ROLES}
    return tokens | {key: value for key, value in adds.items() if value is not None}
