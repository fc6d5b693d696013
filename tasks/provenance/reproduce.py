"""A merge once more, from what its record says, and a comparison byte by byte."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from poemerge.errors import SettingError, SourceError
from poemerge.hashing import hash_files, sha256
from poemerge.lineage import Lineage, Source
from poemerge.names import stays_inside
from poemerge.progress import Progress, silent
from tasks.provenance.difference import facts_of
from tasks.provenance.model import DVC, Model, opened
from tasks.provenance.search import Found, Reach, Search, found_at
from tasks.provenance.shelves import Shelves
from tasks.provenance.tensors import OTHER, difference
from tasks.versions import SCHEME

HUB = "hf://"
CURVATURE = "curvature of "  # names the inputs that are no checkpoint
THREADS = re.compile(r"cpu, (\d+) threads")
MOST_THREADS = 1024  # a record that names more is not believed
ASKED = {  # what a record may ask for, name → types; where it goes is for the user to say
    "method": (str,),
    "settings": (dict,),
    "device": (str,),
    "dtype": (str,),
    "output": (str,),
    "seed": (int,),
    "rank": (int, type(None)),
    "memory": (int, type(None)),
}
Fetch = Callable[[str, Mapping[str, Any]], Path]


@dataclass(frozen=True)
class Reproduction:
    """What came of doing it again.

    Attributes:
        out: the new folder.
        caveats: in what the conditions were others than recorded: code, packages, device.
        equal: files that have the recorded bytes.
        differing: file → in what it differs, in words.
    """

    out: Path
    caveats: tuple[str, ...]
    equal: tuple[str, ...]
    differing: Mapping[str, str]


def reproduce(
    ref: str, out: Path, reach: Reach, fetch: Fetch, progress: Progress = silent
) -> Reproduction:
    """Merge again with the recorded sources and settings, and compare.

    Args:
        ref: a merged folder, `models:/...` or `dvc://...`.
        out: folder to make.
        reach: where sources may be found.
        fetch: a pinned address and the params of its first fetch → a folder with its bytes.
        progress: called with (tensors done, tensors in all).

    Raises:
        SettingError: it is no merge, or `out` exists.
        SourceError: a source cannot be had with the recorded bytes.
    """
    with opened(ref) as model, ExitStack() as stack:
        record = _merge_record(model)
        search = Search(reach, Shelves.below(reach.roots), stack)
        folders = {s.name: _whole(search, s, fetch, stack) for s in record.inputs}
        with _threads(record.device):
            made = _merge(record, folders, out, progress)
        return _compare(model, out, made)


def _merge_record(model: Model) -> Lineage:
    from poemerge.methods import find  # noqa: PLC0415 - imports torch

    record = model.record
    if record.stage != "merge" or "posterior" in record.params:
        kind = "a draw from a posterior" if "posterior" in record.params else f"of {record.stage}"
        raise SettingError(f"{model.ref} is {kind}; give a merged model.")
    kinds = {name: type(value) for name, value in record.params.items()}
    known = {"method", "settings"} <= kinds.keys() <= ASKED.keys()
    if not (known and all(kind in ASKED[name] for name, kind in kinds.items())):
        raise SourceError(
            f"{model.ref} has a record that is not as `poemerge merge` writes it "
            f"({', '.join(kinds)}); nobody can follow it, so merge anew."
        )
    find(str(record.params["method"])).settings.parse(record.params["settings"])
    return record


def _whole(search: Search, source: Source, fetch: Fetch, stack: ExitStack) -> Path:
    """A folder (or a file) with exactly the recorded bytes of a source."""
    found = search.find(source, (source.name,))
    if found.check.state != "intact" and source.parent and source.parent["stage"] == "fetch":
        found = found_at(source, (source.name,), fetch(_pinned(source), source.parent["params"]))
    if found.check.state != "intact":
        bad = ", ".join(found.check.having("changed") or found.check.having("missing"))
        state = "has other bytes in" if found.check.state == "changed" else "lacks"
        where = found.check.where or found.check.address
        raise SourceError(
            f"{source.name} ({where}) {state} {bad}; say where it lies: --source {source.name}=DIR."
        )
    return _place(source, found, stack)


def _place(source: Source, found: Found, stack: ExitStack) -> Path:
    """Where it lies, if nothing else lies there; else a folder of links to its files alone."""
    if source.name.startswith(CURVATURE):
        return next(iter(found.files[name] for name in source.files))
    folder = found.folder
    if folder is not None and hash_files(folder) == dict(source.files):
        return folder
    scratch = Path(stack.enter_context(TemporaryDirectory()))
    linked = scratch / (
        folder.resolve().name if folder else Path(source.name).name.strip(".") or "base"
    )
    linked.mkdir()
    for name, path in ((name, found.files[name]) for name in source.files if stays_inside(name)):
        (linked / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            (linked / name).symlink_to(path.resolve())
        else:  # what a merge takes over may be no link
            shutil.copyfile(path, linked / name)
    return linked


def _pinned(source: Source) -> str:
    """The address that means the same bytes for ever, as far as its kind has one."""
    if source.uri.startswith(HUB):
        return f"{source.uri.split('@')[0]}@{source.revision}"
    if source.uri.startswith((SCHEME, DVC)):
        return source.revision.rpartition("@")[0] or source.revision
    return source.uri


@contextmanager
def _threads(device: str) -> Iterator[None]:
    """As many threads as then: sums round by how they are split."""
    import torch  # noqa: PLC0415 - 1 s

    before, then = torch.get_num_threads(), THREADS.fullmatch(device)
    if then and int(then[1]) in range(1, MOST_THREADS):
        torch.set_num_threads(int(then[1]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _merge(record: Lineage, folders: Mapping[str, Path], out: Path, progress: Progress) -> Lineage:
    """Do it, and record it with the addresses that the sources had then."""
    from poemerge.merge import merge_checkpoints  # noqa: PLC0415 - imports torch
    from poemerge.model_card import write_card  # noqa: PLC0415 - imports torch

    names = [source.name for source in record.inputs]
    curvature = {n.removeprefix(CURVATURE): folders[n] for n in names if n.startswith(CURVATURE)}
    experts = {n: folders[n] for n in names[1:] if not n.startswith(CURVATURE)}
    params = dict(record.params)
    method, settings = params.pop("method"), dict(params.pop("settings"))
    if curvature:
        settings["curvature"] = {name: str(path) for name, path in curvature.items()}
    if THREADS.fullmatch(record.device):
        params["device"] = "cpu"
    params |= {"progress": progress, "foreign": "warn"}  # it was merged, whatever it is
    report = merge_checkpoints(folders[names[0]], experts, out, method, **params, **settings)
    made = Lineage.find(out)
    assert made is not None
    made = replace(made, params=record.params, inputs=record.inputs)
    write_card(out, report, made)
    made.write(out)
    return made


def _compare(model: Model, out: Path, made: Lineage) -> Reproduction:
    then, now = model.record.outputs, hash_files(out)
    same = tuple(name for name in then if now.get(name) == then[name])
    differing = {}
    for name in sorted({**then, **now}.keys() - set(same)):
        if name not in then or name not in now:
            differing[name] = "is new" if name in now else "was not made"
            continue
        before = model.files.get(name)
        known = before is not None and sha256(before) == then[name]
        differing[name] = difference(before, out / name) if before and known else OTHER
    return Reproduction(out, tuple(_caveats(model.record, made)), same, differing)


def _caveats(then: Lineage, now: Lineage) -> Iterator[str]:
    for section in ("code", "packages", "device"):
        left, right = facts_of(then)[section], facts_of(now)[section]
        for key in {**left, **right}:
            old, new = left.get(key, "none"), right.get(key, "none")
            if old != new:
                yield f"{section} {key}: {old[:24]} then, {new[:24]} now"
