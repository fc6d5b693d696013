"""The reference holds all there is: commands in groups, keys below names, remarks as they stand."""

from pathlib import Path

import click
import pytest

from flows.cli import main
from flows.reference import commands, parameters, schema
from flows.reference.markdown import code, prose, table
from flows.reference.remarks import Said, remarks


class TestCommands:
    def test_every_option_is_on_the_page(self) -> None:
        page = commands.page()
        for name, command in main.commands.items():
            assert f"\n## poemerge {name}\n" in page
            entry = page.split(f"\n## poemerge {name}\n")[1].split("\n## ")[0]
            shown = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
            assert all(name in entry for option in shown for name in option.opts)

    def test_groups_are_followed_and_the_hidden_left_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        @click.group()
        def shelf() -> None:
            """Look after a shelf."""

        @shelf.command()
        @click.argument("books", nargs=-1, required=True)
        @click.option("--by", type=click.Choice(["size", "age"]), default="age", show_default=True)
        def order(books: tuple[str, ...], by: str) -> None:
            """Put BOOKS in order.

            \b
            first  a_*
            then   b

            Last.
            \f
            For us alone.
            """

        @shelf.command(hidden=True)
        def burn() -> None:
            """Never."""

        monkeypatch.setitem(main.commands, "shelf", shelf)
        page = commands.page()
        assert "[`poemerge shelf order`](#poemerge-shelf-order) | Put BOOKS in order. |" in page
        assert "poemerge shelf order [OPTIONS] BOOKS..." in page
        assert "| `BOOKS...` | required, one or more |" in page
        assert "| <code>--by [size&#124;age]</code> | [default: age] |" in page
        assert "\n\n```text\nfirst  a_*\nthen   b\n```\n\nLast.\n" in page
        assert "For us alone" not in page
        assert "burn" not in page


class TestParameters:
    def test_a_key_below_a_name_has_its_row(self) -> None:
        (found,) = [k for k in parameters.keys()["fetch"] if k.path == "fetch.experts.NAME.sha256"]
        assert found.takes == "text like `^[0-9a-f]{64}$` or `null`; may be left out"
        assert found.here == ""

    def test_ranges_choices_and_values_are_those_of_model_and_file(self) -> None:
        found = {key.path: key for key in parameters.keys()["promote"]}
        assert found["promote.level"].takes == "number > 0 and < 1"
        assert found["promote.level"].here == "`0.95`"
        (choose,) = [k for k in parameters.keys()["register"] if k.path == "register.choose"]
        assert choose.takes == "`mean`, `normalised`"
        assert choose.meaning == (
            "validation score that decides: mean &#124; normalised (merged / expert)"
        )

    def test_every_section_is_there(self) -> None:
        assert [f"## {name}" for name in schema.sections()] == [
            line for line in parameters.page().splitlines() if line.startswith("## ")
        ]


def test_remarks_are_the_comments_above_and_beside(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(
        "# Of the file, and of no key.\n\n"
        "one:\n"
        "  # Above,\n"
        "  # twice.\n"
        "  colour: '#fff # no comment' # beside, it's said\n"
        "  place: a#b\n"
        "two: {x: {y: 1}, z: 2} # of two alone\n"
    )
    assert remarks(file) == {
        "one": Said({"colour": "#fff # no comment", "place": "a#b"}, ""),
        "one.colour": Said("#fff # no comment", "Above, twice. beside, it's said"),
        "one.place": Said("a#b", ""),
        "two": Said({"x": {"y": 1}, "z": 2}, "of two alone"),
        "two.x": Said({"y": 1}, ""),
        "two.x.y": Said(1, ""),
        "two.z": Said(2, ""),
    }


def test_text_means_nothing_but_its_code() -> None:
    assert prose("a * b | <c> of `x|*`") == "a &#42; b &#124; &#60;c> of <code>x&#124;&#42;</code>"
    assert code("a_b*") == "`a_b*`"
    assert table(("a", "b"), [("1", "two\nlines")]) == "| a | b |\n|---|---|\n| 1 | two lines |\n"
    assert table(("a",), []) == ""
