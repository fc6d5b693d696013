"""One transformers model for all candidates: lm-eval's view of it, and how weights get into it."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from poemerge.checkpoint import read_json
from poemerge.device import STORED, pick_device
from poemerge.errors import CheckpointError, SettingError
from poemerge.progress import Progress, silent

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

Request = tuple[Any, list[int], list[int]]  # the texts, tokens of context and of continuation


class Scorer(HFLM):  # type: ignore[misc]
    """lm-eval's transformers model, which computes only those logits that are read.

    lm-eval has all logits of a batch computed and normalised, (batch, length, vocabulary), to read
    those at the continuations. Batches of requests of like length keep the last few positions
    instead, which are the same numbers: a quarter of the time less for one-token answers. Of an
    encoder-decoder it computes what lm-eval does, whose decoder sees the continuation alone.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        # lm-eval would tie what the loader left untied: the head of Flan-T5, whose config in
        # transformers says that every T5 is tied.
        model.tie_weights = lambda *_, **__: None
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self._selects = (
            self.backend == "causal" and "logits_to_keep" in signature(model.forward).parameters
        )
        self._last = 0  # positions to keep, of the longest request; 0 for all
        self._holds = ""  # whose weights are in the model
        self.progress: Progress = silent  # told of requests, as far as they are of one kind

    def fill(
        self, weights: Callable[[], Iterable[tuple[str, Tensor]]], who: str, where: str
    ) -> None:
        """Put weights into the model, unless they are there from the time before.

        Args:
            weights: gives name → tensor, as stored.
            who: says which weights they are, to the byte.
            where: whose they are, for the message.
        """
        if self._holds != who:
            self._holds = ""  # if it fails, the model is a mixture
            put_weights(self.model, weights(), where)
            self._holds = who

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = True,  # noqa: ARG002
        override_bs: int | None = None,
    ) -> list[Any]:
        """As HFLM, batch by batch; requests that differ in the last token share a forward pass."""
        if self.backend == "seq2seq":
            return super()._loglikelihood_tokens(requests, True, override_bs)
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            rows.setdefault((*context, *continuation[:-1]), []).append(index)
        order = sorted(rows, key=lambda tokens: (-len(tokens), tokens))
        answers: list[Any] = [None] * len(requests)
        size = override_bs or self.batch_size
        for start in range(0, len(order), size):
            indices = [index for tokens in order[start : start + size] for index in rows[tokens]]
            batch = [requests[index] for index in indices]
            self._last = self._positions(batch)
            found = super()._loglikelihood_tokens(batch, disable_tqdm=True)
            for index, answer in zip(indices, found, strict=True):
                answers[index] = answer
            self.progress(start + size, max(start + size, len(order)))
        return answers

    def _positions(self, batch: list[Request]) -> int:
        """How many positions from the end, of the longest request, hold all continuations."""
        fed = [min(len(c) + len(k) - 1, self.max_length) for _, c, k in batch]
        longest = max(fed)
        return max(longest - length + len(k) for length, (_, _, k) in zip(fed, batch, strict=True))

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Logits of the last positions; HFLM counts from the end, so it finds what it reads."""
        if not self._selects:
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            return self.model(inps, logits_to_keep=self._last).logits


@lru_cache(maxsize=1)
def load_scorer(base: Path, _digest: str, dtype: str, device: str, batch_size: int) -> Scorer:
    """The base's model and tokenizer under lm-eval, kept as long as nothing of it changes.

    Args:
        base: model folder.
        _digest: of its files, so that changed ones are loaded again.
        dtype: in which it computes.
        device: `auto`, `cpu` or `cuda[:i]`.
        batch_size: items per forward pass.

    Raises:
        SettingError: the dtype or device is unknown.
        CheckpointError: transformers cannot load the model, or there is no tokenizer.
    """
    if dtype not in STORED:
        raise SettingError(f"dtype is {dtype!r}; choose one of {', '.join(STORED)}.")
    where = pick_device(device)
    if not any((base / name).exists() for name in VOCABULARIES):
        raise CheckpointError(
            f"{base} has no tokenizer ({', '.join(VOCABULARIES)}); add the files of the model that "
            "it was made from, or evaluate elsewhere."
        )
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **local)
        two_sided = AutoConfig.from_pretrained(base, **local).is_encoder_decoder
        kind = AutoModelForSeq2SeqLM if two_sided else AutoModelForCausalLM
        model = kind.from_pretrained(base, dtype=STORED[dtype], **local)
    except Exception as error:  # transformers raises whatever its parts raise
        if "auto_map" in read_json(base / "config.json"):
            raise CheckpointError(
                f"{base} asks for Python code of its own (auto_map in config.json), which is never "
                "run here; evaluate it where you trust that code."
            ) from error
        raise CheckpointError(
            f"transformers cannot load {base} ({_first_line(error)}); repair the folder, or update "
            "transformers."
        ) from error
    model.generation_config.max_new_tokens = None  # it would overrule the task's own limit
    return Scorer(model.to(where), tokenizer, batch_size)


def put_weights(model: torch.nn.Module, weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Copy weights into the model's own tensors; tied ones are filled by either of their names.

    Tensors that the model has no place for are left out, as transformers does.

    Args:
        model: any dtype, on any device.
        weights: name → tensor, as stored.
        where: whose they are, for the message.

    Raises:
        CheckpointError: a parameter got no weight, or one of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = parameters | dict(model.named_buffers())
    filled = set()
    for name, weight in weights:
        place = places.get(name)
        if place is None:
            continue
        if place.shape != weight.shape:
            raise CheckpointError(
                f"{name} of {where} has shape {tuple(weight.shape)} where the base's config has "
                f"{tuple(place.shape)}; it belongs to another base."
            )
        place.data.copy_(weight)
        filled.add(id(place))
    empty = [name for name, place in parameters.items() if id(place) not in filled]
    if empty:
        raise CheckpointError(
            f"{where} has no {empty[0]}"
            + (f" (and {len(empty) - 1} more)" * (len(empty) > 1))
            + "; it does not fit the base's config.json."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
