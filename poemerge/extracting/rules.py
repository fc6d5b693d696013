"""What becomes of each tensor that a full fine-tune moved, when an adapter is made of it.

PEFT holds three things: factors for the weight of a linear layer or an embedding, whole modules
(`modules_to_save`), and nothing else. So a vector is kept only with its whole module, and a bias
whose weight is in factors cannot be kept at all. No architecture is known: shapes, names and config
decide.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from poemerge.checkpoint import Checkpoint
from poemerge.errors import SettingError
from poemerge.rules import is_head, is_vocabulary
from poemerge.tensor_files import TensorInfo

FACTORS = "factors"
WHOLE = "kept whole"
DROPPED = "dropped"
UNTOUCHED = "untouched"  # the base's value stands
VECTORS = ("keep", "drop")
VOCABULARY = ("factors", "drop", "keep")

BIAS = "its layer's weight is in factors, beside which plain LoRA holds no bias"
NESTED = "its module holds other modules, and PEFT keeps only whole modules"
ROOTLESS = "it belongs to no module, and PEFT keeps only whole modules"
SAVED_WITH = "stored with its module, as the base has it"

# A lookup by row, which PEFT names and turns apart; other matrices are linear layers.
_TABLE = re.compile(
    r"(^|\.)((\w+_)?embed(dings?)?|embed_(tokens|positions|in)\w*|wte|wpe|shared|"
    r"relative_attention_bias)\.weight$"
)
# Models whose layers hold their weights (in, out), and the names of those layers.
_TURNED_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_TURNED = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


@dataclass(frozen=True)
class Policy:
    """What the user wants done with all that is no ordinary matrix.

    Raises:
        SettingError: a choice is unknown.
    """

    vectors: str = "keep"
    vocabulary: str = "factors"

    def __post_init__(self) -> None:
        _check("vectors", self.vectors, VECTORS)
        _check("vocabulary", self.vocabulary, VOCABULARY)

    def verdict(self, info: TensorInfo, base: Checkpoint) -> tuple[str, str]:
        """What to do with a moved tensor, and why where it is dropped."""
        if is_vocabulary(info, base):
            wish, setting = self.vocabulary, "vocabulary"
            fits = is_table(info.name) or is_plain_head(info, base)
        else:
            wish, setting = self.vectors, "vectors"
            fits = is_layer(info, base)
            if fits:
                return FACTORS, ""
        if wish == "drop":
            return DROPPED, f"{setting}=drop"
        return (FACTORS if wish == "factors" and fits else WHOLE), ""


def is_layer(info: TensorInfo, base: Checkpoint) -> bool:
    """True for the weight of a linear layer.

    Tables other than the vocabulary (positions, token types) are small, and their modules are often
    more than a lookup, so that they count as vectors. Likewise the few linear layers of a model
    whose other layers are transposed, since an adapter states that once for all.
    """
    if len(info.shape) != 2 or not info.name.endswith(".weight") or is_table(info.name):
        return False
    return bool(_TURNED.search(info.name)) or not is_transposed(base)


def is_plain_head(info: TensorInfo, base: Checkpoint) -> bool:
    """True for an output head that factors can be laid out for: a linear layer, not transposed."""
    return info.name.endswith(".weight") and not is_transposed(base)


def is_table(name: str) -> bool:
    """True for the name of an embedding."""
    return bool(_TABLE.search(name)) and not is_head(name)


def is_transposed(base: Checkpoint) -> bool:
    """True if linear layers are stored (in, out), which PEFT calls fan_in_fan_out."""
    return base.config.get("model_type") in _TURNED_MODELS


def obstacle(name: str, base: Checkpoint, done: Mapping[str, str]) -> str:
    """Why the module of tensor `name` cannot be kept whole; empty if it can.

    Args:
        name: a tensor that is to be kept.
        base: its checkpoint.
        done: what was decided on every tensor so far.
    """
    module = name.rpartition(".")[0]
    if not module:
        return ROOTLESS
    siblings = [other for other in base.tensors if other.startswith(module + ".")]
    if any("." in other.removeprefix(module + ".") for other in siblings):
        return NESTED
    return BIAS if any(done[other] == FACTORS for other in siblings) else ""


def module_of(name: str, base: Checkpoint) -> tuple[str, ...]:
    """All tensors of the module that holds tensor `name`, itself included."""
    module = name.rpartition(".")[0]
    return tuple(other for other in base.tensors if other.rpartition(".")[0] == module)


def peft_task(base: Checkpoint) -> str | None:
    """What PEFT calls a model of this config; None where it wraps it as it is."""
    if base.config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    architectures = base.config.get("architectures") or ["ForCausalLM"]
    return "CAUSAL_LM" if str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel")) else None


def _check(setting: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SettingError(f"{setting} is {value!r}; choose {', '.join(known)}.")
