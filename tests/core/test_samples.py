"""Posterior merges as folders: complete, reproducible, as small as the mode; or refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from poemerge import describe_uncertainty, merge_checkpoints
from poemerge.errors import PoemergeError
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from poemerge.merge import SAMPLES, expert_weights
from poemerge.merging.plan import plan_merge
from tests.core.stacks import distance
from tests.zoo import Zoo


def merge(zoo: Zoo, out: Path, method: str = "cauchy_poe", **options: object) -> Path:
    experts = {f"e{seed}": zoo.full(seed) for seed in (1, 2, 3)}
    merge_checkpoints(zoo.base(), experts, out, method, "cpu", **options)
    return out


def adapters(zoo: Zoo) -> dict[str, Path]:
    return {f"a{seed}": zoo.adapter(seed) for seed in (1, 2, 3)}


def folders(out: Path) -> list[Path]:
    return sorted(Path(f"{out}{SAMPLES}").iterdir())


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_mode_is_what_it_is_without_samples(zoo: Zoo, tmp_path: Path) -> None:
    with_samples = merge(zoo, tmp_path / "with", samples=2)
    without = merge(zoo, tmp_path / "without")
    assert hash_files(with_samples) == hash_files(without)
    one, other = (Lineage.find(folder) for folder in (with_samples, without))
    assert one is not None
    assert one == other
    assert not Path(f"{without}{SAMPLES}").exists()


def test_samples_are_complete_models(zoo: Zoo, tmp_path: Path) -> None:
    out = merge(zoo, tmp_path / "out", samples=3, temperature=0.5)
    assert [folder.name for folder in folders(out)] == ["000", "001", "002"]
    mode = weights(out)
    for index, folder in enumerate(folders(out)):
        assert {f.name for f in folder.iterdir()} == {f.name for f in out.iterdir()}
        stored = weights(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert all(torch.equal(w, stored[n]) for n, w in model.state_dict().items())
        for name, weight in mode.items():
            # What is averaged has no posterior.
            assert torch.equal(stored[name], weight) == (weight.ndim == 1), name
        record = Lineage.find(folder)
        assert record is not None
        drawn = {"draw": index, "sampler": "laplace", "temperature": 0.5}
        assert record.params["posterior"] == drawn
        assert record.outputs == hash_files(folder)
    assert not torch.equal(*(weights(f)["lm_head.weight"] for f in folders(out)[:2]))


def test_samples_are_as_far_off_as_their_report_says(zoo: Zoo, tmp_path: Path) -> None:
    out = merge(zoo, tmp_path / "out", samples=1, temperature=4.0)
    (folder,) = folders(out)
    base = dict(expert_weights(zoo.base(), None))
    mode, drawn = weights(out), weights(folder)
    report = json.loads((folder / "merge_report.json").read_text())
    told = {
        t["name"]: t["certificate"]["relative_std"] for t in report["tensors"] if t["certificate"]
    }
    assert told.keys() == {name for name, weight in mode.items() if weight.ndim == 2}
    for name, relative in told.items():
        off = distance(drawn[name] - base[name], mode[name] - base[name])
        assert off == pytest.approx(2 * relative, rel=0.2), name
    found = describe_uncertainty(zoo.base(), {f"e{s}": zoo.full(s) for s in (1, 2, 3)},
                                 "cauchy_poe", {}, device="cpu")  # fmt: skip
    assert found["tensors"] == {name: {"relative_std": std} for name, std in sorted(told.items())}
    assert found["unit"].startswith("relative_std is")


@pytest.mark.parametrize("sampler", ["laplace", "langevin"])
def test_seeds_decide(zoo: Zoo, tmp_path: Path, sampler: str) -> None:
    def drawn(name: str, **options: object) -> list[dict[str, str]]:
        out = tmp_path / name
        merge_checkpoints(zoo.base(), adapters(zoo), out, device="cpu", output="adapter",
                          sampler=sampler, **options)  # fmt: skip
        return [load_file(f / "adapter_model.safetensors") for f in folders(out)]

    one, again = drawn("one", samples=2), drawn("again", samples=3)
    other = drawn("other", samples=1, seed=1)
    for key in one[0]:
        assert torch.equal(one[0][key], again[0][key])
        assert torch.equal(one[1][key], again[1][key])
    assert any(not torch.equal(one[0][key], other[0][key]) for key in one[0])
    assert any(not torch.equal(one[0][key], one[1][key]) for key in one[0])


def test_sampled_adapters_are_experts_again(zoo: Zoo, tmp_path: Path) -> None:
    common = {"device": "cpu", "samples": 2, "temperature": 0.3}
    merge_checkpoints(zoo.base(), adapters(zoo), tmp_path / "lora", output="adapter", **common)
    merge_checkpoints(zoo.base(), adapters(zoo), tmp_path / "full", **common)
    for small, whole in zip(folders(tmp_path / "lora"), folders(tmp_path / "full"), strict=True):
        stored = weights(whole)
        for name, weight in expert_weights(zoo.base(), small):
            assert distance(weight, stored[name]) < 1e-6
    config = json.loads((folders(tmp_path / "lora")[0] / "adapter_config.json").read_text())
    assert config["r"] == 12


def test_langevin_reports_its_acceptance(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoints(zoo.base(), adapters(zoo), out, device="cpu", samples=1, sampler="langevin")
    report = json.loads((folders(out)[0] / "merge_report.json").read_text())
    rates = [t["certificate"]["acceptance"] for t in report["tensors"] if t["certificate"]]
    assert rates
    assert 0.45 < sum(rates) / len(rates) < 0.7


def test_sharded_samples_and_a_rank(zoo: Zoo, tmp_path: Path) -> None:
    experts = {f"e{seed}": zoo.full(seed, sharded=True) for seed in (1, 2)}
    merge_checkpoints(zoo.base(sharded=True), experts, tmp_path / "out", device="cpu", samples=2)
    names = {f.name for f in (tmp_path / "out").iterdir()}
    for folder in folders(tmp_path / "out"):
        assert {f.name for f in folder.iterdir()} == names
        assert "model.safetensors.index.json" in names
        AutoModelForCausalLM.from_pretrained(folder)
    merge_checkpoints(zoo.base(), adapters(zoo), tmp_path / "cut", device="cpu", samples=1,
                      output="adapter", rank=3)  # fmt: skip
    (folder,) = folders(tmp_path / "cut")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "ties", "samples": 1}, "ties has no posterior to draw samples from"),
        ({"samples": -1}, "samples is -1"),
        ({"samples": 1, "sampler": "gibbs"}, "sampler is 'gibbs'"),
        ({"samples": 1, "temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_refusals_leave_nothing(
    zoo: Zoo, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(PoemergeError, match=words):
        merge(zoo, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
    with pytest.raises(PoemergeError, match="ties has no posterior"):
        describe_uncertainty(zoo.base(), [zoo.full(1)], "ties", {})


def test_samples_in_the_way_are_kept(
    zoo: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out-samples").mkdir()
    (tmp_path / "out-samples" / "mine").write_text("keep")
    with pytest.raises(PoemergeError, match="out-samples exists already"):
        merge(zoo, tmp_path / "out", samples=1)
    assert (tmp_path / "out-samples" / "mine").exists()
    merge(zoo, tmp_path / "out", samples=1, overwrite=True)
    assert [folder.name for folder in folders(tmp_path / "out")] == ["000"]
    merge(zoo, tmp_path / "out", overwrite=True)
    assert "out-samples holds draws of an earlier merge" in caplog.text


def test_a_budget_counts_the_posterior(zoo: Zoo) -> None:
    cpu = torch.device("cpu")
    experts = {f"e{seed}": zoo.full(seed) for seed in (1, 2, 3)}
    with plan_merge(zoo.base(), experts, "cauchy_poe", {}) as plan:
        needs = plan.peak_bytes(cpu)
        assert plan.limit(cpu, needs) > 0
        with pytest.raises(PoemergeError, match="memory is"):
            plan.limit(cpu, needs, sampled=True)
        assert plan.limit(cpu, 2 * needs, sampled=True) > 0
