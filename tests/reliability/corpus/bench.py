"""Cases made, tried and judged."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.reliability.corpus.sandbox import Ending, Sandbox

OUTS = ("out", "out.partial", ".poemerge/library/add/expert")
TELLING = ("poemerge verify", "poemerge reproduce")  # exit 1 says that something differs too


@dataclass(frozen=True)
class Kind:
    """A kind of bad input.

    Attributes:
        name: seeds what is random, with a case's number.
        ways: that read it.
        needs: what stands in a case's folder → the sound folders or files to choose from.
        spoil: damages what stands there.
        sound: fails unless an input that was not refused is right: (folder, way).
    """

    name: str
    ways: Sequence[str]
    needs: Mapping[str, Sequence[str]]
    spoil: Callable[[Path, Random], None]
    sound: Callable[[Path, str], None]


@dataclass(frozen=True)
class Bench:
    """Where cases are tried.

    Attributes:
        seeds: folder of what is sound.
        root: for cases, each gone once it was tried.
    """

    sandbox: Sandbox
    seeds: Path
    root: Path

    def attempt(self, kind: Kind, number: int, *, several: bool) -> None:
        """Make a case, and go some of its ways in, in turn.

        Args:
            kind: of the case.
            number: of the case; the same number gives the same case.
            several: three ways and not one.
        """
        count = 3 if several else 1
        for turn in range(number * count, (number + 1) * count):
            way = kind.ways[turn % len(kind.ways)]
            folder = self._made(kind, number)
            ending = self.sandbox.run(way, folder)
            try:
                judge(ending, folder, way, kind.sound)
            except AssertionError as error:
                raise AssertionError(f"poemerge {way!r} on case {folder}: {error}") from error
            shutil.rmtree(folder)

    def _made(self, kind: Kind, number: int) -> Path:
        """The same case whenever it is asked for."""
        random, folder = Random(f"{kind.name} {number}"), self.root / f"{kind.name}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, choices in kind.needs.items():
            seed = self.seeds / random.choice(choices)
            copy = shutil.copytree if seed.is_dir() else shutil.copyfile
            copy(seed, folder / name)
        kind.spoil(folder, random)
        return folder


def judge(ending: Ending, folder: Path, way: str, sound: Callable[[Path, str], None]) -> None:
    """Fail unless a case was refused in one sentence with nothing left, or its result is right."""
    assert not ending.crash, ending.crash
    if ending.error or ending.code:
        refused(ending, way)
        left = [name for name in OUTS if (folder / name).exists() and name != "out"]
        left += ["out"] if (folder / "out").exists() and way != "poemerge reproduce" else []
        assert not left, f"{left} was left behind"
    else:
        sound(folder, way)


def refused(ending: Ending, way: str) -> None:
    """One sentence, on one line, and the exit code that the documents state."""
    said = ending.said
    if ending.code is not None:
        assert ending.code == 1, f"exit code {ending.code}: {said}"
        assert "Traceback" not in said + ending.told
        if way in TELLING and "error: " not in said:
            assert ending.told.strip(), "it said nothing"
            return
        said = said.splitlines()[-1]
        assert said.startswith("error: "), said
    assert said.isprintable(), repr(said)
    assert said.endswith("."), said
    assert len(said) < 2_000, f"{len(said)} characters"
