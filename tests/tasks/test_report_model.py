"""The report of one merged model, alone and with its sources."""

from pathlib import Path

import pytest

from poemerge.errors import SettingError
from poemerge.merge import merge_checkpoints
from poemerge.report import MergeReport
from tasks.report import write_report
from tasks.report.sources import Sources
from tests.tasks.reports import HOW, read


class TestOneModel:
    @pytest.fixture
    def made(self, zoo, tmp_path: Path) -> tuple[Path, MergeReport]:  # noqa: ANN001
        experts = {"a": zoo.adapter(1), "b": zoo.adapter(2)}
        return tmp_path / "merged", merge_checkpoints(zoo.base(), experts, tmp_path / "merged")

    def test_alone_it_has_what_its_report_says(self, made: tuple[Path, MergeReport]) -> None:
        folder, report = made
        sources = Sources.find(folder, None, {})
        out = sources.default_out(folder)
        assert out.parent == folder.parent
        assert write_report(sources, out, **HOW)
        found = read(out / "report.json")
        assert found["best"] == "merged"
        assert found["merges"]["merged"]["rules"] == report.rules
        assert found["details"] == {}
        assert "merged: 2 experts merged" in (out / "index.html").read_text(encoding="utf-8")

    def test_with_its_sources_it_has_more(self, made: tuple[Path, MergeReport], zoo) -> None:  # noqa: ANN001
        folder, _ = made
        experts = {"a": zoo.adapter(1), "b": zoo.adapter(2)}
        out = folder.with_name("out")
        write_report(Sources.find(folder, zoo.base(), experts), out, **HOW)
        found = read(out / "report.json")
        assert list(found["statistics"]["experts"]) == ["a", "b"]
        assert list(found["details"]) == ["merged"]
        assert (out / "cosines.png").is_file()

    def test_other_experts_are_refused(self, made: tuple[Path, MergeReport], zoo) -> None:  # noqa: ANN001
        with pytest.raises(SettingError, match="'b' is none of the experts"):
            Sources.find(made[0], zoo.base(), {"a": zoo.adapter(1), "b": zoo.adapter(3)})
