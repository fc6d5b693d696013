"""Nodes of JSON and YAML trees spoiled, as text: what no writer would write can stand there too."""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from random import Random
from typing import Any

import hypothesis
from hypothesis import strategies as some

from tests.reliability.corpus.damage import spoil

Path = tuple[str | int, ...]
HOLE = "a hole in a tree"

HAND_PICKED = (
    *("null", "true", "false", "0", "-1", "1", "2", "1.5", "-0.0", "[]", "{}", '""', '"x"'),
    *map(str, (2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30, 10**400)),
    "9" * 5000,  # more digits than Python turns into a number
    *("1e308", "-1e308", "1e999", "1e-999", "NaN", "Infinity", "-Infinity"),
    *('"\\u0000"', '"\\ud800"', '"\\u001b[31m\\r\\n"', '"\\u202e"', '"NaN"', '"1"', '"(a+)+$"'),
    *('"/"', '"../../../etc/passwd"', '"/dev/zero"', '"."', '".."', '"a/b"', '"~"'),
    json.dumps("x" * 300),  # longer than a file's name may be
    json.dumps("y" * 1_000_000),
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    "[" * 400 + "]" * 400,  # which json reads
    "[" + "0," * 100_000 + "0]",
    '{"a": 1, "a": 2}',
    *("[[]]", "[{}]", '{"": {}}', "[null]", '[1, "a"]', '{"__proto__": 1}'),
)

VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(),
    lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner),
    max_leaves=8,
)


@cache
def drawn(count: int = 400) -> tuple[str, ...]:
    """JSON texts of values that hypothesis thinks of."""
    found: list[str] = []

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=count, database=None, phases=[hypothesis.Phase.generate])
    @hypothesis.given(VALUES)
    def draw(value: Any) -> None:
        found.append(json.dumps(value))

    draw()
    return tuple(found)


def fragments(random: Random) -> str:
    """One value, as JSON text or what is nearly that."""
    return random.choice(HAND_PICKED) if random.random() < 0.7 else random.choice(drawn())


def spoil_json(text: str, random: Random) -> bytes:
    """Spoil one node of a JSON document, or its bytes."""
    if random.random() < 0.2:
        return spoil(text.encode(), random)
    return spoil_node(json.loads(text), random, fragments(random)).encode("utf-8")


def spoil_node(tree: Any, random: Random, fragment: str) -> str:
    """The text of a tree in which one node is gone, is doubled, renamed or is another value.

    Args:
        tree: plain data; it is changed.
        random: says where and how.
        fragment: text of the other value.
    """
    path = random.choice(list(paths(tree)))
    if not path:
        return fragment
    *above, last = path
    parent = tree
    for step in above:
        parent = parent[step]
    how = random.choice(("replace", "replace", "replace", "drop", "wrap", "double", "rename"))
    if how == "drop":
        del parent[last]
    elif how == "wrap":
        parent[last] = [parent[last]]
    elif how == "double" and isinstance(last, str):
        text = json.dumps({**parent, HOLE: 0}).replace(json.dumps(HOLE), json.dumps(last))
        return _filled(tree, above, text.removesuffix("0}") + fragment + "}")
    elif how == "rename" and isinstance(last, str):
        name = random.choice(["", "x" * 300, "../a", "\0", "\x1b[0m", last + " ", last.upper()])
        parent[name] = parent.pop(last)
    else:
        return _filled(tree, path, fragment)
    return json.dumps(tree)


def paths(tree: Any, above: Path = ()) -> Iterator[Path]:
    """The way to every node; the root's is empty."""
    yield above
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from paths(value, (*above, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from paths(value, (*above, index))


def _filled(tree: Any, path: Sequence[str | int], fragment: str) -> str:
    """The tree's text with a fragment at one place."""
    if not path:
        return fragment
    *above, last = path
    parent = tree
    for step in above:
        parent = parent[step]
    parent[last] = HOLE
    return json.dumps(tree).replace(json.dumps(HOLE), fragment)
