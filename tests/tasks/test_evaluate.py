"""The evaluate stage on tiny real models: lm-eval's scores against transformers by hand."""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from poemerge.errors import CheckpointError, PoemergeError, SettingError, SourceError
from poemerge.lineage import Lineage
from poemerge.merge import expert_weights, merge_checkpoints
from tasks.evaluate import evaluate, lm_tasks, scoring_key
from tasks.evaluate.scorer import load_scorer, put_weights
from tasks.evaluate.spread import spread
from tasks.progress import watched_by
from tests.zoo import Zoo, adapt, load, save, tokenizer

Run = Callable[..., tuple[bool, dict[str, Any], dict[str, Any]]]
LETTERS = "abcd"
SETTINGS = {
    "limit": None,
    "batch_size": 4,
    "dtype": "float32",
    "device": "cpu",
    "seed": 0,
    "validation": "validation",
}


def documents(split: str, count: int) -> list[dict]:
    """Questions of many lengths, of which each split has others."""
    return [
        {"text": f"{split} {'x' * (7 * i % 11)} {i}", "answer": (i * i) % 4} for i in range(count)
    ]


def write_task(folder: Path, name: str, **config: object) -> Path:
    """A multiple-choice task of 9 validation and 12 test items, with what `config` changes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("validation", 9), ("test", 12)):
        lines = "".join(json.dumps(doc) + "\n" for doc in documents(split, count))
        (folder / f"{name}_{split}.jsonl").write_text(lines)
    files = {split: f"{name}_{split}.jsonl" for split in ("validation", "test")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "validation_split": "validation",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | config, sort_keys=False))
    return folder


@pytest.fixture
def include(tmp_path: Path) -> Path:
    """A folder with one task, `letters`."""
    return write_task(tmp_path / "tasks", "letters")


@pytest.fixture
def score(tmp_path: Path, include: Path, zoo: Zoo) -> Run:
    """Run the stage; returns whether work was done, results and items."""

    def run(
        weights: Path | None = None, kind: str = "merge", out: str = "out", **changed: Any
    ) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        kind = "base" if weights is None else kind
        arguments = {
            "tasks": ["letters"],
            "splits": ["test"],
            "include": include,
            "trust": [include],
        }
        arguments |= SETTINGS
        base = changed.pop("base", zoo.base())
        done = evaluate.fn(kind, kind, base, weights, tmp_path / out, **arguments | changed)
        read = (
            json.loads((tmp_path / out / f).read_text()) for f in ("results.json", "items.json")
        )
        return done, *read

    return run


def chosen(folder: Path, docs: list[dict], choices: list[str], model: Any = None) -> list[int]:
    """What the model answers, one forward pass per document and choice, without lm-eval."""
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for doc in docs:
        sums = []
        for choice in choices:
            context = len(tokenizer(doc["text"]).input_ids)
            tokens = torch.tensor([tokenizer(doc["text"] + choice).input_ids])
            with torch.no_grad():
                logs = model(tokens).logits[0, :-1].double().log_softmax(-1)
            picked = logs.gather(1, tokens[0, 1:, None])[context - 1 :]
            sums.append(picked.sum().item())
        answers.append(max(range(len(sums)), key=sums.__getitem__))
    return answers


def outcomes(answers: list[int], docs: list[dict]) -> list[int]:
    return [int(a == doc["answer"]) for a, doc in zip(answers, docs, strict=True)]


@pytest.mark.parametrize("choices", [list(LETTERS), ["ab", "b", "abc", "dddddd"]])
def test_scores_are_those_of_transformers(
    score: Run, include: Path, zoo: Zoo, choices: list[str]
) -> None:
    write_task(include, "letters", doc_to_choice=choices)
    done, results, items = score(splits=["validation", "test"])
    assert done
    for split, count in (("validation", 9), ("test", 12)):
        docs = documents(split, count)
        expected = outcomes(chosen(zoo.base(), docs, choices), docs)
        assert items["letters"][split]["outcomes"] == expected
        cell = results["scores"]["letters"][split]
        mean = sum(expected) / count
        assert cell["score"] == pytest.approx(mean, abs=1e-6)
        assert cell["stderr"] == pytest.approx((mean * (1 - mean) / (count - 1)) ** 0.5, abs=1e-6)
        assert (cell["metric"], cell["items"]) == ("acc", count)
    assert results["candidate"] == results["kind"] == "base"


def test_tells_how_far_it_is(score: Run) -> None:
    """Six items of each split, in batches of four whose answers share a forward pass."""
    told: list[tuple[str, str, int, int]] = []
    with watched_by(lambda *news: told.append(news)):
        score(splits=["validation", "test"], limit=6)
    assert {(step, unit, total) for step, unit, _, total in told} == {
        ("evaluate base", "items", 12)
    }
    assert [done for _, _, done, _ in told] == [4, 6, 6, 10, 12, 12]


def test_generated_answers_are_those_of_transformers(score: Run, include: Path, zoo: Zoo) -> None:
    docs = documents("test", 12)
    model, tokenizer = load(zoo.base()), AutoTokenizer.from_pretrained(zoo.base())
    said = []
    for doc in docs:
        tokens = tokenizer(doc["text"], return_tensors="pt").input_ids
        written = model.generate(tokens, max_new_tokens=3, do_sample=False)
        said.append(tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True))
    right = [text if i % 2 else "wrong" for i, text in enumerate(said)]
    lines = (json.dumps(doc | {"gold": gold}) + "\n" for doc, gold in zip(docs, right, strict=True))
    (include / "letters_test.jsonl").write_text("".join(lines))
    changes = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{gold}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    config = yaml.safe_load((include / "letters.yaml").read_text()) | changes
    (include / "letters.yaml").write_text(yaml.safe_dump(config))
    _, results, items = score()
    assert items["letters"]["test"]["outcomes"] == [i % 2 for i in range(12)]
    assert results["scores"]["letters"]["test"]["metric"] == "exact_match"


def requests(*pairs: tuple[str, str]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def test_weights_are_swapped_in_one_model(zoo: Zoo) -> None:
    scorer = load_scorer(zoo.base(), "swap", "float32", "cpu", 4)
    asked = requests(("a question", "b"))
    logs = []
    for seed in (1, 2, 1):
        put_weights(scorer.model, expert_weights(zoo.full(seed, noise=0.5), None), "it")
        logs.append(scorer.loglikelihood(asked)[0][0])
    assert logs[0] == logs[2] != logs[1]
    assert load_scorer(zoo.base(), "swap", "float32", "cpu", 4) is scorer


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_logits_that_are_left_out_change_nothing(zoo: Zoo, batch_size: int) -> None:
    scorer = load_scorer(zoo.base(), "all", "float32", "cpu", batch_size)
    plain = HFLM(scorer.model, tokenizer=scorer.tokenizer, batch_size=batch_size)
    texts = ["", "x", "some words", "y" * 17, "z" * 300]  # the last is longer than the model reads
    asked = requests(*((text, end) for text in texts for end in ("a", "b", "ab", "c" * 9)))
    expected = plain.loglikelihood(asked, disable_tqdm=True)
    for mine, theirs in zip(scorer.loglikelihood(asked), expected, strict=True):
        assert mine == (pytest.approx(theirs[0], abs=1e-5), theirs[1])
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts[1:]]
    expected = plain.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert scorer.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=1e-4)


def test_adapter_scores_like_peft(score: Run, zoo: Zoo, tmp_path: Path) -> None:
    docs = documents("test", 12)
    adapted = adapt(load(zoo.base()), 3, noise=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = outcomes(chosen(zoo.base(), docs, list(LETTERS), adapted), docs)
    for kind in ("expert", "merge"):
        _, _, items = score(tmp_path / "adapter", kind, out=kind)
        assert items["letters"]["test"]["outcomes"] == expected
    assert expected != outcomes(chosen(zoo.base(), docs, list(LETTERS)), docs)


def test_tied_and_sharded_models_are_filled(score: Run, zoo: Zoo) -> None:
    docs = documents("test", 12)
    base, full = zoo.base(tied=True), zoo.full(1, tied=True, sharded=True, noise=0.5)
    _, _, items = score(full, base=base)
    assert items["letters"]["test"]["outcomes"] == outcomes(chosen_with(base, full, docs), docs)


def test_added_tokens_are_scored_as_tokens(
    score: Run, include: Path, zoo: Zoo, tmp_path: Path
) -> None:
    """A merge has the tokens that experts added; an expert alone is seen through the base's."""
    choices, docs = ["ab", "b", "d", "c"], documents("test", 12)
    write_task(include, "letters", doc_to_choice=choices)
    model, table = load(zoo.full(1, noise=0.5)), tokenizer()
    table.add_tokens(["ab"])
    model.resize_token_embeddings(len(table), mean_resizing=False)
    save(model, tmp_path / "expert")
    table.save_pretrained(tmp_path / "expert")
    merged = tmp_path / "merged"
    merge_checkpoints(
        zoo.base(), {"a": tmp_path / "expert"}, merged, "average", "cpu", vocabulary="pad"
    )
    _, _, items = score(merged, "merge", out="merge")
    expected = outcomes(chosen(merged, docs, choices), docs)
    assert items["letters"]["test"]["outcomes"] == expected
    _, _, items = score(tmp_path / "expert", "expert", out="expert")
    expected = outcomes(chosen(zoo.base(), docs, choices, load(zoo.full(1, noise=0.5))), docs)
    assert items["letters"]["test"]["outcomes"] == expected


