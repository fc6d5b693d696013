"""Experts by tag: what `fetch.select` means now becomes experts named one by one."""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from flows.params import check, load
from flows.places import PLAIN, Places
from flows.sections import LABEL, Params, SourceParams
from poemerge.errors import SettingError, SourceError
from tasks.versions import SCHEME, is_ref

if TYPE_CHECKING:
    from tasks.library import Expert

logger = logging.getLogger(__name__)


def find_places(path: Path, overrides: Sequence[str] = ()) -> Places:
    """Read a parameter file, and say where the outputs of a run with it lie.

    The library is asked once: within a run, a selection has one meaning.

    Args:
        path: a YAML file.
        overrides: `a.b=c` settings that replace what the file says.

    Raises:
        SettingError: the file is refused, no expert has the tags, or one is of another base.
        SourceError: MLflow refused, or the base cannot be found.
    """
    params, plain = load(path, overrides), load(PLAIN)
    sources = {name: expert.source for name, expert in params.fetch.experts.items()}
    check_bases(params.fetch.base.source, sources)
    named = with_experts(params)
    if params.fetch.select:
        check(path, named)
    if plain.fetch == params.fetch:
        plain = plain.model_copy(update={"fetch": named.fetch})
    return Places(named, plain)


def with_experts(params: Params) -> Params:
    """`params` with the experts that it selects after those that it names."""
    fetch = params.fetch
    if fetch.select is None:
        return params
    given = {name: expert.source for name, expert in fetch.experts.items()}
    found = select(fetch.base.source, fetch.select, given)
    experts = fetch.experts | {n: SourceParams(source=s, sha256=None) for n, s in found.items()}
    chosen = fetch.model_copy(update={"experts": experts, "select": None})
    return params.model_copy(update={"fetch": chosen})


def check_bases(base: str, sources: Mapping[str, str]) -> None:
    """Refuse experts of the library that are of another base than this.

    Args:
        base: source of it.
        sources: name → source of experts; what does not come from the library passes.

    Raises:
        SettingError: naming the first.
        SourceError: the base cannot be found.
    """
    registered = [source for source in sources.values() if is_ref(source)]
    if not registered:
        return
    from tasks import library  # noqa: PLC0415 - MLflow, DVC and torch wait until they are needed
    from tasks.fetch import identify  # noqa: PLC0415

    found = []
    for source in registered:
        with suppress(SourceError):  # fetch will say so, or keep the copy that it has
            found.append(library.find(source))
    ours = identify(base)
    for expert in found:
        if expert is not None and expert.base_digest != ours.digest:
            raise _of_another_base(expert, base, "leave it out")


def _of_another_base(expert: "Expert", base: str, cure: str) -> SettingError:
    return SettingError(
        f"{expert.uri} is an expert of {expert.base}, not of {base}; {cure}, or take that base."
    )


def select(base: str, wanted: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Name → `models:/NAME/VERSION` of the experts that have all these tags, by their names.

    An expert is named after its task; after itself, where another has that name.

    Args:
        base: source of the base that they must be of.
        wanted: tag → value.
        given: name → source of experts that are there already; whatever version of a model is
            among them, it is not taken again.

    Raises:
        SettingError: no expert has the tags, or one is of another base.
        SourceError: MLflow refused, or the base cannot be found.
    """
    from tasks import library  # noqa: PLC0415 - MLflow, DVC and torch wait until they are needed
    from tasks.fetch import identify  # noqa: PLC0415

    taken = tuple(f"{source}/".replace("@", "/") for source in given.values())
    found = [
        expert
        for expert in library.select(wanted)
        if not any(source.startswith(f"{SCHEME}{expert.name}/") for source in taken)
    ]
    ours = identify(base)
    tasks = [*given, *(expert.task for expert in found)]
    named: dict[str, str] = {}
    for expert in found:
        if expert.base_digest != ours.digest:
            raise _of_another_base(expert, base, "select by a tag that it does not have")
        name = expert.task if tasks.count(expert.task) == 1 else expert.name
        if not re.fullmatch(LABEL, name):  # it becomes a folder's, and whoever tagged it chose it
            raise SettingError(f"{expert.uri} is called {name!r} in the library, which is no name.")
        if name in named or name in given:
            raise SettingError(
                f"{expert.uri} and another expert are both called {name}; give one of them a name "
                "of your own."
            )
        named[name] = expert.uri
    logger.info("selected: %s", ", ".join(f"{name} ({uri})" for name, uri in named.items()))
    return named
