"""Is there anything to do? What a run would be made from, against what the last one was made from.

Sources as they resolve now, the parameters of the stages, the code, and the data of the evaluation:
where none of them moved since the last complete run, there is nothing to do (decision 0007).
"""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import tasks
from flows import steps
from flows.places import Places
from flows.sections import Params
from poemerge.hashing import digest, sha256
from poemerge.lineage import core_code
from tasks.evaluate import TOOLS, task_digests
from tasks.fetch import UnreachableError, fetched, resolve
from tasks.merge import curvature_hashes
from tasks.register.last import Last, keep, last
from tasks.tracking import flat

AT_ONCE = 8  # sources that are asked for side by side
HASH = re.compile(r"[0-9a-f]{40,}")
SHORT = 12  # characters of a hash that people are shown


class Change(NamedTuple):
    """Something that is not what it was; `was` is empty where it is new, `now` where it is gone."""

    what: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: {self.was or 'new'} → {self.now or 'gone'}"


@dataclass(frozen=True)
class Inputs:
    """All that decides what a run makes.

    Attributes:
        sources: name → immutable revision.
        params: the sections of the stages.
        code: what computes → its hash or version.
        data: whose items, or whose curvature → digest of the files.
    """

    sources: Mapping[str, str]
    params: Mapping[str, Any]
    code: Mapping[str, str]
    data: Mapping[str, str]

    @property
    def key(self) -> str:
        """One sha256 for all of it: with the same key there is nothing to do."""
        return digest(asdict(self))


@dataclass(frozen=True)
class Standing:
    """How a run stands to the last complete one.

    Attributes:
        last: what that one registered; None where there was none.
        moved: what is different now.
        is_current: there is nothing to do.
    """

    last: Last | None = None
    moved: tuple[Change, ...] = ()
    is_current: bool = False

    def __str__(self) -> str:
        if self.last is None:
            return "no complete run has registered anything yet"
        if self.is_current:
            return f"up to date: nothing moved since {self.last.title}; --force runs all the same."
        return f"since {self.last.title}, moved: " + "; ".join(map(str, self.moved))


def look(places: Places) -> Standing:
    """Compare what the run would be made from with what the last one was made from.

    Nothing is downloaded. A run without tasks to score registers nothing, so it has always to be
    done; so has one with a source that does not answer and was never fetched.

    Raises:
        SourceError: a source is missing or refused, or MLflow is.
    """
    before = last(places.params.register_.name) if places.params.evaluate.tasks else None
    if before is None:
        return Standing()
    try:
        now = _inputs(places.params, _resolved(places))
    except UnreachableError as error:
        return Standing(before, (Change("a source", "as fetched", str(error)),))
    if now.key != before.key:
        return Standing(before, tuple(_moved(Inputs(**before.inputs), now)))
    if not before.exists():
        return Standing(before, (Change("the bytes of that version", before.uri, ""),))
    return Standing(before, is_current=True)


def conclude(places: Places) -> None:
    """Keep with the registered version what the run was made from; the last act of a run.

    The revisions are those that were fetched, whatever the sources have become since.
    """
    if places.params.evaluate.tasks:
        folders = {"base": places.base} | places.experts
        now = _inputs(places.params, {name: fetched(out) for name, out in folders.items()})
        keep(places.register, now.key, asdict(now))


def _inputs(params: Params, sources: Mapping[str, str]) -> Inputs:
    asked = params.evaluate
    items = task_digests(asked.tasks, asked.include, asked.trust)
    data = {f"items of {task}": content for task, content in items.items()}
    for settings in params.merge.methods.values():
        data |= curvature_hashes(settings)
    return Inputs(sources, params.sections, _code(), data)


def _resolved(places: Places) -> dict[str, str]:
    asked = [step.arguments for step in steps.steps("fetch", places)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = {
            a["name"]: pool.submit(
                copy_context().run, resolve, a["source"], a["dtype"], Path(a["out"])
            )
            for a in asked
        }
        return {name: revision.result() for name, revision in found.items()}


def _code() -> dict[str, str]:
    """What computes. A false alarm costs little: each stage still looks at its own inputs."""
    root = Path(tasks.__file__).parent
    files = [path for path in sorted(root.rglob("*.*")) if path.suffix != ".pyc"]
    stages = {path.relative_to(root).as_posix(): sha256(path) for path in files}
    stages["steps"] = sha256(Path(steps.__file__))
    own = {"code of poemerge": core_code()["sha256"], "code of the stages": digest(stages)}
    return own | {tool: metadata.version(tool) for tool in TOOLS}


def _moved(was: Inputs, now: Inputs) -> Iterator[Change]:
    yield from _changes(was.sources, now.sources)
    yield from _changes(_flat(was.params), _flat(now.params))
    yield from _changes(was.code, now.code)
    yield from _changes(was.data, now.data)


def _flat(params: Mapping[str, Any]) -> dict[str, str]:
    """Key by key; the candidates by name too, since one may be without settings."""
    return flat(params) | {"merge.methods": ", ".join(params["merge"]["methods"])}


def _changes(was: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Change]:
    for what in dict.fromkeys((*was, *now)):
        old, new = was.get(what, ""), now.get(what, "")
        if old != new:
            yield Change(what, _short(old), _short(new))


def _short(text: str) -> str:
    return HASH.sub(lambda found: found[0][:SHORT], text)
