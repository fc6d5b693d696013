"""How the tests make a report, and its JSON."""

import json
from pathlib import Path
from typing import Any

HOW: dict[str, Any] = {"detail": 2, "side": "output", "seed": 0, "device": "cpu"}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
