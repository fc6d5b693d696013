"""Promotion: what is asked, of whom, and what a run does by itself. Gates lie in tasks/promote."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from flows.params import load
from flows.places import Places
from flows.provenance import verify
from flows.sections import Params
from poemerge.errors import SettingError
from poemerge.redaction import redact
from tasks.evaluate import evaluate
from tasks.promote import Evaluation, Judgement, Limits, Row, judge, note, registered
from tasks.promote import promote as decide
from tasks.promote import rollback as take_back

RESCORED = Path(".poemerge/promote")  # outcomes of champions that were scored otherwise before
POLL = 2  # s between looks for a person's answer

logger = logging.getLogger(__name__)


class Approval(RunInput):
    """What a person is asked about a version that every gate let through."""

    approve: bool
    who: str
    reason: str = ""


def promote(
    params: Params,
    version: int | None = None,
    reason: str = "",
    *,
    by_hand: bool = True,
    ask: Callable[[Judgement], Approval] | None = None,
) -> dict[str, Any]:
    """Make a version champion if the gates of `promote` in params.yaml let it through.

    Args:
        params: with a section `promote`.
        version: its number; None for the challenger.
        reason: for the audit table.
        by_hand: False where no person wants it: then what a person took back stays so.
        ask: a person who must agree; None for nobody.

    Returns:
        The decision with the model's `name` and its `number` in the audit table; of `kind` champion
        and without a number where the version is it already.

    Raises:
        PoemergeError: there is no such version, or nothing to judge it by.
    """
    name, limits = params.register_.name, _limits(params)
    judgement = judge(
        name,
        version,
        limits,
        by_hand=by_hand,
        verify=lambda ref: verify(ref).problems,
        rescore=_rescore(params),
    )
    if judgement.is_champion:
        return _already(judgement)
    if judgement.passed and ask is not None:
        answer = ask(judgement)
        said = {"reason": answer.reason or "no reason given", "who": answer.who}
        row = note("approval" if answer.approve else "rejection", judgement, **said)
        if not answer.approve:
            return _outcome(name, row)
        reason = f"approved by {answer.who}: {said['reason']}"
    return _outcome(name, decide(judgement, reason))


def after_run(places: Places, *, trial: bool) -> dict[str, Any] | None:
    """Try to promote what a run registered, where `promote.automatic` says so.

    Args:
        places: of the run.
        trial: True for a run with settings of its own, which leaves the champion to people.

    Returns:
        As `promote`; None where there was nothing to try.
    """
    params = places.params
    entry = places.register / "registration.json"
    if trial or not (params.promote and params.promote.automatic and params.evaluate.tasks):
        return None
    made = json.loads(entry.read_text(encoding="utf-8"))
    version = registered(params.register_.name, made["digest"])
    return promote(params, version, "the run that made it", by_hand=False)


def rollback(params: Params, reason: str) -> dict[str, Any]:
    """Bring back the champion before; returned as by `promote`.

    Raises:
        SourceError: there was none.
    """
    return _outcome(params.register_.name, take_back(params.register_.name, reason))


@flow(name="poemerge-promote")
def promote_with_approval(
    params: str, version: int | None, reason: str, timeout: int
) -> dict[str, Any]:
    """As `promote`, with a person who is asked once every gate has passed.

    The run pauses and waits for the answer, which is given in Prefect's pages under "Resume", or
    through its API. Nobody's answer within `timeout` seconds is a no.

    Raises:
        SettingError: there is no Prefect server on which a person could answer.
    """
    check_server()

    def ask(judgement: Judgement) -> Approval:
        where = redact(flow_run.ui_url or "this run in Prefect")
        logger.info("waiting %d s for a person to resume %s", timeout, where)
        question = Approval.with_initial_data(description=_question(judgement))
        try:
            return pause_flow_run(question, timeout=timeout, poll_interval=POLL)
        except FlowPauseTimeout:
            return Approval(approve=False, who="nobody", reason=f"nobody answered in {timeout} s")

    return promote(load(Path(params)), version, reason, ask=ask)


def check_server() -> None:
    """See that there is a Prefect server which others can reach.

    Raises:
        SettingError: there is none.
    """
    if not PREFECT_API_URL.value():
        message = (
            "--approve needs a Prefect server where a person can answer; run `prefect server "
            "start` and set PREFECT_API_URL, for instance to http://127.0.0.1:4200/api."
        )
        raise SettingError(message)


def _limits(params: Params) -> Limits:
    if params.promote is None:
        message = "params.yaml has no section `promote`; docs/promotion.md has one to copy."
        raise SettingError(message)
    return Limits(**params.promote.model_dump(exclude={"automatic"}))


def _rescore(params: Params) -> Callable[[Path, Evaluation], Path]:
    """How to evaluate a model folder as another version was: same items, same settings."""

    def rescore(model: Path, like: Evaluation) -> Path:
        ours = params.evaluate.scoring
        how = ours | {key: like.params[key] for key in like.asked & ours.keys()}
        tasks = list(like.outcomes.ids)
        out = RESCORED / params.register_.name
        evaluate.fn("champion", "merge", model, None, out, tasks=tasks, splits=["test"], **how)
        return out

    return rescore


def _question(judgement: Judgement) -> str:
    """For Prefect's form, in Markdown."""
    champion = f"version {judgement.champion}" if judgement.champion else "nothing"
    lines = [f"Version {judgement.version} of {judgement.name} would replace {champion}.", ""]
    return "\n".join(lines + [f"- **{gate.name}**: {gate.sentence}" for gate in judgement.gates])


def _outcome(name: str, row: Row) -> dict[str, Any]:
    """A decision as plain data, with the name of the model and its number in the audit table."""
    decision = row.decision
    logger.info("%s: version %s of %s", decision.kind, decision.version, name)
    return {"name": name, "number": row.number} | asdict(decision)


def _already(judgement: Judgement) -> dict[str, Any]:
    """The same shape for a version that is champion: there was nothing to decide."""
    outcome = {"kind": "champion", "number": None, "who": "", "reason": "", "gates": ()}
    return outcome | {key: getattr(judgement, key) for key in ("name", "version", "champion")}
