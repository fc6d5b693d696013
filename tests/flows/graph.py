"""A project with the shape of this one's graph, whose stages write down what came in."""

import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo

from flows import versioning

# The shape of the project's own graph.
GRAPH = """
stages:
  fetch:
    cmd: python code/stage.py fetch
    deps: [code]
    params: [fetch]
    outs: [artifacts/fetch: {persist: true}]
  task_vectors:
    cmd: python code/stage.py task_vectors
    deps: [code, artifacts/fetch]
    params: [task_vectors]
    outs: [artifacts/task_vectors: {persist: true}]
  merge:
    foreach: ${merge.methods}
    do:
      cmd: python code/stage.py merge ${key}
      deps: [code, artifacts/fetch]
      params: ["merge.strength", "merge.methods.${key}"]
      outs: ["artifacts/merge/${key}": {persist: true}]
  evaluate:
    cmd: python code/stage.py evaluate
    deps: [code, artifacts/fetch, artifacts/merge]
    params: [evaluate, merge.methods]
    outs: [artifacts/evaluate: {persist: true}]
  register:
    cmd: python code/stage.py register
    deps: [code, artifacts/fetch/base, artifacts/merge, artifacts/evaluate]
    params: [register, merge.methods]
    outs: [artifacts/register: {persist: true}]
"""
CONFIG = """
[core]
    analytics = false
    autostage = false
[cache]
    type = "hardlink,copy"
"""
PARAMS: dict[str, Any] = {
    "fetch": {"base": "tiny"},
    "task_vectors": {},
    "merge": {"strength": 1.0, "methods": {"ties": {"density": 0.2}, "average": {}}},
    "evaluate": {"limit": 4},
    "register": {"choose": "mean"},
}
STAGE = """
import json, sys, yaml
from pathlib import Path
from poemerge.lineage import Lineage, Source, produce

INPUTS = {"task_vectors": "fetch", "merge": "fetch", "evaluate": "merge", "register": "evaluate"}

def stage(params, name, label=""):
    "What came in and the settings, written down."
    settings = params[name]["methods"][label] if label else params[name]
    inputs = [Source.of(name, Path("artifacts", INPUTS[name]))] if name in INPUTS else []
    text = json.dumps([settings, [dict(source.files) for source in inputs]])
    record = Lineage(name, {"settings": settings, "label": label}, tuple(inputs))
    inner = "base/out.json" if name == "fetch" else "out.json"

    def work(folder):
        (folder / inner).parent.mkdir(exist_ok=True)
        (folder / inner).write_text(text)

    return produce(Path("artifacts", name, label), record, work)

if __name__ == "__main__":
    made = stage(yaml.safe_load(Path("params.yaml").read_text()), *sys.argv[1:])
    print("made" if made else "current", *sys.argv[1:])
"""


def names(params: dict[str, Any]) -> list[str]:
    merges = [f"merge@{label}" for label in params["merge"]["methods"]]
    return ["fetch", "task_vectors", *merges, "evaluate", "register"]


def flow(params: dict[str, Any]) -> list[str]:
    """Run every stage function, committing each as it is done; the stages that did work."""
    stage = runpy.run_path("code/stage.py")["stage"]
    busy = []
    for name in names(params):
        if stage(params, *name.split("@")):
            busy.append(name)
        versioning.commit([name], params)
    return busy


def write(params: dict[str, Any]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def changed(density: float) -> dict[str, Any]:
    merge = PARAMS["merge"] | {"methods": {"ties": {"density": density}, "average": {}}}
    return PARAMS | {"merge": merge}


def make(root: Path) -> Path:
    """A git and DVC repository set up as the project's own."""
    (root / "code").mkdir(parents=True)
    os.chdir(root)
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    Path(".dvc/config").write_text(CONFIG)
    Path(".dvcignore").write_text("__pycache__\n*.partial\n")
    Path(".gitignore").write_text("/artifacts/\n__pycache__/\n")
    Path("dvc.yaml").write_text(GRAPH)
    Path("code/stage.py").write_text(STAGE)
    write(PARAMS)
    return root


def lock() -> bytes:
    return Path("dvc.lock").read_bytes()


def in_lock() -> list[str]:
    return list(yaml.safe_load(lock())["stages"])
