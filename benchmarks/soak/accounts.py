"""Is every run in every record, and nothing else?"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import ViewType
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun

from benchmarks.soak.run import Merged
from benchmarks.soak.system import LABEL, METHOD, NAME, System

PAGE = 200  # that Prefect gives at once
STAGES = ("fetch", "task_vectors", "merge")
ENTRIES = ("", "base", "red", METHOD)  # MLflow runs of a scored merge: the comparison and its rows

Records = dict[str, Counter[str]]  # record → what → how often


def expected(done: Sequence[Merged]) -> Records:
    """What there must be."""
    scored = sum(merged.scored for merged in done)
    idle = sum(merged.idle is not None for merged in done)
    return {
        "Prefect runs": Counter({"Completed": len(done), "UpToDate": idle}),
        "models": Counter({"unlike all others": len(done)}),
        "MLflow runs": Counter({f"{name or NAME} FINISHED": scored for name in ENTRIES}),
        "versions": Counter({NAME: scored}),
        "decisions": Counter({f"{NAME}-decisions": scored}),
        "DVC": Counter({"clean": 1}),
    }


def found(system: System, done: Sequence[Merged]) -> Records:
    """What there is."""
    client = MlflowClient(f"sqlite:///{system.project}/mlflow.db")
    runs = [run for merged in done for run in (merged.run, merged.idle) if run]
    return {
        "Prefect runs": _prefect(system, runs),
        "models": Counter({"unlike all others": len({merged.model for merged in done})}),
        "MLflow runs": _mlflow(client),
        "versions": _versions(client, NAME),
        "decisions": _versions(client, f"{NAME}-decisions"),
        "DVC": Counter({_dvc(system): 1}),
    }


def problems(wanted: Mapping[str, Counter[str]], there: Mapping[str, Counter[str]]) -> list[str]:
    """Sentences on what differs; none if all is accounted for."""
    told = []
    for record, counts in wanted.items():
        if +counts != +there[record]:
            told.append(f"{record}: {dict(+there[record])} instead of {dict(+counts)}")
    return told


def _prefect(system: System, runs: Sequence[FlowRun]) -> Counter[str]:
    """Names of the states; a run that nobody asked for is one too many."""
    deployment = system.client.read_deployment_by_name(LABEL)
    mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    known: list[FlowRun] = []
    while page := system.client.read_flow_runs(
        deployment_filter=mine, offset=len(known), limit=PAGE
    ):
        known += page
    asked = {run.id for run in runs}
    return Counter(
        str(run.state_name) if run.id in asked else "unasked"
        for run in known
        if not run.auto_scheduled  # of the schedule itself, on 29 February
    )


def _mlflow(client: MlflowClient) -> Counter[str]:
    places = [each.experiment_id for each in client.search_experiments(view_type=ViewType.ALL)]
    counts: Counter[str] = Counter()
    token = None
    while token != "":
        page = client.search_runs(places, page_token=token)
        counts.update(f"{run.info.run_name} {run.info.status}" for run in page)
        token = page.token or ""
    return counts


def _versions(client: MlflowClient, name: str) -> Counter[str]:
    """Versions with a content of their own."""
    sources: set[str] = set()
    token = None
    while token != "":
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        sources |= {version.source for version in page}
        token = page.token or ""
    return Counter({name: len(sources)})


def _dvc(system: System) -> str:
    """`clean` if the stages of every merge are; those of the scores wait for one that is scored."""
    site = system.root / "dvc"
    told = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--quiet", *STAGES],
        cwd=system.project,
        env=os.environ | {"DVC_SITE_CACHE_DIR": os.fspath(site), "DVC_NO_ANALYTICS": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    return "clean" if told.returncode == 0 else "changed"
