"""Commands, settings and names that the pages of docs/ show are there."""

import re
import shlex
from importlib import import_module
from itertools import chain, pairwise

import click
import pytest

from flows.cli import main
from flows.overrides import parse_settings
from flows.params import load
from poemerge.methods import METHODS, find
from tests.doc_pages import DOCS, PAGES, ROOT, blocks, read, rows


def commands() -> list[list[str]]:
    """Every call of poemerge that a page shows, split as a shell does."""
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES]
    lines = chain.from_iterable(b.splitlines() for page in pages for b in blocks(page))
    return [shlex.split(line, comments=True) for line in lines if line.startswith("poemerge ")]


def test_every_command_is_accepted() -> None:
    """Its options are there; what it sets is a setting of the method, or a key of params.yaml."""
    shown = commands()
    assert len(shown) > 10
    for words in shown:
        command = command_of(words[1:])
        options = {name for p in command.params for name in p.opts}
        assert {word for word in words if word.startswith("--")} <= options, words
        given = [b for a, b in pairwise(words) if a == "--set"]
        if "--params" in options:
            load(ROOT / "params.yaml", given)
        elif given:
            method = words[words.index("--method") + 1] if "--method" in words else "cauchy_poe"
            find(method).settings.parse(parse_settings(given))


def command_of(words: list[str]) -> click.Command:
    """The command that words begin with, `experts add` say."""
    command: click.Command = main
    for word in words:
        if not isinstance(command, click.Group):
            break
        assert word in command.commands, words
        command = command.commands[word]
    return command


def test_patterns_on_the_command_line_mean_what_the_page_says() -> None:
    text = """weights={law: {"*.layers.0.*": 0, "*.mlp.*": 0.5}, code: 2}"""
    assert f"'{text}'" in read("family.md")
    settings = find("cauchy_poe").settings.parse(parse_settings([text]))
    names = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "norm.weight",
    )
    assert [settings.weight_of("law", name) for name in names] == [0, 0.5, 1]
    assert settings.weight_of("code", "norm.weight") == 2


@pytest.mark.parametrize("cells", list(rows("maths.md", "| symbol | meaning | name | file |")))
def test_every_name_of_the_index_exists(cells: list[str]) -> None:
    symbol, _, names, files = cells
    modules = [
        import_module("poemerge." + file.strip().removesuffix(".py").replace("/", "."))
        for file in files.split(",")
        if file.strip() != "-"
    ]
    known = {name for method in METHODS.values() for name, *_ in method.settings.describe()}
    for name in re.findall(r"`([\w.]+)`", names):
        assert name in known or any(_has(module, name) for module in modules), (symbol, name)


def _has(module: object, name: str) -> bool:
    found = module
    for part in name.split("."):
        if part in getattr(found, "__dataclass_fields__", {}):
            return True
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True
