"""Extractions that are refused: in one sentence that says what to do, with nothing left."""

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from poemerge.errors import CheckpointError, NumericalError, PoemergeError, SettingError
from poemerge.extract import extract_adapter
from tests.core.extracted import MATRIX
from tests.zoo import Zoo, add_noise, load, save


class TestRefused:
    def check(
        self, zoo: Zoo, root: Path, error: type[PoemergeError], pattern: str, **changed: object
    ) -> None:
        before = set(root.iterdir())
        given = {"base": zoo.base(), "expert": zoo.full(1), "out": root / "out", "rank": 4}
        with pytest.raises(error, match=pattern) as caught:
            extract_adapter(**given | changed)
        assert set(root.iterdir()) == before
        sentence = str(caught.value)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert ";" in sentence, "what to do?"

    @pytest.mark.parametrize(
        ("changed", "pattern"),
        [
            ({"rank": 0}, "rank is 0; choose 1 or more"),
            ({"rank": -3}, "rank is -3"),
            ({"svd": "fast"}, "svd is 'fast'; choose auto"),
            ({"vectors": "factors"}, "vectors is 'factors'; choose keep, drop"),
            ({"vocabulary": "all"}, "vocabulary is 'all'; choose factors"),
            ({"dtype": "source"}, "dtype is 'source'; choose float32"),
            ({"device": "tpu"}, "device is 'tpu'; choose"),
        ],
    )
    def test_settings(
        self, zoo: Zoo, tmp_path: Path, changed: dict[str, object], pattern: str
    ) -> None:
        self.check(zoo, tmp_path, SettingError, pattern, **changed)

    def test_an_adapter(self, zoo: Zoo, tmp_path: Path) -> None:
        expert = zoo.adapter(1)
        self.check(zoo, tmp_path, SettingError, "is a PEFT adapter already; use", expert=expert)

    def test_the_base_itself(self, zoo: Zoo, tmp_path: Path) -> None:
        pattern = "equals the base; give the fine-tuned"
        self.check(zoo, tmp_path, CheckpointError, pattern, expert=zoo.base())

    def test_places(self, zoo: Zoo, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        there = tmp_path / "there"
        self.check(zoo, tmp_path, SettingError, "exists already; .*--overwrite", out=there)
        inside = zoo.base() / "a"
        self.check(zoo, tmp_path, SettingError, "lies in the source", out=inside, overwrite=True)

    def test_nothing_for_factors(self, zoo: Zoo, tmp_path: Path) -> None:
        model = load(zoo.base())
        add_noise(model, 1, 0.01, only="norm")
        save(model, tmp_path / "expert")
        expert = tmp_path / "expert"
        self.check(zoo, tmp_path, CheckpointError, "changes no matrix .*layernorm", expert=expert)

    @pytest.mark.parametrize("role", ["base", "expert"])
    def test_nan(self, zoo: Zoo, tmp_path: Path, role: str) -> None:
        source = zoo.base() if role == "base" else zoo.full(1)
        folder = Path(shutil.copytree(source, tmp_path / "nan"))
        tensors = load_file(folder / "model.safetensors")
        tensors[MATRIX][0, 0] = math.nan
        save_file(tensors, folder / "model.safetensors")
        pattern = f"{MATRIX} of .*{role}.* holds NaN" if role == "base" else f"{MATRIX} of expert"
        self.check(zoo, tmp_path, CheckpointError, pattern, **{role: folder})

    def test_what_does_not_fit_into_half_precision(self, zoo: Zoo, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(zoo.full(1), tmp_path / "large"))
        tensors = load_file(folder / "model.safetensors")
        tensors[MATRIX] *= 1e12
        save_file(tensors, folder / "model.safetensors")
        pattern = f"{MATRIX} does not fit into torch.float16; choose another"
        self.check(zoo, tmp_path, NumericalError, pattern, expert=folder, dtype="float16")
