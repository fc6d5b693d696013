"""docs/team.md, block by block: two real servers that ask for passwords, two clones, a remote."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from tests.flows.conftest import PARAMS, ROOT, make_project
from tests.servers import free_port, running

PAGE = (ROOT / "docs/team.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE, flags=re.DOTALL))
PROMOTE = """\
promote:
  automatic: true
  min_gain: -1.0
  level: 0.95
  max_drop: 1.0
  certificates: false
  verify: true
"""
NAME = "smollm2-135m-merged"
SECRETS = {
    name: f"{name}-{4711 * position}"
    for position, name in enumerate(
        ("secret-key", "admin-password", "prefect-password", "worker-password", "reader-password"),
        1,
    )
}


@dataclass
class Team:
    """The page with real addresses and passwords, and all that its commands have said.

    Attributes:
        folder: where they run; the clones and env files are made in it.
        places: what stands on the page → what stands for it here.
        used: titles of the blocks that were followed so far.
    """

    folder: Path
    places: dict[str, str]
    said: str = ""
    used: set[str] = field(default_factory=set)

    def block(self, title: str) -> str:
        self.used.add(title)
        text = BLOCKS[title]
        for name, value in self.places.items():
            text = text.replace(name, value)
        return text

    def write(self, title: str) -> None:
        path = self.folder / title
        path.touch(mode=0o600)
        path.write_text(self.block(title))

    def run(self, script: str, folder: str = ".") -> "subprocess.CompletedProcess[str]":
        """What bash says to it; kept, for no password may be in it."""
        done = subprocess.run(
            ["bash", "-euc", script], cwd=self.folder / folder, env=self.environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.said += done.stdout + done.stderr
        return done

    def follow(self, title: str, folder: str = ".") -> str:
        done = self.run(self.block(title), folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        """This Python's programs, and the clone's own code behind `poemerge`."""
        programs = self.folder / "programs"
        path = os.pathsep.join(
            map(str, (programs, Path(sys.executable).parent, os.environ["PATH"]))
        )
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        return kept | {
            "PATH": path,
            "COLUMNS": "160",
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, zoo) -> Iterator[Team]:  # noqa: ANN001
    """Servers, accounts and remote as the page sets them up, and the worker's first run."""
    folder = tmp_path_factory.mktemp("team")
    mlflow_port, prefect_port = free_port(), free_port()
    mlflow, prefect = (f"http://127.0.0.1:{port}" for port in (mlflow_port, prefect_port))
    places = {
        "https://mlflow.example": mlflow,
        "https://prefect.example": prefect,
        "--port 5000": f"--port {mlflow_port} --workers 1",
        "--port 4200": f"--port {prefect_port}",
        "https://git.example/merges": str(folder / "origin"),
        "/mnt/team/dvc": str(folder / "remote"),
        **{f"<{name}>": value for name, value in SECRETS.items()},
    }
    team = Team(folder, places)
    for title in BLOCKS:
        if title.endswith(".env"):
            team.write(title)
    _write_programs(folder / "programs")
    _make_origin(folder / "origin", zoo)
    team.follow("project", "origin")

    def serve(title: str, health: str):  # noqa: ANN202
        command = ["bash", "-euc", team.block(title)]
        return running(command, folder / f"{title}.log", team.environment, health)

    with (
        serve("mlflow server", f"{mlflow}/health"),
        serve("prefect server", f"{prefect}/api/health"),
    ):
        team.follow("accounts")
        team.follow("worker")
        yield team


