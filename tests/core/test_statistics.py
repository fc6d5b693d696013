"""Statistics of task vectors: from factors the same as from what they multiply to."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from poemerge.merge import expert_weights
from poemerge.statistics import describe_task_vectors
from tests.zoo import Zoo


def updates(base: Path, expert: Path) -> dict[str, torch.Tensor]:
    start = load_file(base / "model.safetensors")
    return {n: (w - start[n]).double() for n, w in expert_weights(base, expert)}


def test_norms_and_cosines(zoo: Zoo) -> None:
    experts = {"full": zoo.full(1), "a": zoo.adapter(1), "b": zoo.adapter(2, r=2)}
    found = describe_task_vectors(zoo.base(), experts)
    json.dumps(found, allow_nan=False)
    dense = {name: updates(zoo.base(), folder) for name, folder in experts.items()}
    flat = torch.stack([torch.cat([u.flatten() for u in d.values()]) for d in dense.values()])
    norms = flat.norm(dim=1)
    assert [e["norm"] for e in found["experts"].values()] == pytest.approx(norms.tolist(), rel=1e-5)
    cosines = (flat / norms[:, None]) @ (flat / norms[:, None]).T
    assert torch.allclose(torch.tensor(found["cosines"]).double(), cosines, atol=1e-5)
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = [float(d[name].norm()) for d in dense.values()]
    assert found["tensors"][name] == pytest.approx(expected, rel=1e-5)


def test_ranks(zoo: Zoo) -> None:
    experts = {"full": zoo.full(1), "a": zoo.adapter(1), "b": zoo.adapter(2, r=2)}
    found = describe_task_vectors(zoo.base(), experts)["experts"]
    assert [entry["rank"] for entry in found.values()] == [None, 4, 2]
    assert [entry["tensors"] for entry in found.values()] == [21, 8, 8]
    assert 1 <= found["b"]["effective_rank"] <= 2 < found["a"]["effective_rank"] <= 4
    spread = []
    for update in updates(zoo.base(), experts["a"]).values():
        if update.any():
            values = torch.linalg.svdvals(update).square()
            spread.append(float(values.sum() ** 2 / values.square().sum()))
    assert found["a"]["effective_rank"] == pytest.approx(sum(spread) / len(spread), rel=1e-4)
