"""Sentences on what does not match: nothing is passed over in silence."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from poemerge.checkpoint import Checkpoint
from poemerge.curvature import Curvature
from poemerge.errors import CheckpointError, SettingError
from poemerge.experts import Expert
from poemerge.merging.groups import Group
from poemerge.names import listed
from poemerge.rules import AVERAGE, COPY, FORMULA, MATRIX, TIED, VOCABULARY, is_vocabulary
from poemerge.settings import Settings


def on_experts(
    base: Checkpoint, experts: Sequence[Expert], groups: Sequence[Group]
) -> Iterator[str]:
    """What experts lack, and what they have that finds no place.

    Raises:
        CheckpointError: no expert changes anything.
    """
    for index, expert in enumerate(experts):
        yield from expert.notes
        if missing := _missing(base, index, expert, groups):
            yield f"Expert {expert.name!r} lacks {listed(missing)}; the others decide there."
        if expert.extra:
            yield (
                f"Expert {expert.name!r} has {listed(expert.extra)}, which the base lacks or ties; "
                "left out."
            )
    if not any(group.voters for group in groups):
        raise CheckpointError(
            "No expert changes any tensor of the base; there is nothing to merge."
        )


def _missing(base: Checkpoint, index: int, expert: Expert, groups: Sequence[Group]) -> list[str]:
    return [
        info.name
        for group in groups
        for info in group.tensors
        if group.rule not in {COPY, TIED}
        and index not in group.voters
        and (expert.tokens.kept or not is_vocabulary(info, base))
    ]


def on_base(base: Checkpoint) -> Iterator[str]:
    """What whoever loads the merge should know."""
    if not any(base.folder.glob("tokenizer*")):
        yield f"The base ({base.folder.name}) has no tokenizer; the merge has none either."
    if "auto_map" in base.config:
        yield (
            "The base's config.json asks for Python code of its own (auto_map); poemerge never "
            "runs any, and whoever loads the merge with it must trust that code."
        )


def on_settings(settings: Settings, groups: Sequence[Group]) -> Iterator[str]:
    """Patterns that fit no tensor."""
    names = [info.name for group in groups for info in group.tensors]
    for setting, pattern in _patterns(settings):
        if not any(fnmatchcase(name, pattern) for name in names):
            yield (
                f"The pattern {pattern!r} in {setting} fits no tensor; use names of the base's "
                "tensors."
            )


def _patterns(settings: Settings) -> Iterator[tuple[str, str]]:
    """(setting, name pattern) of all patterns that were given."""
    for expert, say in settings.weights.items():
        if isinstance(say, Mapping):
            yield from ((f"weights of {expert!r}", pattern) for pattern in say)
    yield from (("fused", pattern) for pattern in getattr(settings, "fused", {}))


def on_curvature(curvature: Curvature, groups: Sequence[Group]) -> Iterator[str]:
    """Tensors that are averaged for want of curvature.

    Raises:
        SettingError: all of them.
    """
    if not curvature.needed:
        return
    if not any(group.rule in {FORMULA, MATRIX, VOCABULARY} for group in groups):
        raise SettingError(
            "The curvature files hold no tensor that every expert changes; give files whose "
            "names are the base's."
        )
    if rest := [info.name for g in groups if g.rule == AVERAGE for info in g.tensors]:
        yield f"No curvature is given for {listed(rest)}; averaged."
