"""The paper's experiments: their settings, plans and merges, on tiny models of the same kinds."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from flows.params import load
from flows.places import PLAIN, Places
from flows.steps import STAGES, steps
from poemerge.merging.plan import plan_merge
from tests.examples import tiny
from tests.examples.conftest import Makers
from tests.examples.paper import FILES, GLUE, ROOT, copied, look, strict
from tests.flows.conftest import PARAMS

IMAGES = ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
# Of the published code: epsilon, strength.
PUBLISHED = {
    "flan-t5-base-lora16.yaml": (0.01, 1.0),
    "flan-t5-large-lora16.yaml": (0.01, 1.0),
    "vit-b32-full.yaml": (0.3, 1.0),
    "vit-b32-lora16.yaml": (2.0, 0.3),
    "vit-l14-full.yaml": (0.01, 1.0),
    "vit-l14-lora16.yaml": (0.01, 0.25),
}
RULES = {  # of the tiny models below; what no expert has is copied
    ("t5", False): {"matrix": 12, "copy": 40},
    ("clip", False): {"matrix": 8, "copy": 71},  # position_ids included, as in the .bin
    ("clip", True): {"matrix": 13, "average": 26, "copy": 40},
}


def on_tiny(name: str, makers: Makers, folder: Path) -> list[str]:
    """Overrides that put tiny models where `name` has those of the hub; stored as there."""
    kind, full = "t5" if name.startswith("flan") else "clip", "full" in name
    base = copied(makers.base(kind), folder / "base")
    if kind == "clip":
        ids = torch.arange(5)[None]
        tiny.pickled(base, "pytorch_model.bin", **{"vision_model.embeddings.position_ids": ids})
    overrides = [f"fetch.base.source={base}"]
    for seed, task in enumerate(load(ROOT / name).fetch.experts, start=1):
        expert = copied(makers.expert(kind, seed, full=full), folder / task)
        if kind == "clip" and not full:
            tiny.pickled(expert, "adapter_model.bin")
        overrides.append(f"fetch.experts.{task}.source={expert}")
    return overrides


def test_all_experiments_are_there() -> None:
    assert sorted(PUBLISHED) == FILES


@pytest.mark.parametrize("name", FILES)
def test_settings_are_the_published_ones(name: str) -> None:
    params, (epsilon, strength) = load(ROOT / name), PUBLISHED[name]
    tasks = GLUE if name.startswith("flan") else IMAGES
    assert tuple(params.fetch.experts) == tasks
    assert params.evaluate.tasks == (list(GLUE) if name.startswith("flan") else [])
    paper = {"strength": strength, "preset": "paper"}
    assert params.merge.candidate("gaussian_poe") == ("gaussian_poe", paper)
    assert params.merge.candidate("cauchy_poe") == ("cauchy_poe", paper | {"epsilon": epsilon})
    for source in (params.fetch.base, *params.fetch.experts.values()):
        assert source.source.startswith("hf://")


@pytest.mark.parametrize("name", FILES)
def test_every_candidate_is_planned(
    name: str, makers: Makers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = load(ROOT / name, on_tiny(name, makers, tmp_path / "hub"))
    places = Places(params, params)
    for step in steps("fetch", places):
        assert step.run()
    kind, full = "t5" if name.startswith("flan") else "clip", "full" in name
    for label in params.merge.methods:
        method, settings = params.merge.candidate(label)
        with plan_merge(places.base, places.experts, method, settings) as plan:
            assert not [note for note in plan.notes if "left out" in note or "lacks" in note]
            counts = Counter(plan.rules.values())
        if label.endswith("poe"):
            assert counts == RULES[kind, full]
        assert counts["copy"] == RULES[kind, full]["copy"]


def test_what_lm_eval_cannot_score_is_merged_beside_the_project(
    makers: Makers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load(ROOT / FILES[-1], on_tiny(FILES[-1], makers, tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS.format(base="not/there"))
    places = Places(params, load(PLAIN))
    done = [step.name for stage in STAGES for step in steps(stage, places) if step.run()]
    assert done[-len(params.merge.methods) :] == [f"merge {m}" for m in params.merge.methods]
    for label in params.merge.methods:
        tower = strict(places.merge(label), CLIPModel).vision_model
        assert look(tower).isfinite().all()
    assert not Path("artifacts").exists()