def chosen_with(base: Path, weights: Path, docs: list[dict]) -> list[int]:
    return chosen(base, docs, list(LETTERS), load(weights).float())


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


def test_bfloat16_is_close(score: Run) -> None:
    _, single, _ = score(out="single")
    _, half, _ = score(out="half", dtype="bfloat16")
    cells = [r["scores"]["letters"]["test"]["score"] for r in (single, half)]
    assert abs(cells[0] - cells[1]) <= 0.25


def test_few_shot_examples_are_seeded(score: Run, include: Path) -> None:
    shots = {"num_fewshot": 2, "fewshot_split": "validation"}
    write_task(include, "letters", **shots)
    runs = [score(seed=seed, out=str(i))[2] for i, seed in enumerate((1, 1))]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"splits": ["dev"]}, SettingError, "choose validation or test"),
        ({"splits": ["validation"], "validation": "test"}, SettingError, "nothing may be chosen"),
        ({"splits": ["validation"], "validation": "dev"}, SettingError, "no split 'dev'"),
        ({"dtype": "int8"}, SettingError, "float32, bfloat16, float16"),
        ({"device": "tpu"}, SettingError, "cuda"),
        ({"include": "nowhere"}, SettingError, "nowhere is not a folder"),
        ({"base": "nowhere"}, SourceError, "nowhere is not a folder"),
    ],
)
def test_wrong_settings_are_refused(
    score: Run, tmp_path: Path, change: dict[str, Any], error: type[PoemergeError], words: str
) -> None:
    with pytest.raises(error, match=words):
        score(**change)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the tasks of lm-eval, whose own index takes 8 s."""
    lm_tasks.load_task.cache_clear()
    folder = write_task(tmp_path / "built-in", "classic")
    monkeypatch.setattr(
        lm_tasks, "lm_eval_tasks", lambda: TaskManager(include_path=folder, include_defaults=False)
    )
    return folder


@pytest.mark.usefixtures("built_in")
def test_unknown_task_names_the_nearest(score: Run) -> None:
    with pytest.raises(SettingError, match=r"'leters' is neither .*nearest: letters"):
        score(tasks=["leters"])


@pytest.mark.usefixtures("built_in")
def test_other_tasks_are_lm_evals_own(score: Run) -> None:
    _, results, _ = score(tasks=["letters", "classic"])
    assert results["scores"]["classic"] == results["scores"]["letters"]


def test_built_in_task_needs_the_hub(score: Run, built_in: Path) -> None:
    write_task(built_in, "classic", dataset_path="nobody/nothing", dataset_kwargs={})
    with pytest.raises(
        SourceError, match=r"Task classic is built into lm-eval.*connect to the hub"
    ):
        score(tasks=["classic"])


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (
            ("letters.yaml", "task: letters\nbroken: [1, 2\nx: y\n"),
            r"letters\.yaml, line 3, is no YA",
        ),
        (("letters.yaml", "- a list\n"), r"letters\.yaml is no mapping"),
        (("letters.yaml", "task: letters\ninclude: nothing\n"), "nothing is unreadable"),
        (("letters.yaml", "task: letters\ninclude: letters.yaml\n"), "includes itself"),
        (("twin.yaml", "task: letters\n"), "both define letters"),
        (
            ("letters_test.jsonl", '{"text": "a", "answer": 0}\n{"te\n'),
            r"test\.jsonl, line 2, is no",
        ),
        (("letters_test.jsonl", '{"text": "a"}\n'), r"cannot be scored .*letters\.yaml"),
        (("letters_test.jsonl", None), r"letters_test\.jsonl, which is neither beside it"),
    ],
)
def test_broken_task_files_are_named(
    score: Run, include: Path, tmp_path: Path, broken: tuple[str, str | None], words: str
) -> None:
    file, text = broken
    (include / file).unlink(missing_ok=True)
    if text is not None:
        (include / file).write_text(text)
    with pytest.raises(SettingError, match=words):
        score()
    assert not (tmp_path / "out").exists()


def test_a_metric_that_is_no_score_per_item_is_refused(score: Run, include: Path) -> None:
    metric = {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}
    write_task(include, "letters", metric_list=[metric])
    with pytest.raises(SettingError, match="mcc as its first metric"):
        score()


def test_a_base_without_tokenizer_is_refused(score: Run, zoo: Zoo, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    save(load(zoo.base()), bare)
    with pytest.raises(CheckpointError, match="bare has no tokenizer"):
        score(base=bare)


def test_weights_that_do_not_fit_are_refused(score: Run, zoo: Zoo, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(zoo.full(1) / "model.safetensors")
    for name, change, words in (
        ("lacking", {"model.norm.weight": None}, "has no model.norm.weight; it does not fit"),
        ("other", {"lm_head.weight": torch.zeros(95, 32)}, r"lm_head.weight .*\(95, 32\)"),
    ):
        folder = tmp_path / name
        shutil.copytree(zoo.full(1), folder)
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(PoemergeError, match=words):
            score(folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_says_the_same(zoo: Zoo) -> None:
    asked = requests(*(("some words", letter) for letter in LETTERS))
    logs = []
    for device in ("cpu", "cuda"):
        scorer = load_scorer(zoo.base(), "device", "float32", device, 4)
        put_weights(scorer.model, expert_weights(zoo.full(1), None), "it")
        logs.append([log for log, _ in scorer.loglikelihood(asked)])
    assert logs[1] == pytest.approx(logs[0], abs=1e-4)
