"""Which matrices fall into pieces by their names: fused projections, attention heads."""

import re
from fnmatch import fnmatchcase

from poemerge.checkpoint import Checkpoint
from poemerge.errors import SettingError
from poemerge.method import Cut
from poemerge.poe.settings import ProductSettings
from poemerge.settings import Settings
from poemerge.tensor_files import TensorInfo

# Names of attention projections whose outputs, or whose inputs, are the heads' features.
_WRITES_HEADS = re.compile(r"(^|\.)(q|k|v|query|key|value)(_proj)?\.weight$")
_READS_HEADS = re.compile(r"(^|\.)(o_proj|out_proj|attention\.output\.dense)\.weight$")


def check_cuts(settings: Settings) -> None:
    """Refuse pieces by name where matrices are not solved as matrices.

    Raises:
        SettingError: naming the setting.
    """
    if not isinstance(settings, ProductSettings) or settings.is_structured:
        return
    if settings.fused or settings.granularity == "head":
        name = "fused" if settings.fused else "granularity head"
        raise SettingError(
            f"{name} has no meaning with precision {settings.precision}, which takes every entry "
            "by itself; choose precision gram or activation, or leave it out."
        )


def cut_for(info: TensorInfo, base: Checkpoint, settings: Settings) -> Cut | None:
    """The pieces of a matrix that its name asks for, or None.

    Args:
        info: its header.
        base: its checkpoint, whose config knows the size of a head.
        settings: of the method.

    Raises:
        SettingError: sizes do not add up, or the config does not say how large a head is.
    """
    if not isinstance(settings, ProductSettings):
        return None
    for pattern, sizes in settings.fused.items():
        if fnmatchcase(info.name, pattern):
            return _fused(info, sizes)
    return _heads(info, base) if settings.granularity == "head" else None


def _heads(info: TensorInfo, base: Checkpoint) -> Cut | None:
    if _WRITES_HEADS.search(info.name):
        return Cut.into_blocks("rows", info.shape[0], _head_size(base))
    if _READS_HEADS.search(info.name):
        return Cut.into_blocks("columns", info.shape[1], _head_size(base))
    return None


def _fused(info: TensorInfo, sizes: tuple[int, ...]) -> Cut:
    if sum(sizes) != info.shape[0]:
        raise SettingError(
            f"fused gives {info.name} {' + '.join(map(str, sizes))} rows, but it has "
            f"{info.shape[0]}; give sizes that add up."
        )
    return Cut("rows", sizes, apart=True)


def _head_size(base: Checkpoint) -> int:
    config = base.config.get("text_config", base.config)
    size = config.get("head_dim")
    if not size and config.get("num_attention_heads") and config.get("hidden_size"):
        size = config["hidden_size"] // config["num_attention_heads"]
    if not isinstance(size, int) or size < 1:
        raise SettingError(
            f"{base.folder / 'config.json'} says nothing of a head's size (head_dim, or "
            "hidden_size and num_attention_heads); choose granularity rows."
        )
    return size
