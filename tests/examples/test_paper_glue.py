"""GLUE as in the paper: prompts, answers, and the scores of encoder-decoders."""

import json
from importlib import util
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from flows.params import load
from poemerge.merge import expert_weights
from tasks.evaluate import evaluate
from tasks.evaluate.lm_tasks import load_task
from tasks.evaluate.scorer import load_scorer, put_weights
from tasks.evaluate.task_files import find_tasks
from tests.examples import tiny
from tests.examples.conftest import Makers
from tests.examples.paper import FILES, GLUE, ROOT, close, say, strict

PROMPTS = {  # of one item: what the experts were trained on
    "cola": (
        {"sentence": "A b."},
        (
            'Indicate if the following sentence is grammatically correct or not: "A b.". Answere '
            "'acceptable' or 'unacceptable'."
        ),
        ("unacceptable", "acceptable"),
    ),
    "mnli": (
        {"premise": "A.", "hypothesis": "B."},
        (
            "Does the premise: 'A.' logically imply, contradict, or is neutral to the hypothesis: "
            "'B.'? Answere with 'entailment', 'contradiction', or 'neutral'."
        ),
        ("entailment", "neutral", "contradiction"),
    ),
    "mrpc": (
        {"sentence1": "A.", "sentence2": "B."},
        (
            "Are the following sentences 'A.' and 'B.' conveying the same meaning? Answere with "
            "'yes' or 'no'."
        ),
        ("no", "yes"),
    ),
    "qnli": (
        {"question": "A?", "sentence": "B."},
        (
            "Given the context: 'B.', does the question 'A?' have an answer based on the "
            "information provided? Answer with 'yes' or 'no'."
        ),
        ("yes", "no"),
    ),
    "qqp": (
        {"question1": "A?", "question2": "B?"},
        "Do the questions 'A?' and 'B?' have the same intent? Answere with 'yes' or 'no'.",
        ("no", "yes"),
    ),
    "rte": (
        {"sentence1": "A.", "sentence2": "B."},
        "Does the text: 'A.' entail that 'B.' is true? Provide 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "sst2": (
        {"sentence": "A b."},
        "Given the sentence 'A b.', determine the sentiment. Is it positive or negative?",
        ("negative", "positive"),
    ),
    "stsb": (
        {"sentence1": "A.", "sentence2": "B."},
        (
            "Consider the sentences 'A.' and 'B.'. On a scale from 1 (completely different) to 5 "
            "(completely similar), rate the similarity."
        ),
        ("0.0", "1.0"),
    ),
}


def local_glue(folder: Path) -> Path:
    """The shipped tasks, on an item a label that lies in `folder`."""
    folder.mkdir()
    for file in (ROOT / "tasks").iterdir():
        if file.is_file():
            text = file.read_text().replace("dataset_path: nyu-mll/glue", "dataset_path: json")
            files = f"{{train: {file.stem}.jsonl, validation: {file.stem}.jsonl}}"
            if file.stem == "mnli":
                files = files.replace("validation", "validation_matched")
            data = f"dataset_kwargs: {{data_files: {files}}}\n"
            (folder / file.name).write_text(text.replace(f"dataset_name: {file.stem}\n", data))
    for name, (item, _, answers) in PROMPTS.items():
        kind = float if name == "stsb" else int
        rows = [item | {"label": kind(label)} for label in range(len(answers))]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", GLUE)
def test_prompts_and_answers_are_those_of_training(name: str, tmp_path: Path) -> None:
    shipped = yaml.safe_load((ROOT / "tasks/answer.yaml").read_text())
    assert (shipped["dataset_path"], shipped["test_split"]) == ("nyu-mll/glue", "validation")
    (found,) = find_tasks([name], folder := local_glue(tmp_path / "tasks"), [folder])
    loaded, (_, prompt, answers) = load_task(found), PROMPTS[name]
    assert loaded.test == ("validation_matched" if name == "mnli" else "validation")
    docs = list(loaded.task.dataset["train"])
    assert [loaded.task.doc_to_text(doc) for doc in docs] == [prompt] * len(answers)
    assert [loaded.task.doc_to_target(doc) for doc in docs] == list(answers)


