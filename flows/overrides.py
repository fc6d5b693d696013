"""What the command line says of values: `a.b=c` texts, and sizes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from poemerge.documents import check_tree
from poemerge.errors import SettingError


def override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` with the values of `a.b=c` put in; the original is left alone."""
    merged = dict(tree)
    for text in overrides:
        keys, value = parse_override(text)
        merged = _put(merged, keys, value)
    return merged


def parse_override(text: str) -> tuple[list[str], Any]:
    """Keys and value of `a.b=c`; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise SettingError(f"--set {text!r} is no assignment; write section.key=value.")
    try:
        return key.split("."), parse_yaml(value)
    except ValueError as error:
        raise SettingError(f"--set {text!r} has a value that is no YAML; quote it.") from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, plain data.

    Raises:
        ValueError: it is none, or stands for more than its text can hold.
    """
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except Exception as error:  # odd tags make the parser raise anything
        raise ValueError(str(error) or type(error).__name__) from error
    check_tree(value)
    return value


def _put(tree: Any, keys: list[str], value: Any) -> dict[str, Any]:
    branch = dict(tree) if isinstance(tree, Mapping) else {}
    branch[keys[0]] = _put(branch.get(keys[0]), keys[1:], value) if keys[1:] else value
    return branch


def parse_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of a method from `key=value` texts; `weights.NAME=x` names an expert."""
    settings: dict[str, Any] = {}
    for text in overrides:
        keys, value = parse_override(text)
        settings = _put(settings, keys, value)
    return settings


def save_overrides(path: Path, overrides: Sequence[str]) -> None:
    """Write the values of `a.b=c` into the file, its remarks and order kept."""
    save_values(path, map(parse_override, overrides))


def save_values(path: Path, values: Iterable[tuple[Sequence[str], Any]]) -> None:
    """Write (keys, value) pairs into the file, its remarks and order kept."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    tree = yaml.load(path)
    for keys, value in values:
        branch = tree
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
        branch[keys[-1]] = inline(value)
    partial = path.with_name(path.name + ".partial")
    yaml.dump(tree, partial)
    partial.replace(path)


def inline(value: Any) -> Any:
    """A mapping as YAML writes it on one line; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    mapping = CommentedMap({name: inline(each) for name, each in value.items()})
    mapping.fa.set_flow_style()
    return mapping


def in_bytes(gigabytes: float | None) -> int | None:
    """A budget of memory, as the core takes it."""
    return None if gigabytes is None else int(gigabytes * 1e9)
