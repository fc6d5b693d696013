"""The models of flows/sections.py as their JSON schema has them: every key, and what it takes."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from flows.reference.markdown import code
from flows.sections import Params

Node = Mapping[str, Any]
NAME = "NAME"  # stands for a name of the user's choice
KINDS = {
    "array": "list",
    "boolean": "`true` or `false`",
    "integer": "whole number",
    "null": "`null`",
    "number": "number",
    "object": "mapping",
    "string": "text",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@cache
def sections() -> dict[str, Node]:
    """Name → schema of each section, references replaced by what they refer to."""
    schema = Params.model_json_schema()
    models = schema["$defs"]

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(each) for each in node]
        if not isinstance(node, dict):
            return node
        model = models.get(str(node.get("$ref")).rpartition("/")[2], {})
        return {name: inlined(each) for name, each in {**model, **node}.items()}

    return inlined(schema["properties"])


def below(path: str, node: Node) -> Iterator[tuple[str, Node]]:
    """All keys below a node, named from the top down."""
    for kind in node.get("anyOf", [node]):
        for name, inner in kind.get("properties", {}).items():
            yield f"{path}.{name}", inner
            yield from below(f"{path}.{name}", inner)
        for inner in _values(kind):
            yield from below(f"{path}.{NAME}", inner)


def told(node: Node) -> str:
    """What the model says of a key: a section's docstring, a field's description."""
    kinds = (node, *node.get("anyOf", []))
    return next((kind["description"] for kind in kinds if "description" in kind), "")


def takes(node: Node) -> str:
    """What the value of a key may be, in Markdown."""
    kinds = dict.fromkeys(_kind(kind) for kind in node.get("anyOf", [node]))
    if "default" not in node:
        return " or ".join(kinds)
    default = "" if node["default"] is None else f": {code(json.dumps(node['default']))}"
    return f"{' or '.join(kinds)}; may be left out{default}"


def _kind(node: Node) -> str:
    words = node.get("enum", [node["const"]] if "const" in node else [])
    if words:
        return ", ".join(code(str(word)) for word in words)
    kind = KINDS.get(node.get("type", ""), "anything")
    inner = [node["items"]] if "items" in node else _values(node)
    of = [f"of {', '.join(takes(each) for each in inner)}"] if inner else []
    pattern = [f"like {code(node['pattern'])}"] if "pattern" in node else []
    bounds = [f"{sign} {node[bound]:g}" for bound, sign in BOUNDS.items() if bound in node]
    return " ".join([kind, *of, *pattern, " and ".join(bounds)]).rstrip()


def _values(node: Node) -> list[Node]:
    """What a mapping maps the user's names to."""
    found = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
    return [each for each in found if isinstance(each, dict)]
