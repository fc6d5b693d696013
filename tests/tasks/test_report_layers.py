"""Layers as a report counts them by the names of tensors, and a figure of scores all alike."""

from tasks.paired import Interval
from tasks.report.figures.scores import heatmap
from tasks.report.figures.style import LIGHT, png
from tasks.report.layers import Place, natural, places
from tasks.report.numbers import Candidate, Numbers


class TestLayers:
    def test_a_decoder(self) -> None:
        names = [
            "model.embed_tokens.weight",
            *(f"model.layers.{i}.mlp.up_proj.weight" for i in (10, 2)),
            "model.layers.2.self_attn.q_proj.weight",
        ]
        assert list(places(names).items()) == [
            ("model.layers.2.self_attn.q_proj.weight", Place("q", 2)),
            ("model.layers.2.mlp.up_proj.weight", Place("up", 2)),
            ("model.layers.10.mlp.up_proj.weight", Place("up", 10)),
        ]

    def test_modules_of_one_name_are_told_apart(self) -> None:
        names = [f"{s}.block.0.layer.0.SelfAttention.q.weight" for s in ("encoder", "decoder")]
        assert [place.module for place in places(names).values()] == [
            "decoder.block.layer.0.SelfAttention.q",
            "encoder.block.layer.0.SelfAttention.q",
        ]

    def test_a_plain_stack(self) -> None:
        assert places(["0.weight", "2.weight", "bias"]) == {
            "0.weight": Place("weight", 0),
            "2.weight": Place("weight", 2),
        }

    def test_the_experts_of_a_mixture_are_one_kind(self) -> None:
        """A panel for each would be hundreds, which took minutes to draw."""
        names = [
            f"model.layers.{layer}.mlp.experts.{expert}.{module}_proj.weight"
            for layer in range(2)
            for expert in range(64)
            for module in ("up", "down")
        ]
        assert set(places(names).values()) == {
            Place(module, layer) for module in ("up", "down") for layer in range(2)
        }
        few = [name for name in names if ".experts.0." in name or ".experts.1." in name]
        assert len({place.module for place in places(few).values()}) == 4

    def test_what_is_still_many_kinds_is_one(self) -> None:
        names = [f"layers.0.block{index}.weight" for index in range(100)]
        assert set(places(names).values()) == {Place("all", 0)}

    def test_numbers_in_names_count(self) -> None:
        assert sorted(["a.10.b", "a.9.b"], key=natural) == ["a.9.b", "a.10.b"]


def test_scores_that_are_all_those_of_the_experts_can_be_drawn() -> None:
    half = Interval(0.5, 0.5, 0.5)
    rows = [
        Candidate(*who, {"red": 0.5}, half, 1.0, None)
        for who in (("ties", "merge"), ("red", "expert"))
    ]
    figure = heatmap(Numbers("alike", ("red",), 2, tuple(rows), "ties", {}, {}), LIGHT)
    assert png(figure).startswith(b"\x89PNG")
    assert {text.get_text() for text in figure.axes[0].texts} == {"50"}
