"""Pickles that would run a program: in folders, registries, caches and data, none of them does."""

import ast
import io
import pickle
import pickletools
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from poemerge.errors import PoemergeError
from tasks.dvc_store.reference import put
from tasks.fetch import fetch
from tasks.tracking import tracking_uri
from tests.reliability.trials import Trials
from tests.tasks.registry import new_repository
from tests.zoo import Zoo

ROOT = Path(__file__).parents[2]
CODE = [p for part in ("poemerge", "tasks", "flows") for p in sorted((ROOT / part).rglob("*.py"))]


class Payload:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return Path.touch, (self.canary,)


def saved(value: object, **how: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **how)
    return stream.getvalue()


def reducing(canary: Path) -> bytes:
    """A tensor whose rebuilding is given a payload among its arguments."""
    tensor = torch.ones(2)

    class Rebuilt:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_parameter, (tensor, Payload(canary), OrderedDict())

    return saved({"w": Rebuilt()})


def by_name(canary: Path) -> bytes:
    """Protocol 0, by hand: no class of ours is needed where it is read."""
    return f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()


def stacked(canary: Path) -> bytes:
    """STACK_GLOBAL, as newer protocols name things, in torch's own archive."""
    data = pickle.dumps({"w": Payload(canary)}, protocol=4)
    assert any(code.name == "STACK_GLOBAL" for code, *_ in pickletools.genops(data))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def objects(canary: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return stream.getvalue()


FORMS: dict[str, Callable[[Path], bytes]] = {
    "torch archive": lambda canary: saved({"w": Payload(canary)}),
    "torch before archives": lambda canary: saved(
        {"w": Payload(canary)}, _use_new_zipfile_serialization=False
    ),
    "ordered": lambda canary: saved(OrderedDict(w=torch.ones(2), evil=Payload(canary))),
    "as a key": lambda canary: saved([("w", torch.ones(2)), Payload(canary)]),
    "rebuilding": reducing,
    "by name": by_name,
    "stacked": stacked,
    "numpy": objects,
    **{
        f"protocol {number}": lambda canary, number=number: pickle.dumps(
            {"w": Payload(canary)}, protocol=number
        )
        for number in range(6)
    },
}
NAMES = ("pytorch_model.bin", "adapter_model.bin", "pytorch_model-00001-of-00001.bin")
BESIDE = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "x.joblib")
PLACES = ("folder", "MLflow", "DVC")


def place(kind: str, folder: Path, name: str) -> str:
    """Put a folder where a source may be; the source."""
    if kind == "folder":
        return str(folder)
    if kind == "DVC":
        inside = Path("sources", name)
        shutil.copytree(folder, inside)
        return put(inside).uri
    (folder / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n"
        "    python_model: python_model.pkl\n    cloudpickle_version: 3.1.0\n"
    )
    shutil.copy(next(folder.glob("*.bin")), folder / "python_model.pkl")
    client = MlflowClient(tracking_uri=tracking_uri())
    run = client.create_run("0")
    client.log_artifacts(run.info.run_id, str(folder), "model")
    client.create_registered_model(name)
    client.create_model_version(name, f"{run.info.artifact_uri}/model")
    return f"models:/{name}/1"


@pytest.fixture
def repository(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Git, DVC and MLflow, and the working directory in them."""
    new_repository(tmp_path / "repository", database)
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/repository/mlflow.db")
    return tmp_path / "repository"


def fires(form: str, canary: Path) -> bool:
    """True if the payload does what it should where somebody is careless."""
    data = FORMS[form](canary)
    reads = (
        lambda: pickle.loads(data),
        lambda: torch.load(io.BytesIO(data), weights_only=False),
        lambda: np.load(io.BytesIO(data), allow_pickle=True),
    )
    for read in reads:
        with suppress(Exception):  # of another form
            read()
    found = canary.exists()
    canary.unlink(missing_ok=True)
    return found


def test_weights(trials: Trials, repository: Path, tmp_path: Path) -> None:
    """A malicious pickle as weights (a folder's, MLflow's, DVC's) is refused, and not run"""
    cases = [(f, n, p) for f in FORMS for n in NAMES for p in PLACES]
    step = 37  # has no factor in common with their number: a few are of all kinds
    for number in trials(short=8, full=len(cases)):
        with trials.trial(number):
            form, name, kind = cases[number * step % len(cases)]
            canary = tmp_path / f"canary-{number}"
            assert fires(form, canary), form
            folder = tmp_path / f"in-{number}"
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            (folder / name).write_bytes(FORMS[form](canary))
            with pytest.raises(PoemergeError, match="was refused"):
                fetch.fn("base", place(kind, folder, f"evil-{number}"), tmp_path / "out")
            assert not canary.exists()
            assert not (tmp_path / "out").exists()


def test_beside(trials: Trials, repository: Path, tmp_path: Path, zoo: Zoo) -> None:
    """A malicious pickle beside sound weights is neither read nor taken along"""
    cases = [(f, n) for f in FORMS for n in BESIDE]
    for number in trials(short=4, full=len(cases)):
        with trials.trial(number):
            form, name = cases[number * 19 % len(cases)]
            canary, out = tmp_path / f"canary-{number}", tmp_path / f"out-{number}"
            folder = shutil.copytree(zoo.base(), tmp_path / f"in-{number}")
            (folder / name).write_bytes(FORMS[form](canary))
            fetch.fn("base", str(folder), out)
            assert not canary.exists()
            assert not {path.suffix for path in out.iterdir()} - {".safetensors", ".json", ".jinja"}


def test_our_code(trials: Trials) -> None:
    """No file of poemerge imports what unpickles, or asks a library to"""
    for number in trials(short=len(CODE), full=len(CODE)):
        with trials.trial(number):
            tree = ast.parse(CODE[number].read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    named = {alias.name.split(".")[0] for alias in node.names}
                    named.add((getattr(node, "module", "") or "").split(".")[0])
                    assert not named & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
                if isinstance(node, ast.Call):
                    asked = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                    assert not asked.get("allow_pickle")
                    assert not asked.get("trust_remote_code")
                    if ast.unparse(node.func) == "torch.load":
                        assert asked.get("weights_only") is True
