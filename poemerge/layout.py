"""Names of the files that make up a model on disk."""

from pathlib import Path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
MODELS = (SINGLE, INDEX, ADAPTER)  # of which a folder that the core can read has one
FINISHED = "finished.partial"  # among the shards of a merge under way, records of those finished
RECORD = "lineage.json"  # beside them: what made them (lineage.py)
WEIGHTS = ".safetensors"
TEXTS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})  # config, tokenizer, template


def is_ready(folder: Path) -> bool:
    """True if the core can read `folder` as it stands."""
    return any((folder / name).is_file() for name in MODELS)
