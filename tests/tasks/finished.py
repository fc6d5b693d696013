"""What the finished run has registered and merged, and how its bytes are spoilt."""

import json
from pathlib import Path

VERSION = "models:/tiny@challenger"
WEIGHTS = "model.safetensors"


def registered() -> dict:
    return json.loads(Path("artifacts/register/registration.json").read_text())


def merged() -> Path:
    return Path("artifacts/merge", registered()["candidate"])


def spoil(path: Path) -> None:
    """Other bytes of the same length, whatever linked to the file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
