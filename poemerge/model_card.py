"""The side files of a merged folder: config and tokenizer from the base, and a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from poemerge.atomic import write_json, write_text
from poemerge.checkpoint import read_json
from poemerge.lineage import RECORD, Lineage
from poemerge.report import REPORT, MergeReport

TEXT_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
OWN_FILES = {RECORD, REPORT, "adapter_config.json"}

CARD = """\
---
{header}
---

# Merge of {count} experts by `{method}`

{names} were merged into `{base}` by poemerge, method `{method}` with

```json
{settings}
```

`lineage.json` says what made these bytes (sources with their hashes, settings, code, packages);
`merge_report.json` says what was done to every tensor.
{warnings}"""


def copy_side_files(base: Path, folder: Path, dtype: str) -> None:
    """Copy config, tokenizer and templates; note a changed dtype in the config."""
    for path in sorted(base.iterdir()):
        is_index = path.name.endswith(".index.json")
        if path.suffix in TEXT_FILES and path.name not in OWN_FILES and not is_index:
            shutil.copyfile(path, folder / path.name)
    config = read_json(folder / "config.json")
    if config and dtype != "source":
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        write_json(folder / "config.json", config | {key: dtype})


def write_card(folder: Path, report: MergeReport, lineage: Lineage) -> None:
    """Write README.md with the front matter that model hubs read."""
    base = lineage.inputs[0]
    uri = base.uri or base.name
    header: dict[str, Any] = {
        "base_model": uri.removeprefix("hf://").split("@")[0],
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
        base=uri,
        settings=json.dumps(report.settings, indent=2),
        warnings=f"\n## Worth a look\n\n{notes}\n" if notes else "",
    )
    write_text(folder / "README.md", card)