def _write_programs(folder: Path) -> None:
    folder.mkdir()
    for name, module in (("poemerge", "flows.cli"), ("dvc", "dvc")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        program.chmod(0o755)


def _make_origin(folder: Path, zoo) -> None:  # noqa: ANN001
    """The tiny project under the page's name, with two methods, in git."""
    make_project(folder, zoo)
    params = PARAMS.format(base="data/base").replace("name: tiny", f"name: {NAME}")
    dropped = ("task_arithmetic", "dare_ties", "gaussian_poe", "average")
    kept = [line for line in params.splitlines() if not line.strip().startswith(dropped)]
    (folder / "params.yaml").write_text("\n".join(kept) + "\n" + PROMOTE)
    for command in (["git", "add", "-A"], ["git", "commit", "-q", "-m", "A project"]):
        subprocess.run(command, cwd=folder, check=True)


def test_a_worker_runs_and_pushes(team: Team) -> None:
    stages = yaml.safe_load((team.folder / "worker/dvc.lock").read_text())["stages"]
    made = {out["md5"] for stage in stages.values() for out in stage["outs"]}
    kept = {path.parent.name + path.name for path in (team.folder / "remote").rglob("*.dir")}
    assert made < kept  # and the version's own
    local = (team.folder / "worker/.dvc/config.local").read_text()
    assert str(team.folder / "remote") in local
    clean = team.run("git status --porcelain -- .dvc", "worker")
    assert clean.stdout == ""


def test_prefect_links_the_report_in_mlflow(team: Team) -> None:
    script = """
set -a; . ../worker.env; set +a
python -c '
import mlflow, re
from prefect.artifacts import Artifact

text = Artifact.get("report").data
run, path = re.search(r"/runs/(\\w+)/artifacts/(.*)[)]", text).groups()
print(text)
print(mlflow.artifacts.load_text(mlflow.get_run(run).info.artifact_uri + "/" + path))
'
"""
    done = team.run(script, "worker")
    assert done.returncode == 0, done.stderr
    link, *page = done.stdout.splitlines()
    assert link.startswith(f"[the page, in MLflow]({team.places['https://mlflow.example']}/#/")
    assert (
        "\n".join(page).strip()
        == (team.folder / "worker/artifacts/report/index.html").read_text().strip()
    )


def test_a_reader_loads_the_champion_with_an_empty_cache(team: Team) -> None:
    said, folder, *lineage = team.follow("reader").splitlines()
    assert said.startswith("Question: ")
    record = Lineage.find(Path(folder))
    assert record.outputs.items() <= hash_files(Path(folder)).items()
    assert any(record.params["method"] in line for line in lineage)
    assert not (team.folder / "reader/artifacts").exists()


@pytest.mark.parametrize(
    ("forgotten", "sentence"),
    [
        (
            "MLFLOW_TRACKING_PASSWORD",
            r"error: MLflow at \S+ does not know who asks; set MLFLOW_\S+ ",
        ),
        (
            "PREFECT_API_AUTH_STRING",
            r"error: Prefect at \S+ does not know who asks; set PREFECT_\S+",
        ),
    ],
)
def test_who_does_not_say_who_he_is_gets_one_sentence(
    team: Team, forgotten: str, sentence: str
) -> None:
    script = f"set -a; . ../worker.env; set +a; unset {forgotten}; poemerge run --force"
    refused = team.run(script, "worker")
    assert refused.returncode == 1
    assert re.search(f"^{sentence}", refused.stderr, flags=re.MULTILINE), refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr


def test_a_reader_may_not_move_what_is_live(team: Team) -> None:
    script = f"""
set -a; . ../reader.env; set +a
python -c '
from tasks.tracking import connected
with connected() as client:
    client.set_registered_model_alias("{NAME}", "champion", "1")
'
"""
    refused = team.run(script, "worker")
    assert refused.returncode == 1
    assert "does not allow that to reader; ask its administrator" in refused.stderr


def test_without_a_remote_a_push_is_refused_before_any_work(team: Team) -> None:
    script = "set -a; . ../worker.env; set +a; dvc remote default --unset; poemerge run --push"
    refused = team.run(f"cp -r worker alone; cd alone; {script}")
    assert refused.returncode == 1
    assert "has no default DVC remote to push to; add one: `dvc remote add -d" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_nothing_on_the_page_is_left_out(team: Team) -> None:
    assert team.used | {"reader"} == set(BLOCKS)  # a test of its own follows that one


def test_no_password_is_anywhere(team: Team) -> None:
    """In no output, log, database, clone or remote; the env files apart."""
    for name, secret in SECRETS.items():
        assert secret not in team.said, name
        for path in team.folder.rglob("*"):
            if path.is_file() and path.suffix != ".env":
                assert secret.encode() not in path.read_bytes(), (name, path)
    assert (team.folder / "worker.env").stat().st_mode & 0o777 == 0o600
