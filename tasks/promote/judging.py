"""The gates, asked of one version: what is read for each, and in which order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from poemerge.errors import PoemergeError, SourceError
from tasks.decisions import Gate, Row
from tasks.promote import evidence, gates
from tasks.promote.evidence import Evaluation
from tasks.promote.moves import champion_of, settle
from tasks.tracking import connected
from tasks.versions import CHALLENGER, aliased, every, newest, numbered, uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

Verify = Callable[[str], Sequence[str]]
Rescore = Callable[[Path, Evaluation], Path]


@dataclass(frozen=True)
class Limits:
    """What is wanted, as params.yaml has it in `promote`.

    Attributes:
        min_gain: of the mean on test over the champion, a fraction of 1.
        level: of the interval that must lie above it.
        max_drop: of any task, a fraction of 1.
        certificates: ask for those of the merge.
        verify: ask for its lineage.
    """

    min_gain: float
    level: float
    max_drop: float
    certificates: bool
    verify: bool


@dataclass(frozen=True)
class Judgement:
    """What the gates said of a version.

    Attributes:
        name: of the registered model.
        version: that would be champion.
        champion: that is; None if there is none.
        gates: in the order in which they were asked.
        basis: the move that made the champion what it is.
    """

    name: str
    version: int
    champion: int | None
    gates: tuple[Gate, ...]
    basis: Row | None

    @property
    def is_champion(self) -> bool:
        """True if there is nothing to decide."""
        return self.version == self.champion

    @property
    def passed(self) -> bool:
        """True if every gate did."""
        return all(gate.passed for gate in self.gates)

    @property
    def refusal(self) -> str:
        """The gates that did not, in one sentence."""
        return "; ".join(f"{g.name}: {g.sentence}" for g in self.gates if not g.passed)


def judge(
    name: str,
    number: int | None,
    limits: Limits,
    *,
    by_hand: bool,
    verify: Verify,
    rescore: Rescore,
) -> Judgement:
    """Ask every gate about a version.

    Args:
        name: of the registered model.
        number: of the version; None for the challenger.
        limits: what is wanted.
        by_hand: True where a person asks for it; what was taken back needs one who names `number`.
        verify: a reference → what is wrong in its lineage, in sentences.
        rescore: the champion's folder, and an evaluation → where the champion was evaluated in the
            same way; asked only where the two versions were not.

    Raises:
        SourceError: there is no such version, or it has no outcomes.
    """
    with connected() as client:
        ledger = settle(client, name)
        challenger = _pick(client, name, number)
        champion = champion_of(client, name, ledger)
        version = int(challenger.version)
        if version == champion:
            return Judgement(name, version, champion, (), ledger.last_move)
        live = None if champion is None else numbered(client, name, champion)
        asked = [gates.intact("bytes", evidence.damage(challenger))]
        named = by_hand and number is not None
        if not named and (recalled := ledger.taken_back(version)):
            asked.append(gates.recalled(recalled.number, recalled.decision.reason, version))
        if all(gate.passed for gate in asked):
            asked += _compare(client, challenger, live, limits, rescore)
            if limits.certificates:
                asked.append(gates.certificates(evidence.merge_report(challenger)))
            if limits.verify:
                asked.append(gates.intact("lineage", _lineage(challenger, verify)))
        return Judgement(name, version, champion, tuple(asked), ledger.last_move)


def _pick(client: Any, name: str, number: int | None) -> "ModelVersion":
    if number is None:
        found = aliased(client, name, CHALLENGER) or newest(client, name)
    else:
        found = numbered(client, name, number)
    if found is None:
        known = ", ".join(str(version.version) for version in every(client, name))
        which = f"no version {number} (there are: {known})" if known else "no version"
        raise SourceError(f"{name} has {which}; `poemerge run` registers one.")
    return found


def _lineage(version: "ModelVersion", verify: Verify) -> Sequence[str]:
    try:
        return verify(uri(version))
    except PoemergeError as error:
        return (str(error),)


def _compare(
    client: Any,
    challenger: "ModelVersion",
    champion: "ModelVersion | None",
    limits: Limits,
    rescore: Rescore,
) -> list[Gate]:
    """Gain and drop, on outcomes that were had in the same way."""
    with evidence.evaluation(client, challenger) as folder:
        ours = Evaluation.read(folder)
        theirs, asked = None, []
        if champion is not None:
            theirs, gate = _alike(client, champion, ours, lambda copy: rescore(copy, ours))
            asked.append(gate)
            if theirs is None:
                return asked
    left, right = ours.outcomes, theirs.outcomes if theirs else None
    return [
        *asked,
        gates.gain(left, right, min_gain=limits.min_gain, level=limits.level),
        gates.drop(left, right, max_drop=limits.max_drop),
    ]


def _alike(
    client: Any, champion: "ModelVersion", ours: Evaluation, rescore: Callable[[Path], Path]
) -> tuple[Evaluation | None, Gate]:
    """The champion's evaluation, made anew if it was asked something else than the challenger."""
    who = f"version {champion.version}"
    try:
        with evidence.evaluation(client, champion) as folder:
            theirs = Evaluation.read(folder)
        apart = ours.differs(theirs)
    except SourceError as error:
        apart = str(error).rstrip(".")
    if not apart:
        return theirs, gates.alike(who, "")
    try:
        with TemporaryDirectory() as folder:
            theirs = Evaluation.read(rescore(evidence.copy_to(Path(folder), champion)))
    except PoemergeError as error:
        return None, gates.unlike(who, apart, str(error))
    if still := ours.differs(theirs):
        return None, gates.unlike(who, apart, f"evaluated again, it still differs in {still}")
    return theirs, gates.alike(who, apart)
