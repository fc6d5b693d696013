"""lm-eval's scores of tiny real models against transformers by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from poemerge.merge import expert_weights, merge_checkpoints
from tasks.evaluate.scorer import load_scorer, put_weights
from tests.tasks.letters import LETTERS, Run, documents, write_task
from tests.zoo import Zoo, adapt, load, save, tokenizer


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


def test_bfloat16_is_close(score: Run) -> None:
    _, single, _ = score(out="single")
    _, half, _ = score(out="half", dtype="bfloat16")
    cells = [r["scores"]["letters"]["test"]["score"] for r in (single, half)]
    assert abs(cells[0] - cells[1]) <= 0.25


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
