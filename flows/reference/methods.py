"""The page of the methods: what each does, after whom, with which settings."""

import json
import math
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from flows.reference.markdown import code, prose, table
from poemerge.method import Method
from poemerge.methods import METHODS
from poemerge.settings import default_of

HEAD = """\
# Methods

Every merge method with its settings. On the command line a setting is given as `--set ridge=0.1`,
in params.yaml under `merge.methods` ([params.yaml](params.md#merge)). How the settings of the
products of experts belong together: [the family](../family.md).
"""
COLUMNS = ("setting", "default", "values", "meaning")


def page() -> str:
    """The page: an overview, then each method, in the order of their names."""
    methods = [METHODS[name] for name in sorted(METHODS)]
    rows = [(f"[{code(each.name)}](#{each.name})", prose(each.summary)) for each in methods]
    return "\n".join([HEAD, table(("method", "does"), rows), *map(_entry, methods)])


def _entry(method: Method) -> str:
    rows = table(COLUMNS, map(_row, fields(method.settings)))
    return f"## {method.name}\n\n{prose(method.summary)}\n\nSource: {method.source}.\n\n{rows}"


def _row(field: Field[Any]) -> tuple[str, ...]:
    default = json.dumps(default_of(field), ensure_ascii=False)
    return code(field.name), code(default), _values(field), prose(field.metadata["meaning"])


def _values(field: Field[Any]) -> str:
    """What a setting takes: its words, its range, or that it is a mapping."""
    choices, words = field.metadata["choices"], field.metadata["words"]
    if choices:
        return ", ".join(code(choice) for choice in choices if choice)
    if isinstance(default_of(field), Mapping):
        return "a mapping"
    return ", ".join([_range(field.metadata["low"], field.metadata["high"]), *map(code, words)])


def _range(low: float, high: float) -> str:
    if high < math.inf:
        return f"{low:g} to {high:g}"
    return f"≥ {low:g}" if low > -math.inf else "a number"
