"""Files that are refused: missing, truncated, corrupt, or leading out of their folder."""

import json
import struct
from pathlib import Path

import pytest

from poemerge.errors import CheckpointError, SourceError
from tests.core.spoiled import ADAPTER, INDEX, NAME, SINGLE, Bench, change_json
from tests.zoo import Zoo

TERABYTES = 1 << 42


@pytest.fixture
def bench(zoo: Zoo, tmp_path: Path) -> Bench:
    return Bench(zoo, tmp_path)


def with_header(folder: Path, header: bytes, body: bytes = b"") -> Path:
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + body)
    return folder


class TestFiles:
    def test_missing_folder(self, bench: Bench) -> None:
        nowhere = bench.root / "nowhere"
        bench.refused(SourceError, "nowhere is not a folder; give a checkpoint", nowhere)
        bench.refused(SourceError, "nowhere is not a folder", base=nowhere)

    def test_a_file_is_no_folder(self, bench: Bench) -> None:
        bench.refused(SourceError, "is not a folder", bench.zoo.full(1) / SINGLE)

    def test_empty_folder(self, bench: Bench) -> None:
        (bench.root / "empty").mkdir()
        bench.refused(SourceError, f"empty holds neither {SINGLE} nor", bench.root / "empty")

    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    @pytest.mark.parametrize("role", ["base", "expert"])
    def test_truncated(self, bench: Bench, role: str, keep: int) -> None:
        folder = bench.base() if role == "base" else bench.full()
        path = folder / SINGLE
        path.write_bytes(path.read_bytes()[:keep])
        given = {"base": folder} if role == "base" else {}
        experts = () if role == "base" else (folder,)
        pattern = f"{folder.name}/{SINGLE} is no intact safetensors file .*; fetch it again"
        bench.refused(CheckpointError, pattern, *experts, **given)

    def test_truncated_shard(self, bench: Bench) -> None:
        folder = bench.full(sharded=True)
        path = sorted(folder.glob("*.safetensors"))[2]
        path.write_bytes(path.read_bytes()[:-9])
        bench.refused(CheckpointError, f"{path.name} is no intact", folder)

    def test_truncated_adapter(self, bench: Bench) -> None:
        path = bench.adapter() / ADAPTER
        path.write_bytes(path.read_bytes()[:-1])
        bench.refused(CheckpointError, f"{ADAPTER} is no intact safetensors", path.parent)

    @pytest.mark.parametrize(
        "header",
        [
            b"{not json",
            b"\xff\xfe\x00",
            b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
            b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
            b'{"w": {"dtype": "NOPE", "shape": [1], "data_offsets": [0, 4]}}',
        ],
    )
    def test_corrupt_header(self, bench: Bench, header: bytes) -> None:
        folder = with_header(bench.full(), header, bytes(4))
        bench.refused(CheckpointError, "is no intact safetensors file", folder)

    def test_header_that_claims_terabytes(self, bench: Bench) -> None:
        """Of tensors, or of itself: neither is allocated."""
        entry = {"dtype": "F32", "shape": [TERABYTES // 4], "data_offsets": [0, TERABYTES]}
        folder = with_header(bench.full(), json.dumps({NAME: entry}).encode())
        bench.refused(CheckpointError, "is no intact safetensors file", folder)
        (folder / SINGLE).write_bytes(struct.pack("<Q", TERABYTES) + b"{}")
        bench.refused(CheckpointError, "is no intact safetensors file", folder)

    @pytest.mark.parametrize(
        "shard", ["../base/model.safetensors", "/etc/passwd", "sub/model.safetensors"]
    )
    def test_index_that_leaves_its_folder(self, bench: Bench, shard: str) -> None:
        folder = bench.full(sharded=True)
        table = json.loads((folder / INDEX).read_text())["weight_map"]
        change_json(folder / INDEX, weight_map=table | {NAME: shard})
        bench.refused(CheckpointError, f"{INDEX} names {shard}, which is outside", folder)

    def test_index_that_names_a_missing_shard(self, bench: Bench) -> None:
        folder = bench.full(sharded=True)
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.unlink()
        bench.refused(CheckpointError, rf"{shard.name} is missing \(named in {INDEX}\)", folder)

    def test_index_that_promises_too_much(self, bench: Bench) -> None:
        folder = bench.full(sharded=True)
        table = json.loads((folder / INDEX).read_text())["weight_map"]
        change_json(folder / INDEX, weight_map=table | {"ghost": table[NAME]})
        bench.refused(CheckpointError, f"promises ghost in {table[NAME]}", folder)

    @pytest.mark.parametrize("table", [None, [], {"a": 1}])
    def test_index_without_a_table(self, bench: Bench, table: object) -> None:
        folder = bench.full(sharded=True)
        change_json(folder / INDEX, weight_map=table)
        bench.refused(CheckpointError, f"{INDEX} has no weight_map", folder)

    @pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
    def test_corrupt_config(self, bench: Bench, text: str) -> None:
        for path in (bench.full() / "config.json", bench.adapter() / "adapter_config.json"):
            path.write_bytes(text.encode(errors="surrogateescape"))
            bench.refused(CheckpointError, f"{path.name} is (unreadable|no JSON)", path.parent)

    @pytest.mark.parametrize("text", ["{", "[]", '{"inputs": [{"x": 1}]}', '{"inputs": 3}'])
    def test_corrupt_lineage(self, bench: Bench, text: str) -> None:
        folder = bench.full()
        (folder / "lineage.json").write_text(text)
        bench.refused(SourceError, "lineage.json is .*; delete it to go on", folder)
