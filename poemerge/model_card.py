"""The side files of a merged folder: config and tokenizer from the base, and a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from poemerge.atomic import write_json, write_text
from poemerge.checkpoint import read_json
from poemerge.hashing import check_text
from poemerge.layout import RECORD, TEXTS
from poemerge.lineage import Lineage, Source
from poemerge.names import check_link
from poemerge.report import REPORT, MergeReport

OWN_FILES = {RECORD, REPORT, "adapter_config.json"}

HUB = "hf://"

CARD = """\
---
{header}
---

# Merge of {count} experts by `{method}`

{names} were merged into `{base}` by poemerge, method `{method}` with

```json
{settings}
```

| source | from | revision | digest of its files |
|---|---|---|---|
{sources}
{solved}
`lineage.json` says what made these bytes (sources with their hashes, settings, code, packages);
`merge_report.json` says what was done to every tensor. Given this folder, `poemerge verify` hashes
everything again, and `poemerge reproduce` merges again from the sources and compares the bytes.
{warnings}"""


def side_files(base: Path) -> tuple[Path, ...]:
    """Config, tokenizer and templates of a base, which its merges take over.

    Raises:
        SourceError: one is a link that leads out of the folder, or far too large.
    """
    found = tuple(
        path
        for path in sorted(base.iterdir())
        if path.suffix in TEXTS
        and path.name not in OWN_FILES
        and not path.name.endswith(".index.json")
    )
    for path in found:
        check_link(path)
        check_text(path)
    return tuple(path for path in found if path.is_file())


def copy_side_files(base: Path, folder: Path, dtype: str) -> None:
    """Copy config, tokenizer and templates; note a changed dtype in the config."""
    for path in side_files(base):
        shutil.copyfile(path, folder / path.name)
    config = read_json(folder / "config.json")
    if config and dtype != "source":
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        write_json(folder / "config.json", config | {key: dtype})


def write_card(folder: Path, report: MergeReport, lineage: Lineage) -> None:
    """Write README.md with the front matter that model hubs read."""
    base = lineage.inputs[0]
    known = base.uri if "://" in base.uri else Path(base.uri or base.name).name
    header: dict[str, Any] = {
        "base_model": _hub_name(base) or known,
        "base_model_relation": "merge",
        "library_name": "peft" if report.output == "adapter" else "transformers",
        "tags": ["merge", "poemerge", report.method],
    }
    notes = "\n".join(f"- {warning}" for warning in report.warnings)
    card = CARD.format(
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        count=len(report.experts),
        names=", ".join(f"`{name}`" for name in report.experts),
        method=report.method,
        base=base.uri or base.name,
        settings=json.dumps(report.settings, indent=2),
        sources="\n".join(map(_row, lineage.inputs)),
        solved=_solved(report),
        warnings=f"\n## Worth a look\n\n{notes}\n" if notes else "",
    )
    write_text(folder / "README.md", card)


def _hub_name(source: Source) -> str:
    """`org/name` where the source, or what it is a copy of, is on a hub; else nothing."""
    if source.uri.startswith(HUB):
        return source.uri.removeprefix(HUB).split("@")[0]
    made = Lineage.of(source.parent) if source.parent else None
    if made is None or made.stage != "fetch":
        return ""
    return next((name for name in map(_hub_name, made.inputs) if name), "")


def _row(source: Source) -> str:
    where, revision = (f"`{text}`" if text else "" for text in (source.uri, source.revision))
    return f"| {source.name} | {where} | {revision} | `{source.digest[:16]}` |"


def _solved(report: MergeReport) -> str:
    """One paragraph on the certificates, where products of experts were solved."""
    found = [t.certificate for t in report.tensors if "condition" in t.certificate]
    if not found:
        return ""
    settled = sum(bool(certificate["converged"]) for certificate in found)
    steps, growth, condition = (
        max(certificate[key] for certificate in found) for key in ("steps", "growth", "condition")
    )
    return (
        f"\n{settled} of {len(found)} matrices settled, in {steps} steps at most. The largest "
        f"update is {growth:.2f} times that of the largest expert (Frobenius norm), and the worst "
        f"system has condition {condition:.0e}.\n"
    )
