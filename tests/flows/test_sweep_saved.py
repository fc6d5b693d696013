"""What a sweep found, as it is put into params.yaml."""

from pathlib import Path

from flows.overrides import save_values
from flows.sweep_table import snippet


def test_saving_keeps_the_remark_on_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        "merge:\n  methods: # candidates\n    ties: {keep: 0.2} # kept\n    other: {}\n"
    )
    save_values(path, [(("merge", "methods", "ties"), {"keep": 0.3, "strength": 1.5})])
    assert path.read_text() == (
        "merge:\n  methods: # candidates\n"
        "    ties: {keep: 0.3, strength: 1.5} # kept\n    other: {}\n"
    )


def test_the_snippet_is_what_params_take() -> None:
    text = snippet({"a.b": {"method": "ties", "keep": 0.3}, "average": {}})
    assert text == ("merge:\n  methods:\n    a.b: {method: ties, keep: 0.3}\n    average: {}\n")