def says_no(folder: Path) -> Path:
    """An encoder-decoder that answers `no` whatever it is asked."""
    base = tiny.flan_t5(folder)
    model, tokens = strict(base, AutoModelForSeq2SeqLM), AutoTokenizer.from_pretrained(base)
    asked = tokens([p for _, p, _ in PROMPTS.values()], padding=True, return_tensors="pt")
    labels = tokens(["no"] * len(PROMPTS), return_tensors="pt").input_ids
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = model(**asked, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tiny.as_on_the_hub(folder)
    return folder


def test_generated_answers_are_scored(tmp_path: Path) -> None:
    base, out = says_no(tmp_path / "base"), tmp_path / "out"
    params = load(ROOT / FILES[0]).evaluate.model_dump(exclude={"experts"}) | {
        "include": local_glue(tmp_path / "tasks"),
        "trust": [tmp_path / "tasks"],
        "device": "cpu",
    }
    evaluate.fn("base", "base", base, None, out, splits=["validation", "test"], **params)
    items = json.loads((out / "items.json").read_text())
    for name, (_, _, answers) in PROMPTS.items():
        expected = [int(answer == "no") for answer in answers]
        assert items[name]["test"]["outcomes"] == expected, name
        assert items[name]["validation"]["outcomes"] == expected, name


def test_closeness_of_similarities() -> None:
    spec = util.spec_from_file_location("stsb", ROOT / "tasks/stsb.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = {"3.0": 0.9, "2.5": 1.0, "5.0": 0.5, "9": 0.0, "nan": 0.0, "-1": 0.0, "no": 0.0}
    for answer, score in cases.items():
        found = module.closeness({"label": 2.5}, [answer])["closeness"]
        assert found == pytest.approx(score), answer


CHOICES = ("yes", "no", "maybe so")
TEXTS = ("a?", "a longer question, with a comma?", "x" * 60)


def asked() -> list[Instance]:
    pairs = [(text, choice) for text in TEXTS for choice in CHOICES]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_encoder_decoder_is_scored_as_by_hand(makers: Makers, batch_size: int) -> None:
    base = makers.base("t5")
    scorer = load_scorer(base, "t5", "float32", "cpu", batch_size)
    model, tokens = strict(base, AutoModelForSeq2SeqLM), AutoTokenizer.from_pretrained(base)
    for instance, (score, greedy) in zip(asked(), scorer.loglikelihood(asked()), strict=True):
        text = tokens(instance.args[0], return_tensors="pt").input_ids
        choice = tokens(instance.args[1], return_tensors="pt").input_ids[:, :-1]  # no end
        with torch.no_grad():
            logs = model(input_ids=text, labels=choice).logits[0].double().log_softmax(dim=-1)
        assert score == pytest.approx(float(logs.gather(1, choice.mT).sum()), abs=1e-4)
        assert greedy == torch.equal(logs.argmax(dim=-1), choice[0])


def test_an_encoder_decoder_is_scored_as_lm_eval_does(tmp_path: Path) -> None:
    base = tiny.flan_t5(tmp_path / "base")
    model = strict(base, AutoModelForSeq2SeqLM)
    model.lm_head.weight = model.shared.weight  # lm-eval would tie it
    model.save_pretrained(base)
    mine = load_scorer(base, "tied", "float32", "cpu", 3).loglikelihood(asked())
    plain = HFLM(
        strict(base, AutoModelForSeq2SeqLM),
        tokenizer=AutoTokenizer.from_pretrained(base),
        backend="seq2seq",
        batch_size=3,
    )
    theirs = plain.loglikelihood(asked(), disable_tqdm=True)
    for (score, greedy), (expected, also) in zip(mine, theirs, strict=True):
        assert (score, greedy) == (pytest.approx(expected, abs=1e-5), also)


def test_candidates_of_an_encoder_decoder_keep_their_own_head(makers: Makers) -> None:
    base, expert = makers.base("t5"), makers.expert("t5", 1, full=True)
    scorer = load_scorer(base, "t5", "float32", "cpu", 4)
    put_weights(scorer.model, expert_weights(expert, None), "it")
    tuned = strict(expert, AutoModelForSeq2SeqLM)
    close(scorer.model.state_dict(), tuned.state_dict())
    torch.testing.assert_close(say(scorer.model), say(tuned))
