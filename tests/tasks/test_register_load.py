"""MLflow loads what was registered by its own means, in processes that import it alone."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from poemerge.lineage import Source
from tasks.dvc_store.reference import contents, put
from tasks.promote import evidence
from tasks.register.flavor import company
from tasks.seq2seq import LENGTH
from tasks.tracking import connected
from tasks.versions import aliased
from tests.examples import tiny
from tests.servers import mlflow_server

TEXTS = ["red 1: ", "blue 22: "]
BASE = "hf://org/tiny@1"

LOAD = """
import hashlib, json, sys
import mlflow, mlflow.transformers
from transformers import set_seed

def digest(model):
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(k.encode() + v.numpy().tobytes() for k, v in state)).hexdigest()

found = {}
for name in sys.argv[2:]:
    uri = f"models:/{name}@challenger"
    loaded = mlflow.pyfunc.load_model(uri)
    set_seed(0)
    parts = mlflow.transformers.load_model(uri, return_type="components")
    said = loaded.predict(json.loads(sys.argv[1]))
    found[name] = {"said": said, "weights": digest(parts["model"])}
    if not parts["model"].config.is_encoder_decoder:
        found[name]["pipeline"] = type(mlflow.transformers.load_model(uri)).__name__
print(json.dumps(found))
"""


def digest(model: Any) -> str:
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(k.encode() + v.numpy().tobytes() for k, v in state)).hexdigest()


def damage(name: str) -> tuple[str, ...]:
    """What the gate `bytes` has against a challenger."""
    with connected() as client:
        version = aliased(client, name, "challenger")
        assert version
        return evidence.damage(version)


def load(*names: str) -> dict[str, Any]:
    """Challengers of these names as a fresh process in the working directory loads them."""
    command = [sys.executable, "-c", LOAD, json.dumps(TEXTS), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def register_as(name: str, store: str) -> Path:
    """Register the run in the working directory once more; the folder that was chosen."""
    from flows.params import load as load_params
    from flows.places import Places
    from flows.steps import steps

    path = Path("params.yaml")
    overrides = (f"register.name={name}", f"register.store={store}")
    places = Places(load_params(path, overrides), load_params(path))
    for step in steps("register", places, overrides):
        assert step.run()
    made = json.loads((places.register / "registration.json").read_text())
    return places.merge(made["candidate"])


@pytest.fixture(scope="module")
def project(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of a finished run that MLflow has not seen, and the working directory in it."""
    folder = tmp_path_factory.mktemp("load") / "project"
    ignored = shutil.ignore_patterns("mlflow.db", "mlruns")
    shutil.copytree(finished_run, folder, symlinks=True, ignore=ignored)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture
def merged(project: Path) -> Path:
    return project / "artifacts/merge/ties"


def check(found: dict[str, Any], model: Path) -> None:
    """A process said what the weights on disk say."""
    from transformers import AutoModelForCausalLM, pipeline, set_seed

    pipe = pipeline("text-generation", model=str(model))
    set_seed(0)
    said = [made[0]["generated_text"] for made in pipe(TEXTS)]
    assert all(
        text.startswith(given) and text != given for text, given in zip(said, TEXTS, strict=True)
    )
    weights = digest(AutoModelForCausalLM.from_pretrained(model))
    assert found == {"said": said, "weights": weights, "pipeline": "TextGenerationPipeline"}


def check_encoder_decoder(found: dict[str, Any], model: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    loaded, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
    )
    tokens = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    made = [loaded.generate(each, max_new_tokens=LENGTH)[0] for each in tokens]
    said = [tokenizer.decode(each, skip_special_tokens=True) for each in made]
    assert any(said)
    assert found == {"said": said, "weights": digest(loaded)}


def test_from_sqlite(project: Path) -> None:
    model = register_as("pointed", "dvc")
    assert register_as("copied", "copy") == model
    two_sided = tiny.flan_t5(project / "t5")
    with company(two_sided, BASE) as beside:
        source = put(two_sided, beside).uri
    client = MlflowClient(tracking_uri=f"sqlite:///{project}/mlflow.db")
    client.create_registered_model("two-sided")
    client.create_model_version("two-sided", source)
    client.set_registered_model_alias("two-sided", "challenger", "1")
    assert not damage("pointed") + damage("copied")
    found = load("pointed", "copied", "two-sided")
    check(found["pointed"], model)
    check(found["copied"], model)
    check_encoder_decoder(found["two-sided"], two_sided)


def test_over_a_server(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mlflow_server(tmp_path) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        model = register_as("far-pointed", "dvc")
        register_as("far-copied", "copy")
        assert not damage("far-pointed") + damage("far-copied")
        found = load("far-pointed", "far-copied")
        record = MlflowClient(url).get_model_version_by_alias("far-copied", "challenger")
    check(found["far-pointed"], model)
    check(found["far-copied"], model)
    assert record.tags["poemerge.digest"] == Source.of("model", model).digest


def test_nothing_is_stored_twice(merged: Path) -> None:
    with company(merged, BASE) as beside:
        files = contents(put(merged, beside))
    own = {path.name for path in merged.iterdir()}
    assert own < set(files)
    kept = {name: blob.md5 for name, blob in files.items()}
    tokenizer = {name for name in kept if name.startswith("components/tokenizer/")}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        Path(name).name for name in tokenizer
    }
    assert all(kept[name] == kept[Path(name).name] for name in tokenizer)
    assert set(kept) - own - tokenizer == {"MLmodel", "requirements.txt", "python_env.yaml"}
    assert [name for name in kept if name.endswith(".safetensors")] == ["model.safetensors"]


def test_the_same_model_has_the_same_reference(merged: Path) -> None:
    made = []
    for _ in range(2):
        with company(merged, BASE) as beside:
            made.append(put(merged, beside))
            text = (beside / "MLmodel").read_text()
    assert made[0] == made[1] != put(merged)
    described = yaml.safe_load(text)
    assert described["flavors"]["transformers"]["task"] == "text-generation"
    assert described["flavors"]["transformers"]["source_model_name"] == BASE
    assert str(merged.parent) not in text


def test_what_transformers_cannot_read_is_kept_without_mlmodel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of nobody"}')
    with caplog.at_level(logging.WARNING, "tasks"), company(tmp_path, BASE) as beside:
        assert not list(beside.iterdir())
    assert "is registered without MLmodel" in caplog.text
