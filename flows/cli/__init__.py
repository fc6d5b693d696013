"""The command line: `poemerge`. Heavy imports wait until a command needs them."""

import atexit
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from flows.cli import foresight, library, models, operations, pipeline, promotion, queue, records
from poemerge.atomic import disk_errors
from poemerge.errors import PoemergeError
from poemerge.redaction import guard_logs
from poemerge.version import VERSION

REFUSED, INTERRUPTED = 1, 3
GARBAGE = 50_000  # new objects between collections; imports make many, and none is garbage

# Nothing leaves the machine unasked, and our own lines are the ones to read.
QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "poemerge,tasks,flows",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # commands that are no flow log too
    "PREFECT_CLIENT_MAX_RETRIES": "3",  # some 15 s; the default waits a minute, call by call
    "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500,504",
    "PREFECT_API_REQUEST_TIMEOUT": "20",  # seconds, of each try; the default is 60
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # a busy machine takes its time
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are ten times slower on a machine in use
}


def calm_down() -> None:
    """Set what the libraries read when they are first imported; what the user has set stays."""
    guard_logs()
    gc.set_threshold(GARBAGE)
    atexit.register(gc.freeze)  # or the interpreter would look at all of them once more: 0.2 s
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """SIGTERM ends a command as Ctrl-C does: in order, and so that it can be gone on with.

    Yields the signals that have come: a library may make an error of its own of an interrupt, as
    matplotlib does.
    """
    came: list[int] = []

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is signal.SIG_IGN:  # so shells start what is not to hear of Ctrl-C
        del before[signal.SIGINT]
    for number in before:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Sentences(click.Group):
    """A group whose commands end refusals with one sentence and exit code 1."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        with _stoppable() as stops:
            try:
                with disk_errors("The result"):
                    return super().invoke(context)
            except (Exception, KeyboardInterrupt) as error:
                if stops or isinstance(error, KeyboardInterrupt):
                    click.echo("interrupted: run the same command again to go on.", err=True)
                    sys.exit(INTERRUPTED)
                if isinstance(error, PoemergeError):
                    click.echo(f"error: {error}", err=True)
                    sys.exit(REFUSED)
                raise


@click.group(cls=Sentences, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="poemerge")
def main() -> None:
    """Merge fine-tuned models as products of experts, and look after the result."""
    calm_down()


for _command in (
    pipeline.run,
    pipeline.sweep,
    models.merge,
    models.extract,
    foresight.check,
    foresight.plan,
    library.experts,
    records.methods,
    pipeline.report,
    records.lineage,
    records.verify,
    records.reproduce,
    records.sign,
    promotion.promote,
    promotion.rollback,
    promotion.audit,
    operations.deploy,
    queue.queue,
    operations.doctor,
):
    main.add_command(_command)
