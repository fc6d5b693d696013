"""The evaluate stage on tiny real models: what it scores, on what items, and when it does again."""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from poemerge.errors import CheckpointError
from poemerge.lineage import Lineage
from tasks.evaluate import scoring_key
from tasks.evaluate.scorer import load_scorer
from tasks.evaluate.spread import spread
from tasks.progress import watched_by
from tests.tasks.letters import SETTINGS, Run, write_task
from tests.zoo import Zoo, load, save


def test_tells_how_far_it_is(score: Run) -> None:
    """Six items of each split, in batches of four whose answers share a forward pass."""
    told: list[tuple[str, str, int, int]] = []
    with watched_by(lambda *news: told.append(news)):
        score(splits=["validation", "test"], limit=6)
    assert {(step, unit, total) for step, unit, _, total in told} == {
        ("evaluate base", "items", 12)
    }
    assert [done for _, _, done, _ in told] == [4, 6, 6, 10, 12, 12]


def test_candidates_in_parallel_wait_for_the_one_model(score: Run, zoo: Zoo) -> None:
    folders = [zoo.full(seed, noise=0.5) for seed in (1, 2)]
    apart = [score(folder, out=f"apart-{i}")[2] for i, folder in enumerate(folders)]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(score, f, out=f"at-once-{i}") for i, f in enumerate(folders)]
    assert [run.result()[2] for run in runs] == apart


def test_a_worker_refuses_in_the_words_of_one_process(score: Run, zoo: Zoo, tmp_path: Path) -> None:
    save(load(zoo.base()), tmp_path / "bare")
    scoring = partial(score, base=tmp_path / "bare")
    with pytest.raises(CheckpointError) as alone:
        scoring()
    with pytest.raises(CheckpointError) as sent:
        spread([scoring], "cpu,cpu:0")
    assert str(sent.value) == str(alone.value)
    assert not (tmp_path / "out").exists()


def test_names_of_devices_decide_nothing(score: Run, zoo: Zoo, include: Path) -> None:
    assert score()[0]
    assert not score(device="cpu,cpu:0")[0]
    how = {
        "tasks": ["letters"],
        "splits": ["test"],
        "include": str(include),
        "trust": [str(include)],
    }
    how |= SETTINGS
    one, many = (scoring_key(zoo.base(), **how | {"device": d}) for d in ("cpu", "cpu,cpu:0"))
    assert one == many


def test_nothing_but_the_log_is_written(score: Run, capfd: pytest.CaptureFixture[str]) -> None:
    load_scorer.cache_clear()
    score(splits=["validation", "test"])
    assert capfd.readouterr() == ("", "")


def test_items_are_the_same_for_all_candidates(score: Run, zoo: Zoo) -> None:
    _, _, base = score(out="base")
    _, _, merge = score(zoo.full(1), out="merge")
    ids = base["letters"]["test"]["ids"]
    assert ids == merge["letters"]["test"]["ids"]
    assert len(set(ids)) == 12


def test_nothing_is_scored_twice(
    score: Run, zoo: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(zoo.full(1), merged)
    caplog.set_level(logging.INFO, "tasks.evaluate")
    assert score(merged)[0]
    assert [r.message for r in caplog.records if "merge on letters, test" in r.message]
    before = (tmp_path / "out/lineage.json").read_bytes()
    for name in ("README.md", "merge_report.json", "lineage.json"):
        (merged / name).write_text("{}" if name != "README.md" else "merged again")
    assert not score(merged)[0]
    assert (tmp_path / "out/lineage.json").read_bytes() == before
    assert score(merged, limit=3)[0]


def test_runs_are_equal_to_the_byte(
    score: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, include: Path
) -> None:
    score(splits=["validation", "test"], out="first")
    monkeypatch.chdir(include)
    score(splits=["validation", "test"], out="second")
    for name in ("results.json", "items.json", "lineage.json"):
        first, second = ((tmp_path / out / name).read_bytes() for out in ("first", "second"))
        assert first == second
        assert str(tmp_path).encode() not in first


def test_an_edited_task_alone_is_scored_again(
    score: Run, include: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_task(include, "others", doc_to_text="{{text}}?")
    both = {"tasks": ["letters", "others"]}
    _, first, _ = score(**both)
    path = include / "letters_test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    caplog.set_level(logging.INFO, "tasks.evaluate")
    caplog.clear()
    done, second, items = score(**both)
    assert done
    assert not [r for r in caplog.records if "others" in r.message]
    assert second["scores"]["others"] == first["scores"]["others"]
    assert second["scores"]["letters"]["test"]["items"] == 5
    assert list(second["scores"]) == list(items) == both["tasks"]
    assert {s.name for s in Lineage.find(tmp_path / "out").inputs} == {
        "base",
        "task:letters",
        "task:others",
    }


def test_an_included_file_and_a_module_count_too(score: Run, include: Path) -> None:
    (include / "words.py").write_text("def text(doc):\n    return doc['text']\n")
    (include / "letters.yaml").rename(include / "template")
    yaml_text = "include: template\ntask: letters\ndoc_to_text: !function words.text\n"
    (include / "letters.yaml").write_text(yaml_text)
    assert score()[0]
    assert not score()[0]
    (include / "words.py").write_text("def text(doc):\n    return doc['text'] + '!'\n")
    assert score()[0]
    template = include / "template"
    template.write_text(
        template.read_text().replace("target_delimiter: ''", "target_delimiter: ' '")
    )
    assert score()[0]


def test_limit_takes_the_first_items(score: Run) -> None:
    _, _, every = score(out="every")
    _, results, few = score(out="few", limit=5)
    assert results["scores"]["letters"]["test"]["items"] == 5
    for key in ("ids", "outcomes"):
        assert few["letters"]["test"][key] == every["letters"]["test"][key][:5]


def test_splits_hold_other_items(score: Run, include: Path) -> None:
    _, _, items = score(splits=["validation", "test"])
    ids = {split: set(cell["ids"]) for split, cell in items["letters"].items()}
    assert not ids["validation"] & ids["test"]
    train = {"train": "letters_validation.jsonl", "test": "letters_test.jsonl"}
    write_task(include, "letters", dataset_kwargs={"data_files": train}, validation_split=None)
    _, _, items = score(splits=["validation"], validation="train", out="train")
    assert set(items["letters"]["validation"]["ids"]) == ids["validation"]


def test_few_shot_examples_are_seeded(score: Run, include: Path) -> None:
    shots = {"num_fewshot": 2, "fewshot_split": "validation"}
    write_task(include, "letters", **shots)
    runs = [score(seed=seed, out=str(i))[2] for i, seed in enumerate((1, 1))]
    assert runs[0] == runs[1]
