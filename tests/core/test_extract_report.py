"""What an extraction says: errors, what is dropped or untouched, its lineage and progress."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.extract import extract_adapter
from poemerge.hashing import hash_files
from poemerge.lineage import Lineage
from tests.core.extracted import EMBEDDING, HEAD, MATRIX, by_name, weights
from tests.zoo import Zoo, add_noise, load, merged_by_peft, save

NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_errors_are_those_of_the_stored_factors(
    zoo: Zoo, tmp_path: Path, dtype: str, svd: str
) -> None:
    report = extract_adapter(
        zoo.base(), zoo.full(1), tmp_path / "a", 3, svd=svd, dtype=dtype, vectors="drop"
    )
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {str(t.dtype) for t in stored.values()} == {f"torch.{dtype}"}
    start, tuned = weights(zoo.base()), weights(zoo.full(1))
    missed = 0.0
    for tensor in report.tensors:
        delta = (tuned[tensor.name] - start[tensor.name]).double()
        found = torch.zeros_like(delta)
        if tensor.done == "factors":
            key = f"base_model.model.{tensor.name.removesuffix('.weight')}."
            table = tensor.name == EMBEDDING
            keys = ("lora_embedding_A", "lora_embedding_B") if table else None
            down, up = (stored[key + k] for k in keys or ("lora_A.weight", "lora_B.weight"))
            found = up.double() @ down.double()
            found = found.T if table else found
        error = float((delta - found).norm() / delta.norm())
        assert tensor.error == pytest.approx(error, rel=1e-6)
        assert tensor.norm == pytest.approx(float(delta.norm()), rel=1e-6)
        assert tensor.share == pytest.approx(1 - error**2, rel=1e-6)
        missed += float((delta - found).norm()) ** 2
    whole = math.hypot(*(float((tuned[n] - start[n]).norm()) for n in start))
    assert report.error == pytest.approx(math.sqrt(missed) / whole, rel=1e-6)
    record = json.loads((tmp_path / "a/extract_report.json").read_text())
    assert record["error"] == report.error
    assert [t["name"] for t in record["tensors"]] == sorted(start)
    assert record["worst"] == max(report.factors, key=lambda t: t.error).name


def test_dropped_vectors_are_named_with_what_is_lost(
    zoo: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = extract_adapter(zoo.base(), zoo.full(1), tmp_path / "a", 4, vectors="drop")
    dropped = [tensor for tensor in report.tensors if tensor.done == "dropped"]
    assert {len(tensor.shape) for tensor in dropped} == {1}
    assert {tensor.error for tensor in dropped} == {1.0}
    lost = math.hypot(*(tensor.norm for tensor in dropped))
    (warning,) = report.warnings
    assert f"{dropped[0].name} and {len(dropped) - 1} more are dropped" in warning
    assert f"norm {lost:.3g}" in warning
    assert warning in caplog.messages
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert "modules_to_save" not in config
    assert warning in (tmp_path / "a/README.md").read_text()


def test_vocabulary_dropped(zoo: Zoo, tmp_path: Path) -> None:
    report = extract_adapter(zoo.base(), zoo.full(1), tmp_path / "a", 4, vocabulary="drop")
    dropped = {t.name: t.reason for t in report.tensors if t.done == "dropped"}
    assert dropped == {HEAD: "vocabulary=drop", EMBEDDING: "vocabulary=drop"}
    merged, start = merged_by_peft(zoo.base(), tmp_path / "a"), weights(zoo.base())
    assert torch.equal(merged[HEAD], start[HEAD])
    assert torch.equal(merged[EMBEDDING], start[EMBEDDING])


def test_what_did_not_move_is_untouched(zoo: Zoo, tmp_path: Path) -> None:
    model = load(zoo.base())
    add_noise(model, 1, 0.01, only="layers.1.mlp.up_proj")
    save(model, tmp_path / "expert")
    report = extract_adapter(zoo.base(), tmp_path / "expert", tmp_path / "a", 4)
    assert {t.name for t in report.tensors if t.done != "untouched"} == {MATRIX}
    assert len(load_file(tmp_path / "a/adapter_model.safetensors")) == 2
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_modules"] == [MATRIX.removesuffix(".weight")]
    assert report.worst.name == MATRIX


def test_lineage_says_what_made_it(zoo: Zoo, tmp_path: Path) -> None:
    extract_adapter(zoo.base(), zoo.full(1), tmp_path / "a", 4, vectors="drop")
    record = Lineage.find(tmp_path / "a")
    assert record is not None
    assert record.stage == "extract"
    assert record.params["rank"] == 4
    assert record.params["vectors"] == "drop"
    assert [source.name for source in record.inputs] == ["base", "expert"]
    assert record.inputs[1].files == hash_files(zoo.full(1))
    assert record.outputs == hash_files(tmp_path / "a")
    assert record.is_current(tmp_path / "a")
    card = (tmp_path / "a/README.md").read_text()
    assert f'base_model: "{zoo.base().name}"' in card
    assert str(tmp_path) not in card + (tmp_path / "a/lineage.json").read_text()


def test_progress_and_overwrite(zoo: Zoo, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    (tmp_path / "a").mkdir()
    (tmp_path / "a/old").write_text("")
    extract_adapter(
        zoo.base(), zoo.full(1), tmp_path / "a", 1,
        overwrite=True, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1] == (len(seen), len(seen))
    assert not (tmp_path / "a/old").exists()


def test_an_expert_that_lacks_tensors_or_has_more(zoo: Zoo, tmp_path: Path) -> None:
    expert = Path(shutil.copytree(zoo.full(1), tmp_path / "expert"))
    tensors = load_file(expert / "model.safetensors")
    del tensors[NORM]
    save_file(tensors | {"extra.weight": torch.ones(3)}, expert / "model.safetensors")
    report = extract_adapter(zoo.base(), expert, tmp_path / "a", 4)
    assert by_name(report)[NORM].reason == "not in the expert"
    assert any(NORM in w for w in report.warnings)
    assert any("extra.weight" in w for w in report.warnings)


def test_a_head_of_its_own_is_missed(zoo: Zoo, tmp_path: Path) -> None:
    report = extract_adapter(zoo.base(tied=True), zoo.full(1), tmp_path / "a", 4)
    assert any("output head of its own" in warning for warning in report.warnings)
