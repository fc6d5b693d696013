"""The audit table: whether all that was decided about the model of params.yaml is still there."""

from collections.abc import Iterator

from flows.doctor.finding import Finding, problem
from flows.doctor.services import is_made, mlflow
from flows.params import read
from flows.places import PLAIN
from poemerge.errors import SettingError
from tasks.tracking import tracking_uri


def decisions() -> Iterator[Finding]:
    """What is wrong with the table; nothing to say where none was made, or MLflow is not well."""
    try:
        name = str(read(PLAIN)["register"]["name"])
    except (SettingError, LookupError, TypeError):  # no project, or one that a run will refuse
        return
    if not is_made(tracking_uri()) or any(found.status == "problem" for found in mlflow()):
        return
    from tasks.promote import audit  # noqa: PLC0415 - 2 s, in this check's own thread

    ledger = audit(name)
    count = len(ledger.rows)
    if ledger.problems:
        advice = "`poemerge audit` shows all; see who may delete in MLflow"
        yield problem("decisions", f"about {name}: {ledger.problems[0]}", advice)
    elif count:
        said = f"{count} about {name}, none changed or missing"
        yield Finding("decisions", said)
