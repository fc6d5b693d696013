"""Which tensor gets which rule. No architecture is known: shapes, dtypes and config decide."""

import re
from collections.abc import Mapping

from poemerge.checkpoint import Checkpoint
from poemerge.tensor_files import TensorInfo

MATRIX = "matrix"  # solved by a structured method
VOCABULARY = "vocabulary"  # solved on the feature side: tokens × tokens would not fit
AVERAGE = "average"  # under a structured method: vectors, and what has more than two axes
FORMULA = "formula"  # an elementwise method's own formula
COPY = "copy"  # the base's bytes: integers, empty tensors, what no expert touches
TIED = "tied"  # not stored: the config says it is the input embedding

MEANINGS: Mapping[str, str] = {
    MATRIX: "solved as a matrix",
    VOCABULARY: "solved on the feature side",
    AVERAGE: "averaged",
    FORMULA: "merged entry by entry",
    COPY: "copied from the base",
    TIED: "tied to the input embedding, not stored",
}

_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|shared|lm_head|embed_out)\.weight$"
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


def rule_for(
    info: TensorInfo, base: Checkpoint, *, structured: bool, sided: bool, touched: bool
) -> str:
    """The rule for one tensor.

    Args:
        info: its header.
        base: its checkpoint.
        structured: True if the method treats matrices as matrices.
        sided: True if it can be told to solve on the feature side; vocabularies are averaged else.
        touched: False if every expert leaves it alone.
    """
    if is_tied_head(info, base):
        return TIED
    if not touched or not info.is_float or 0 in info.shape:
        return COPY
    if not structured:
        return FORMULA
    if len(info.shape) != 2:
        return AVERAGE
    if is_vocabulary(info, base):
        return VOCABULARY if sided else AVERAGE
    return MATRIX


def is_vocabulary(info: TensorInfo, base: Checkpoint) -> bool:
    """True for an embedding or output head: one row a token."""
    if len(info.shape) != 2:
        return False
    return info.shape[0] == base.vocabulary or bool(_VOCABULARY.search(info.name))


def is_head(name: str) -> bool:
    """True for the name of an output head."""
    return bool(_HEAD.search(name))


def is_tied_head(info: TensorInfo, base: Checkpoint) -> bool:
    """True for a stored output head that the config ties to the input embedding.

    One that differs from the embedding is none, whatever the config says: transformers 5 states
    of every T5 that it is tied, and loads Flan-T5 with the head that is stored.
    """
    return base.ties_embeddings and is_head(info.name) and repeats_embedding(info, base)


def repeats_embedding(info: TensorInfo, checkpoint: Checkpoint) -> bool:
    """True for a stored output head that holds the same numbers as the input embedding."""
    return any(
        other.shape == info.shape and checkpoint.same(info, other)
        for other in checkpoint.tensors.values()
        if is_vocabulary(other, checkpoint) and not is_head(other.name)
    )
