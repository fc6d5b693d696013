"""docs/results.md from what was measured: tables, and which differences are more than chance."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path("docs/results.md")
MEASURED = Path("docs/results")
HOW = ("untuned", "tuned")

HEAD = Path(__file__).parent / "head.md"


def write() -> None:
    """Write the page from all zoos that are measured."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(MEASURED.glob("*.json"))]
    PAGE.write_text(page(found), encoding="utf-8")


def page(zoos: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    parts = [
        HEAD.read_text("utf-8"),
        "## Cauchy or Gaussian experts",
        _cauchy(zoos),
        "## All zoos",
        *(_all(zoos, how) for how in HOW),
    ]
    for zoo in zoos:
        kind = "LoRA experts" if zoo["zoo"]["kind"] == "lora" else "Full fine-tunes"
        items = "all" if zoo["limit"] is None else zoo["limit"]
        parts += [
            f"## {kind}, seed {zoo['zoo']['seed']}",
            f"{items} items per task and split, on {zoo['device']}.",
            "### Experts on each other's tasks",
            _interference(zoo),
            "### Untuned",
            _untuned(zoo),
            _real(zoo["untuned"], [row["gap"]["is_real"] for row in zoo["untuned"]]),
            "### Tuned",
            _tuned(zoo) if zoo["tuned"] else "The search is not over.",
        ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _cauchy(zoos: Iterable[Mapping[str, Any]]) -> str:
    """The claim that the project is about, zoo by zoo."""
    rows = [
        [
            _name(zoo),
            side,
            *(_gap(found[side]) if (found := zoo["cauchy"].get(how)) else "" for how in HOW),
        ]
        for zoo in zoos
        for side in ("input", "output")
    ]
    text = "Mean test score of `cauchy_poe` less that of `gaussian_poe`, same side, with the 95 %"
    table = _table(["zoo", "side", "untuned", "tuned"], rows)
    return f"{text} interval of the paired difference, in points.\n\n{table}"


def _all(zoos: Sequence[Mapping[str, Any]], how: str) -> str:
    """Test means, method by zoo."""
    done = [zoo for zoo in zoos if zoo[how]]
    means = [{row["label"]: row["test"]["mean"] for row in zoo[how]} for zoo in done]
    labels = sorted(means[0], key=lambda label: -sum(of[label] for of in means)) if done else []
    rows = [[f"`{label}`", *(_percent(of[label]) for of in means)] for label in labels]
    return f"Test means of the {how} methods.\n\n" + _table(["", *map(_name, done)], rows)


def _interference(zoo: Mapping[str, Any]) -> str:
    tasks = zoo["tasks"]
    rows = [["base", *(_percent(zoo["base"][task]) for task in tasks), _mean(zoo["base"])]]
    for name, scores in zoo["experts"].items():
        marked = [f"**{_percent(scores[t])}**" if t == name else _percent(scores[t]) for t in tasks]
        rows.append([name, *marked, _mean(scores)])
    return _table(["expert", *tasks, "mean"], rows)


def _untuned(zoo: Mapping[str, Any]) -> str:
    rows = []
    for row in zoo["untuned"]:
        cost = zoo["costs"][row["label"]]
        took = [_whole(cost["seconds"], 1), _whole(cost["peak_bytes"], 1e6)]
        gap = "" if row is zoo["untuned"][0] else _gap(row["gap"])
        rows.append([f"`{row['label']}`", *_scores(zoo, row), gap, *took])
    head = ["", *zoo["tasks"], "mean", "kept", "validation", "gap", "s", "MB"]
    return _table(head, rows)


def _tuned(zoo: Mapping[str, Any]) -> str:
    rows = []
    for row in zoo["tuned"]:
        settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
        gap = _gap(row["gap"]) if row["gap"] else ""
        tried = row["counts"]["complete"] + row["counts"]["pruned"]
        rows.append([f"`{row['label']}`", settings, *_scores(zoo, row), gap, str(tried)])
    head = ["", "settings", *zoo["tasks"], "mean", "kept", "validation", "gap", "tried"]
    said = _real(zoo["tuned"], [row["verdict"] == "real" for row in zoo["tuned"]])
    return f"{_table(head, rows)}\n\n{said}"


def _scores(zoo: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """By task, mean with interval, part of the experts' scores that is kept, and validation."""
    own = [row["scores"][task] / zoo["experts"][task][task] for task in zoo["tasks"]]
    test = row["test"]
    mean = f"{_percent(test['mean'])} [{_percent(test['low'])}, {_percent(test['high'])}]"
    cells = [_percent(row["scores"][task]) for task in zoo["tasks"]]
    return [*cells, mean, _percent(sum(own) / len(own)), _percent(row["validation"])]


def _real(rows: Sequence[Mapping[str, Any]], real: Sequence[bool]) -> str:
    """Which gaps are more than chance, as a sentence."""
    best, *others = [f"`{row['label']}`" for row in rows]
    apart = [label for label, is_real in zip(others, real[1:], strict=True) if is_real]
    alike = [label for label, is_real in zip(others, real[1:], strict=True) if not is_real]
    text = f"Best on validation is {best}."
    if apart:
        text += f" On test it differs for real from {', '.join(apart)}."
    if alike:
        text += f" These items do not tell it from {', '.join(alike)}."
    return text


def _gap(found: Mapping[str, float]) -> str:
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def _name(zoo: Mapping[str, Any]) -> str:
    return f"{zoo['zoo']['kind']}, seed {zoo['zoo']['seed']}"


def _mean(scores: Mapping[str, float]) -> str:
    return _percent(sum(scores.values()) / len(scores))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _whole(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
