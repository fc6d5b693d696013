"""The model card of an extracted adapter."""

import json
from pathlib import Path
from typing import Any

from poemerge.atomic import write_text
from poemerge.extracting.report import ExtractReport
from poemerge.extracting.rules import DROPPED, FACTORS, UNTOUCHED, WHOLE

CARD = """\
---
{header}
---

# Rank {rank} adapter of a full fine-tune of `{base}`

What fine-tuning changed, cut to the best update of rank {rank} a matrix by poemerge. Put together,
the adapter misses {error:.1%} of the change (Frobenius norm); its matrices miss {mean:.1%} on
average, and {worst:.1%} in the worst case, `{name}`.

{counts}

`lineage.json` says what made these bytes (sources with their hashes, settings, code, packages);
`extract_report.json` says for every tensor what was done and what it lost.
{warnings}"""
MEANINGS = {
    FACTORS: "as low-rank factors",
    WHOLE: "kept whole (`modules_to_save`)",
    DROPPED: "dropped",
    UNTOUCHED: "as the base has them",
}


def write_card(folder: Path, report: ExtractReport) -> None:
    """Write README.md with the front matter that model hubs read."""
    header: dict[str, Any] = {
        "base_model": report.base,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "poemerge"],
    }
    notes = "\n".join(f"- {warning}" for warning in report.warnings)
    counts = report.counts
    card = CARD.format(
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        base=report.base,
        rank=report.params["rank"],
        error=report.error,
        mean=report.mean_error,
        worst=report.worst.error,
        name=report.worst.name,
        counts="\n".join(f"- {counts[k]} tensors {m}" for k, m in MEANINGS.items() if k in counts),
        warnings=f"\n## Worth a look\n\n{notes}\n" if notes else "",
    )
    write_text(folder / "README.md", card)
