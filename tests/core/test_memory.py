"""What a merge takes, measured from outside, against what its plan says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import poemerge
from poemerge.merging.memory import OVERHEAD

FILE = "model.safetensors"
PROBE = """
import json, sys
from pathlib import Path
from poemerge.merge import merge_checkpoints
from poemerge.merging.plan import plan_merge
from poemerge.merging.terms import LENIENT

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {l.split(":")[0]: int(l.split()[1]) << 10 for l in lines if l.startswith("Vm")}

root, method, settings, memory = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), None
if len(sys.argv) > 4:
    memory = int(sys.argv[4])
experts = {"a": root / "a", "b": root / "b"}
with plan_merge(root / "base", experts, method, settings, LENIENT) as plan:
    planned = plan.peak_bytes(budget=memory)
before = peak()["VmHWM"]
merge_checkpoints(
    root / "base", experts, root / "out", method, "cpu", memory=memory, overwrite=True,
    foreign="warn", **settings
)
print(json.dumps([planned, before, peak()["VmHWM"]]))
"""


# What is freed goes back at once: else glibc keeps blocks below 32 MB, and holds them for nothing.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
THREADS = 24 << 20  # their stacks and buffers, which come with the first merge


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts of 38 MB each: an embedding, square, wide, tall matrices, vectors."""
    root = tmp_path_factory.mktemp("large")
    shapes = {"model.embed_tokens.weight": (8000, 256), "norm.weight": (256,)}
    shapes |= {f"layers.{i}.q_proj.weight": (768, 768) for i in range(4)}
    shapes |= {f"layers.{i}.up_proj.weight": (2048, 640) for i in range(2)}
    shapes |= {f"layers.{i}.down_proj.weight": (640, 2048) for i in range(2)}
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        (root / name).mkdir()
        size = 1.0 + seed  # unlike in size, or reweighting takes its time to part them
        tensors = {n: size * torch.randn(s, generator=generator) for n, s in shapes.items()}
        save_file(tensors, root / name / FILE)
    return root


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize(
    ("method", "settings", "tight"),
    [
        ("average", {}, 24 << 20),
        ("ties", {}, 100 << 20),
        ("model_stock", {}, 0),
        ("knots_ties", {}, 0),
        ("tsv_m", {}, 0),
        ("iso_c", {}, 0),
        ("cauchy_poe", {}, 0),
        ("gaussian_poe", {"side": "output", "ridge": 1e-6, "ridge_mode": "absolute"}, 0),
    ],
)
def test_no_merge_takes_more_memory_than_is_planned(
    large: Path, method: str, settings: dict[str, object], tight: int
) -> None:
    arguments = [str(large), method, json.dumps(settings)]
    if tight:
        arguments.append(str(OVERHEAD + tight))
    told = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=Path(poemerge.__file__).parents[1],
        env=os.environ | RETURNED,
        capture_output=True,
        text=True,
        check=True,
    )
    planned, before, peak = json.loads(told.stdout)
    assert peak <= planned
    assert peak - before <= planned - OVERHEAD + THREADS
    if tight:
        assert planned <= OVERHEAD + tight
