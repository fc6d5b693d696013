"""What docs/family.md says is true: its code gives the methods it names, its tables are full."""

from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from flows.sections import MergeParams
from poemerge.methods import METHODS, find
from poemerge.poe.settings import HeavySettings, ProductSettings
from tests.core.stacks import assert_close
from tests.doc_pages import blocks, read, rows, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Where the code of family.md has run, and its variables."""
    folder = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, run("family.md")


@pytest.fixture
def merged(made: tuple[Path, dict]) -> Path:
    return made[0]


class TestFamily:
    @staticmethod
    def weights(folder: Path, kind: str) -> tuple[list, list]:
        """Weights and curvature of both experts."""
        tuned = [load_file(folder / n / "model.safetensors") for n in ("law", "code")]
        return tuned, [load_file(folder / f"{n}.{kind}.safetensors") for n in ("law", "code")]

    def test_curvature_is_what_its_name_says(self, made: tuple[Path, dict]) -> None:
        """Of the last expert: inputs by hand, and the Fisher of a bias that has a closed form."""
        folder, space = made
        data, model = space["data"], space["model"]
        inner = model[1](model[0](data)).detach()
        given = load_file(folder / "code.inputs.safetensors")
        assert given.keys() == {"0.weight", "2.weight"}
        assert_close(given["0.weight"], data.T @ data / len(data))
        assert_close(given["2.weight"], inner.T @ inner / len(data))
        information = load_file(folder / "code.fisher.safetensors")
        assert information.keys() == model.state_dict().keys()
        slopes = model[2](inner).softmax(dim=-1)  # of logsumexp in the last layer's bias
        assert_close(information["2.bias"], slopes.square().mean(dim=0).detach())

    def test_activations_give_regmean(self, merged: Path) -> None:
        tuned, given = self.weights(merged, "inputs")
        result = load_file(merged / "regmean" / "model.safetensors")
        for name in ("0.weight", "2.weight"):
            total = sum(g[name].double() for g in given)
            right = sum(
                w[name].double() @ g[name].double() for w, g in zip(tuned, given, strict=True)
            )
            assert_close(result[name], torch.linalg.solve(total, right, left=False), 1e-4)
        assert_close(result["0.bias"], (tuned[0]["0.bias"] + tuned[1]["0.bias"]) / 2)

    def test_fisher_gives_fisher_merging(self, merged: Path) -> None:
        tuned, given = self.weights(merged, "fisher")
        result = load_file(merged / "fisher" / "model.safetensors")
        for name, tensor in result.items():
            total = given[0][name] + given[1][name]
            mean = sum(w[name] * f[name] for w, f in zip(tuned, given, strict=True)) / total
            assert_close(tensor, mean, 1e-4)

    def test_presets_are_as_shown(self) -> None:
        shown = {
            cells[0].strip("`"): cells[1] for cells in rows("family.md", "| `preset` | sets |")
        }
        assert shown.keys() == ProductSettings.presets.keys()
        for preset, values in ProductSettings.presets.items():
            extra = HeavySettings.presets[preset]
            for name, value in {**values, **extra}.items():
                assert f"`{name}: {value}`" in shown[preset]

    def test_every_precision_tail_and_granularity_is_named(self) -> None:
        text = read("family.md")
        choices = {f: ProductSettings.__dataclass_fields__[f].metadata["choices"]
                   for f in ("precision", "granularity", "side")}  # fmt: skip
        assert all(f"`{c}`" in text or f"side: {c}" in text for cs in choices.values() for c in cs)
        assert all(f"`{name}`" in text for name in METHODS if name.endswith("_poe"))

    def test_parameters_are_accepted(self) -> None:
        shown = blocks("family.md", "yaml")
        assert len(shown) == 2
        rest = {"device": "cpu", "dtype": "source", "strength": 1.0, "seed": 0, "memory": None}
        for block in shown:
            methods = YAML(typ="safe", pure=True).load(block)["merge"]["methods"]
            params = MergeParams(**rest, methods=methods)
            for label in methods:
                method, settings = params.candidate(label)
                find(method).settings.parse(settings)
