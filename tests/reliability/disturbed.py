"""A command that is killed or stopped at a random moment, and the same command once more."""

import random
import shutil
import signal
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Protocol

from tests.reliability.commands import HINT, Blow, Ended, command
from tests.reliability.trials import Trials

STOPS = (signal.SIGINT, signal.SIGTERM)


class Subject(Protocol):
    """Something that is done by one command, and may be disturbed."""

    sources: Path  # of all that the command needs
    words: tuple[str, ...]

    def fresh(self, folder: Path) -> None:
        """Make a copy of the sources to work in."""

    def is_done(self, folder: Path) -> bool:
        """True if the command would have nothing to do; nothing half done may look like that."""

    def check(self, folder: Path, undisturbed: Path) -> None:
        """Assert that both are the same, and that nothing is left of what was disturbed."""


@cache
def left_alone(subject: Subject) -> tuple[Path, float]:
    """The folder of an undisturbed command, and the seconds that it took."""
    folder = subject.sources.parent / f"{subject.sources.name}-undisturbed"
    subject.fresh(folder)
    return folder, done(command(subject.words, folder)).seconds


def disturb(
    trials: Trials, counts: Mapping[str, int], subject: Subject, root: Path, *blows: signal.Signals
) -> None:
    """Strike at a random moment, do the same once more, and compare with what was left alone."""
    undisturbed, seconds = left_alone(subject)
    for number in trials(**counts):
        folder = root / str(number)
        subject.fresh(folder)
        with trials.trial(number):
            dice = random.Random(number)
            blow = Blow(dice.choice(blows), dice.random() * seconds)
            struck = command(subject.words, folder, blow=blow)
            check_end(struck, blow)
            if not subject.is_done(folder):
                done(command(subject.words, folder))
            subject.check(folder, undisturbed)
        shutil.rmtree(folder)


def done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.said
    return ended


def check_end(ended: Ended, blow: Blow) -> None:
    """Killed without a word; stopped in order; or it was quicker."""
    if ended.code == 0:
        return
    if blow.signal == signal.SIGKILL:
        assert ended.code == -signal.SIGKILL, ended.said
        return
    assert ended.code == 3, ended.said
    assert HINT in ended.said.splitlines(), ended.said  # Prefect may say something after it
    assert "Traceback" not in ended.said
