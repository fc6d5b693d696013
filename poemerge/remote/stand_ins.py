"""Folders here that stand for folders elsewhere, so that all the rest knows paths only.

Config and tokenizer of a stand-in are copies. Its safetensors files are sparse: the header, and a
hole where the values are, which `remote/ranges.py` reads from where they lie. What a file stands
for is noted beside the folder, where no file of a source can be; so whoever is given the path, in
another process too, never takes the hole for values.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PosixPath
from tempfile import TemporaryDirectory

from poemerge import documents
from poemerge.layout import TEXTS, WEIGHTS
from poemerge.remote.places import Entry, Place, last_part, locate

BESIDE = ".elsewhere"  # the folder of notes
ADDRESS = "url"  # of the folder, among them
HEAD = 128 << 10  # bytes that are read at first: more than most headers have


class StandIn(PosixPath):
    """A path in a stand-in: messages speak of where it leads."""

    def __format__(self, form: str) -> str:
        for folder in (self, *self.parents):
            if url := url_of(folder):
                return format("/".join((url, *self.relative_to(folder).parts)), form)
        return super().__format__(form)


@dataclass(frozen=True)
class Remote:
    """What a file stands for.

    Attributes:
        folder: URL of the folder that it lies in.
        name: there.
        size: bytes.
        tag: that its storage gave it.
        sha256: of its bytes, where somebody here has made them.
    """

    folder: str
    name: str
    size: int
    tag: str
    sha256: str = ""

    @property
    def identity(self) -> str:
        """What a record says of it: the sha256 or, of what nobody has read whole, the tag."""
        return self.sha256 or self.tag


@contextmanager
def at_hand(sources: Sequence[Path | str]) -> Iterator[list[Path]]:
    """Folders to read: those here as they are, stand-ins of those elsewhere within the block.

    Args:
        sources: paths or URLs.

    Raises:
        SourceError: a URL leads nowhere, or is refused.
        UnreachableError: its storage does not answer.
    """
    with ExitStack() as stack:

        def folder(place: Path | str) -> Path:
            if isinstance(place, Path):
                return place
            room = Path(stack.enter_context(TemporaryDirectory(prefix="poemerge-")))
            return stand_in(place, room / last_part(place))

        yield [folder(locate(source)) for source in sources]


def stand_in(url: str, folder: Path) -> StandIn:
    """Make `folder` a stand-in of a checkpoint or an adapter elsewhere.

    Raises:
        SourceError: nothing is there, or it is refused.
        UnreachableError: the storage does not answer.
    """
    place = Place(url)
    found = place.listing()
    made = empty_stand_in(url, folder)
    texts = [n for n, e in found.items() if Path(n).suffix in TEXTS and e.size <= documents.SIZE]
    for name, data in zip(texts, place.read([(n, 0, found[n].size) for n in texts]), strict=True):
        (made / name).write_bytes(data)
    weights = [name for name in found if name.endswith(WEIGHTS)]
    for name, head in zip(weights, _heads(place, weights, found), strict=True):
        (made / name).write_bytes(head)
        note(made / name, Remote(url, name, *found[name]))
    return made


def empty_stand_in(url: str, folder: Path) -> StandIn:
    """Make `folder` a stand-in of a folder elsewhere in which nothing is known of."""
    folder.mkdir(parents=True)
    _notes(folder).mkdir()
    (_notes(folder) / ADDRESS).write_text(url, "utf-8")
    return StandIn(folder)


def note(path: Path, remote: Remote) -> None:
    """Make the file at `path`, as far as it is there, stand for one elsewhere."""
    with path.open("ab") as file:
        file.truncate(remote.size)
    _note(path).write_text(json.dumps([_stamp(path), asdict(remote)]), "utf-8")


def find(path: Path) -> Remote | None:
    """What the file at `path` stands for; None for one that is all there."""
    try:
        stamp, remote = json.loads(_note(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Remote(**remote) if path.exists() and stamp == _stamp(path) else None


def url_of(folder: Path) -> str:
    """What a folder stands for; nothing for one that stands for itself."""
    try:
        return (_notes(folder) / ADDRESS).read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _heads(place: Place, names: list[str], found: Mapping[str, Entry]) -> list[bytes]:
    """The headers of safetensors files, in two rounds at most; one that is none as it is."""
    heads = place.read([(name, 0, min(HEAD, found[name].size)) for name in names])
    rest = {}
    for name, head in zip(names, heads, strict=True):
        size = 8 + int.from_bytes(head[:8], "little")
        if len(head) < size <= min(documents.SIZE, found[name].size):
            rest[name] = (name, len(head), size)
    more = dict(zip(rest, place.read(list(rest.values())), strict=True))
    return [head + more.get(name, b"") for name, head in zip(names, heads, strict=True)]


def _stamp(path: Path) -> list[int]:
    """Of the very file that a note speaks of: another may come in its place."""
    stat = path.stat()
    return [stat.st_ino, stat.st_mtime_ns]


def _notes(folder: Path) -> Path:
    return Path(f"{folder!s}{BESIDE}")


def _note(path: Path) -> Path:
    return Path(f"{path.parent!s}{BESIDE}", f"{path.name}.json")
