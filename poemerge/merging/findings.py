"""What a look at the experts' values means for a merge, in sentences."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import inf, sqrt
from pathlib import Path
from statistics import median
from typing import Any

import torch

from poemerge.checkpoint import Checkpoint
from poemerge.device import STORED
from poemerge.errors import CheckpointError
from poemerge.merging.glance import Impression
from poemerge.merging.terms import Terms
from poemerge.names import listed
from poemerge.token_rows import REFUSE

GAP = 100.0  # between an expert's norm and the median of the others'; trained ones are within 10
ROUNDING = 0.5  # part of an update that may be rounding before it is worth a word


def findings(
    base: Checkpoint, seen: Sequence[Impression], terms: Terms, method: str, *, robust: bool
) -> list[str]:
    """Sentences on what was seen, each once.

    Args:
        base: of the experts.
        seen: one an expert.
        terms: of the merge.
        method: its name.
        robust: True if the method leaves far-off experts aside.

    Raises:
        CheckpointError: an expert is none of this base, or changes nothing.
    """
    notes: list[str] = []
    for one in seen:
        notes += _foreign(one, terms)
        notes += _unchanged(one)
        notes += _integers(one)
    notes += _twins(seen)
    notes += _gap(seen, method, robust=robust)
    notes += _dtypes(base, seen, terms)
    return notes


def changes_nothing(name: str, folder: Path) -> CheckpointError:
    """The refusal of an expert that is the base."""
    return CheckpointError(
        f"Expert {name!r} ({folder}) changes nothing, all its updates are zero; leave it out or "
        "give the right folder."
    )


def _foreign(seen: Impression, terms: Terms) -> Iterator[str]:
    where = f"Expert {seen.expert.name!r} ({seen.expert.folder})"
    if seen.overlap.is_apart:
        left = f"{seen.overlap.share:.0%} of the base's weights"
        sentence = (
            f"{where} was not fine-tuned from this base: {left} are left in it, where a fine-tune "
            "keeps nearly all"
        )
        if terms.foreign == REFUSE:
            raise CheckpointError(
                f"{sentence}; give the base that it was made from, or choose foreign warn to go on."
            )
        yield f"{sentence}; the merge is no better than it."
        return
    if seen.shuffled and terms.foreign == REFUSE:
        raise CheckpointError(
            f"{where} has the base's rows of {listed(seen.shuffled)} in another order, of which no "
            "tokenizer tells; put its tokenizer into its folder and choose vocabulary pad, or "
            "choose foreign warn to go on."
        )
    if seen.apart:
        yield (
            f"{where} has nothing of the base left in {listed(seen.apart)}; such weights were "
            "trained anew or are in another order, and are no task vector."
        )


def _unchanged(seen: Impression) -> Iterator[str]:
    if seen.square or not seen.values:
        return
    if seen.complete:
        raise changes_nothing(seen.expert.name, seen.expert.folder)
    yield (
        f"Expert {seen.expert.name!r} ({seen.expert.folder}) equals the base in all "
        f"{seen.values} values that were looked at; a merge refuses it if it does everywhere."
    )


def _integers(seen: Impression) -> Iterator[str]:
    if seen.integers:
        yield (
            f"Expert {seen.expert.name!r} has other integers than the base in "
            f"{listed(seen.integers)}; these are never merged, and the base's are kept."
        )


def _twins(seen: Sequence[Impression]) -> Iterator[str]:
    first: dict[str, str] = {}
    for one in seen:
        name = one.expert.name
        if one.square and one.digest in first:
            yield (
                f"Experts {first[one.digest]!r} and {name!r} are equal in all values that were "
                "looked at and count twice; leave one out if that is not meant."
            )
        first.setdefault(one.digest, name)


def _gap(seen: Sequence[Impression], method: str, *, robust: bool) -> Iterator[str]:
    norms = [sqrt(one.square) for one in seen]
    for index, (one, norm) in enumerate(zip(seen, norms, strict=True)):
        others = [n for n in norms[:index] + norms[index + 1 :] if n]
        if not others or norm < GAP * median(others):
            continue
        effect = (
            f"the heavy tail of {method} leaves it aside, but in vectors, which are averaged"
            if robust
            else f"under {method} it outweighs them"
        )
        yield (
            f"Expert {one.expert.name!r} moves the base {norm / median(others):.0f} times as far "
            f"as the others do, and {effect}; see that its base and its alpha are right, or lower "
            "its say in `weights`."
        )


def _dtypes(base: Checkpoint, seen: Sequence[Impression], terms: Terms) -> Iterator[str]:
    ours = {info.dtype for info in base.tensors.values() if info.is_float}
    stored = {STORED[terms.dtype]} if terms.dtype in STORED else ours
    differing: defaultdict[str, list[str]] = defaultdict(list)
    for one in seen:
        if one.dtypes - ours:
            differing[_names(one.dtypes)].append(repr(one.expert.name))
    for dtypes, experts in differing.items():
        yield (
            f"The base is stored as {_names(ours)} and {listed(experts)} as {dtypes}; the merge is "
            f"written as {_names(stored)}."
        )
    for one in seen:
        yield from _precision(one, stored)


def _precision(one: Impression, stored: set[torch.dtype]) -> Iterator[str]:
    if not one.square:
        return
    part, lost = sqrt(one.rounding / one.square), sqrt(one.lost / one.square)
    name = one.expert.name
    if ROUNDING < part < inf:
        yield (
            f"Expert {name!r} is stored as {_names(one.dtypes)}, and rounding the base to that is "
            f"{part:.0%} of what it changes; give it, or the base, in the dtype it was trained in."
        )
    if ROUNDING < lost < inf:  # what does not fit at all, the merge refuses
        yield (
            f"Rounding to {_names(stored)} is {lost:.0%} of what expert {name!r} changes; choose a "
            "wider `dtype` for the merge."
        )


def _names(dtypes: Any) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
