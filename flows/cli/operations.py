"""Commands around a running system: deploy, doctor."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli.options import params_option

if TYPE_CHECKING:
    from flows.deploy import Deployment

ANNOUNCED = 3  # runs


@click.command()
@params_option
@click.option("--name", help="Of the deployment. [as in prefect.yaml]")
@click.option("--pool", help="Work pool, made where there is none. [as in prefect.yaml]")
@click.option(
    "--notify", metavar="URL", envvar="POEMERGE_NOTIFY", help="POST there how each run ends."
)
@click.option(
    "--local", is_flag=True, help="Run a server and a worker here as well, until Ctrl-C stops them."
)
def deploy(
    params: Path, name: str | None, pool: str | None, notify: str | None, *, local: bool
) -> None:
    """Let Prefect run the pipeline on the schedule of params.yaml.

    Makes the deployment of prefect.yaml, or brings it up to date, on the server of PREFECT_API_URL.
    A worker of its pool runs it in this folder.
    """
    from flows.deploy import Deployment

    wanted = Deployment.find(params, name=name, pool=pool)
    if not local:
        _apply(wanted, notify)
        click.echo(f"worker: prefect worker start --pool {wanted.pool} --type process")
        return
    from flows.local import foreground, server, wait, worker

    with foreground(), server() as serving:
        _apply(wanted, notify)
        with worker(wanted.pool) as working:
            click.echo(f"Ctrl-C stops the worker{' and the server' if serving else ''}.")
            wait({"worker": working, "server": serving})
    click.echo("stopped")


def _apply(wanted: "Deployment", notify: str | None) -> None:
    from prefect.settings import PREFECT_UI_URL

    from flows.notify import tell_of_ends
    from flows.prefect_server import connected

    with connected() as client:
        identity = wanted.apply(client)
        if notify:
            tell_of_ends(client, identity, wanted.name, notify)
    click.echo(f"deployed: {PREFECT_UI_URL.value()}/deployments/deployment/{identity}")
    runs = [f"{run:%a %d %b %Y %H:%M %Z}" for run in wanted.next_runs(ANNOUNCED)]
    click.echo(f"next runs: {', '.join(runs)}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The findings as a list.")
def doctor(*, as_json: bool) -> None:
    """Say what is set up here, what is missing, and what to do about it; exit 1 on a problem."""
    from flows.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        from flows.doctor_table import show_findings

        show_findings(findings)
    sys.exit(any(finding.status == "problem" for finding in findings))
