"""Sources of a record, looked for where they may be, and compared with what it says of them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from poemerge.errors import PoemergeError
from poemerge.hashing import sha256
from poemerge.lineage import Lineage, Source
from poemerge.names import stays_inside
from poemerge.remote.places import is_url
from poemerge.remote.stand_ins import at_hand
from poemerge.statement import GIT
from tasks.provenance.model import DVC, opened
from tasks.provenance.shelves import Shelves
from tasks.versions import SCHEME

State = Literal["intact", "missing", "changed"]
Files = Mapping[str, Path]
Place = tuple[Path | str, Files]
NOWHERE = "no address is recorded"


@dataclass(frozen=True)
class Check:
    """The files of one model or source.

    Attributes:
        role: the names that lead to it, from the model down.
        address: that its record has for it.
        where: it was found; empty if nowhere.
        files: relative path → state.
    """

    role: tuple[str, ...]
    address: str
    where: str
    files: Mapping[str, State]

    @property
    def state(self) -> State:
        """The worst of its files."""
        states = set(self.files.values())
        return "changed" if "changed" in states else "missing" if "missing" in states else "intact"

    def having(self, state: State) -> list[str]:
        """The files in that state."""
        return [name for name, found in self.files.items() if found == state]


@dataclass(frozen=True)
class Reach:
    """Where sources may be found.

    Attributes:
        locate: a source's address → folder or file on this machine, None if it lies elsewhere.
        roots: folders with fetched sources and older merges, known by their records.
        given: name of a source → where the user says that it lies.
        remote: True if storage that a record names may be asked (s3:// and such): for config,
            tokenizer and headers, and for the tags of weights.
    """

    locate: Callable[[str], Path | None]
    roots: tuple[Path, ...] = ()
    given: Mapping[str, Path] = field(default_factory=dict)
    remote: bool = False


@dataclass(frozen=True)
class Found:
    """A source where it was found.

    Attributes:
        check: of its files.
        place: text for what lies in no folder.
        files: those of the source's that are there, by relative path.
    """

    check: Check
    place: Path | str
    files: Files

    @property
    def folder(self) -> Path | None:
        """The folder that has it whole."""
        place, whole = self.place, self.check.state == "intact"
        return place if whole and isinstance(place, Path) and place.is_dir() else None


class Search:
    """Sources of a record, each looked for where it may be.

    Args:
        reach: places outside the records.
        shelves: of the reach.
        stack: keeps downloads until all is hashed.
    """

    def __init__(self, reach: Reach, shelves: Shelves, stack: ExitStack) -> None:
        self.reach, self.shelves, self.stack = reach, shelves, stack
        self._seen: set[tuple[str, str]] = set()

    def below(
        self, record: Lineage, role: tuple[str, ...] = (), copies: tuple[Path, ...] = ()
    ) -> Iterator[Check]:
        """Check every source of a record, and theirs.

        Args:
            record: of what was made.
            role: names that lead to it.
            copies: where that was found, if it is a mere copy of its source.
        """
        for source in record.inputs:
            found = self.find(source, (*role, source.name), copies)
            check = found.check
            if (source.digest, check.where) not in self._seen:
                self._seen.add((source.digest, check.where))
                yield check
            if source.parent:
                parent = Lineage.of(source.parent)
                held = found.folder if parent.stage == "fetch" else None
                yield from self.below(parent, check.role, (held,) if held else ())

    def find(self, source: Source, role: tuple[str, ...], copies: tuple[Path, ...] = ()) -> Found:
        """The first place that has a source whole; else the first that has anything of it.

        A folder that was trained again since is no fault of what was made from its fetched copy.
        """
        parts = []
        for places in self._places(source, role, copies):
            found = [found_at(source, role, place, files) for place, files in places]
            if some := [each for each in found if each.check.where]:
                best = max(some, key=lambda each: len(each.check.having("intact")))
                if best.check.state == "intact":
                    return best
                parts.append(best)
        return parts[0] if parts else found_at(source, role, "", {})

    def _places(
        self, source: Source, role: tuple[str, ...], copies: tuple[Path, ...]
    ) -> Iterator[list[Place]]:
        """Places that are as good as one another; the next are asked where these hold nothing."""
        given = self.reach.given.get("/".join(role))
        if given is not None:
            yield [(given, _listed(given, source.files))]
            return
        shelved: list[Place] = [
            (p, _listed(p, source.files)) for p in self.shelves.claiming(source.digest)
        ]
        if source.parent and source.parent["stage"] == "fetch":  # its address is the original's
            yield shelved
        yield list(self._addressed(source))
        yield [*shelved, *((path, _listed(path, source.files)) for path in copies)]

    def _addressed(self, source: Source) -> Iterator[Place]:
        """What its address leads to, if that can be followed without a download from a hub."""
        pinned = source.revision.rpartition("@")[0] or source.revision  # models:/NAME/3@sha256
        if source.uri.startswith((SCHEME, DVC)) and pinned.startswith((SCHEME, DVC)):
            try:
                model = self.stack.enter_context(opened(pinned))
            except PoemergeError:
                return
            yield pinned, model.files
        elif is_url(source.uri):
            yield from self._stored(source)
        elif source.uri:
            path = self.reach.locate(source.uri)
            if path is not None and path.exists():
                yield path, _listed(path, source.files)

    def _stored(self, source: Source) -> Iterator[Place]:
        """A stand-in of what lies elsewhere, whose weights are known by the storage's tags."""
        if not self.reach.remote:
            return
        try:
            (folder,) = self.stack.enter_context(at_hand([source.uri]))
        except PoemergeError:
            return
        yield folder, _listed(folder, source.files)


def found_at(
    source: Source, role: tuple[str, ...], place: Path | str, files: Files | None = None
) -> Found:
    """What a place has of a source."""
    files = _listed(Path(place), source.files) if files is None else files
    states = dict(compare(source.files, files))
    where = "" if set(states.values()) == {"missing"} else f"{place}"
    address = " @ ".join(filter(None, (source.uri, source.revision))) or NOWHERE
    return Found(Check(role, address, where, states), place, files)


def _listed(path: Path, names: Iterable[str]) -> Files:
    """Those of the names that are there. An address may be any folder of this machine, even `/`."""
    if path.is_file():
        return {path.name: path}
    return {name: path / name for name in names if stays_inside(name) and (path / name).is_file()}


def compare(stated: Mapping[str, str], files: Files) -> Iterator[tuple[str, State]]:
    """Every stated file, by name, with its state.

    Args:
        stated: relative path → hash.
        files: relative path → where it is.
    """
    for name, expected in sorted(stated.items()):
        if name not in files or not files[name].is_file():
            yield name, "missing"
        else:
            yield name, "intact" if _hash(files[name], expected) == expected else "changed"


def _hash(path: Path, like: str) -> str:
    """In the kind that a hub stated: a sha256, or git's hash of a blob."""
    if not like.startswith(GIT):
        return sha256(path)
    content = path.read_bytes()
    header = b"blob %d\0" % len(content)
    return GIT + hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
