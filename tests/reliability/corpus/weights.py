"""Kinds of bad input around weights: checkpoints, indices, adapters, configs."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.reliability.corpus import headers, places, sound, trees
from tests.reliability.corpus.bench import Kind

WAYS = (
    *("merge", "poemerge check", "extract", "poemerge merge", "plan", "fetch", "product"),
    *("poemerge extract", "describe", "poemerge experts add"),
)
LIBRARY = {".dvc": (".dvc",), "mlflow.db": ("mlflow.db",)}
BASES = {"base": ("base", "base-sharded")} | LIBRARY
ANY = BASES | {"expert": ("full", "full-sharded", "adapter")}


def _any_file(folder: Path, random: Random, pattern: str) -> Path:
    """One of the files of base and expert that are called so."""
    return random.choice(sorted(folder.glob(f"[be]*/{pattern}")))


def _header(folder: Path, random: Random) -> None:
    path = _any_file(folder, random, "*.safetensors")
    path.write_bytes(headers.spoil_file(path.read_bytes(), random))


def _json(name: str) -> Callable[[Path, Random], None]:
    def spoil(folder: Path, random: Random) -> None:
        path = _any_file(folder, random, name)
        path.write_bytes(trees.spoil_json(path.read_text(), random))

    return spoil


def _place(folder: Path, random: Random) -> None:
    paths = sorted(folder.glob("[be]*/*")) + sorted(folder.glob("[be]*"))
    path = random.choice([*paths, folder / "base/vocab.txt", folder / "expert/lineage.json"])
    if path.is_dir():
        for each in path.iterdir():
            each.unlink()
        path.rmdir()
    path.unlink(missing_ok=True)
    random.choice(places.PLACES)(path)


HEADERS = Kind("headers", WAYS, ANY, _header, sound.weights)
INDICES = Kind(
    "indices",
    WAYS,
    {**LIBRARY, "base": ("base-sharded",), "expert": ("full-sharded",)},
    _json("*.index.json"),
    sound.weights,
)
ADAPTERS = Kind(
    "adapters",
    WAYS,
    {**LIBRARY, "base": ("base",), "expert": ("adapter", "adapter-patterns")},
    _json("adapter_config.json"),
    sound.weights,
)
CONFIGS = Kind("configs", WAYS, ANY, _json("config.json"), sound.weights)
PLACES = Kind("places", WAYS, ANY, _place, sound.weights)
