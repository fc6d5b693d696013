"""The page of params.yaml: every section and key, what it takes, what is said of it."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from flows.reference import schema
from flows.reference.markdown import code, prose, table
from flows.reference.remarks import Said, remarks

FILE = Path(__file__).parents[2] / "params.yaml"
HEAD = f"""\
# params.yaml

Every number that changes a result stands in [params.yaml](../../params.yaml), once, with its unit.
The sections are the stages of the pipeline, then those of commands around it. An unknown key is
refused, and the nearest known one named. *Here* is what stands in this repository's file;
{schema.NAME} is a name of your choice.
"""
COLUMNS = ("key", "takes", "here", "meaning")
OPTIONAL = "The section may be left out.\n"
LONG = 40  # letters of a value that are shown


class Key(NamedTuple):
    """A row of the page, in Markdown."""

    path: str
    takes: str
    here: str
    meaning: str


def page() -> str:
    """The page, section by section in the order of the models."""
    return "\n".join([HEAD, *(_section(name, rows) for name, rows in keys().items())])


def keys() -> dict[str, list[Key]]:
    """Section → its keys, as deep as the models go.

    Their meaning is what the model says, and where that says nothing, the remark in params.yaml.
    """
    said = remarks(FILE)
    return {
        section: [_key(path, node, said) for path, node in schema.below(section, top)]
        for section, top in schema.sections().items()
    }


def _section(name: str, rows: list[Key]) -> str:
    node = schema.sections()[name]
    optional = [OPTIONAL] if "default" in node else []
    shown = table(COLUMNS, ((code(key.path), *key[1:]) for key in rows))
    return "\n".join([f"## {name}\n", f"{prose(schema.told(node))}\n", *optional, shown])


def _key(path: str, node: schema.Node, said: Mapping[str, Said]) -> Key:
    meaning = prose(schema.told(node) or _remark(path, said))
    return Key(path, schema.takes(node), _here(path, said), meaning)


def _here(path: str, said: Mapping[str, Said]) -> str:
    if path not in said or isinstance(value := said[path].value, Mapping):
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return code(text if len(text) <= LONG else f"{text[:LONG]}…")


def _remark(path: str, said: Mapping[str, Said]) -> str:
    """What params.yaml says of a key, or of one such key where users name them."""
    pattern = path.replace(schema.NAME, "*")
    found = (said[known].remark for known in said if fnmatchcase(known, pattern))
    return next(filter(None, found), "")
