"""The lineage of a merge: it holds nothing of this machine, and says what is out of date."""

import platform
import re
from importlib import metadata
from pathlib import Path

from poemerge.hashing import hash_files
from poemerge.lineage import Lineage, produce
from poemerge.merge import merge_checkpoints, merge_lineage
from tests.core.merges import copy, merge
from tests.zoo import Zoo

CHOICES = {
    "device": "cpu",
    "dtype": "source",
    "output": "full",
    "seed": 0,
    "rank": None,
    "memory": None,
}


class TestLineage:
    def test_holds_nothing_of_this_machine(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out")
        for path in (tmp_path / "out").iterdir():
            if path.suffix in {".json", ".md"} and path.name != "tokenizer.json":
                text = path.read_text()
                assert str(tmp_path) not in text
                assert str(zoo.root) not in text
                assert platform.node() not in text
                assert not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", text)

    def test_hashes_hold(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "out", "ties", keep=0.4)
        record = Lineage.find(tmp_path / "out")
        assert record.outputs == hash_files(tmp_path / "out")
        assert [source.name for source in record.inputs] == ["base", "e1", "e2", "e3"]
        assert record.inputs[0].files == hash_files(zoo.base())
        assert record.inputs[2].files == hash_files(zoo.full(2))
        assert record.params["settings"]["keep"] == 0.4
        assert record.params["method"] == "ties"
        assert record.packages["torch"] == metadata.version("torch")

    def test_order_of_experts_is_kept(self, zoo: Zoo, tmp_path: Path) -> None:
        report = merge(zoo, tmp_path / "out", "average", 3, 1, 2)
        assert report.experts == ("e3", "e1", "e2")
        assert [s.name for s in Lineage.find(tmp_path / "out").inputs[1:]] == ["e3", "e1", "e2"]

    def test_a_chain_can_be_followed(self, zoo: Zoo, tmp_path: Path) -> None:
        merge(zoo, tmp_path / "one", "average", 1, 2)
        merge_checkpoints(zoo.base(), [tmp_path / "one", zoo.full(3)], tmp_path / "two", "average")
        parent = Lineage.find(tmp_path / "two").inputs[1].parent
        assert [source["name"] for source in parent["inputs"]] == ["base", "e1", "e2"]

    def test_what_makes_it_out_of_date(self, zoo: Zoo, tmp_path: Path) -> None:
        base, expert = copy(zoo.base(), tmp_path / "base"), copy(zoo.full(1), tmp_path / "a")
        experts = {"a": expert, "b": zoo.full(2)}
        out = tmp_path / "out"
        merge_checkpoints(base, experts, out, "ties", "cpu", keep=0.4)

        def current(**changed: object) -> bool:
            asked = {"base": base, "experts": experts, "method": "ties", "settings": {"keep": 0.4}}
            return merge_lineage(**asked | {"choices": CHOICES} | changed).is_current(out)

        assert current()
        assert current(settings={"keep": 0.4, "strength": 1.0})  # its default
        assert not current(settings={"keep": 0.5})
        assert not current(method="dare_ties", settings={})
        assert not current(choices=CHOICES | {"seed": 1})
        assert not current(experts={"a": expert})
        assert not current(experts=dict(reversed(experts.items())))
        assert not current(experts={"a": expert, "c": zoo.full(2)})
        touch(expert / "model.safetensors")
        assert not current()
        touch(expert / "model.safetensors")
        assert current()
        touch(base / "config.json")
        assert not current()
        touch(base / "config.json")
        touch(out / "model.safetensors")
        assert not current()
        touch(out / "model.safetensors")
        (out / "stray.txt").write_text("x")
        assert not current()
        (out / "stray.txt").unlink()
        assert current()
        (out / "README.md").unlink()
        assert not current()

    def test_produce_works_once(self, tmp_path: Path) -> None:
        done = []

        def work(folder: Path) -> None:
            done.append(folder)
            (folder / "a.txt").write_text("a")

        record = Lineage("fetch", {"x": 1})
        assert produce(tmp_path / "out", record, work)
        assert not produce(tmp_path / "out", record, work)
        assert produce(tmp_path / "out", Lineage("fetch", {"x": 2}), work)
        assert len(done) == 2
        assert {path.name for path in tmp_path.iterdir()} == {"out"}


def touch(path: Path) -> None:
    """Flip the last byte; twice is nothing."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
