"""The paper's experiments: all of examples/paper, on tiny models of the same architectures."""

import json
import sys
import warnings
from collections import Counter
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from click.testing import CliRunner
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedModel,
)

from flows.params import load
from flows.places import PLAIN, Places
from flows.steps import STAGES, steps
from poemerge.errors import CheckpointError
from poemerge.merge import expert_weights, merge_checkpoints
from poemerge.merging.plan import plan_merge
from tasks.evaluate import evaluate
from tasks.evaluate.lm_tasks import load_task
from tasks.evaluate.scorer import load_scorer, put_weights
from tasks.evaluate.task_files import find_tasks
from tests.examples import tiny
from tests.examples.conftest import Makers
from tests.flows.conftest import PARAMS

ROOT = Path(__file__).parents[2] / "examples/paper"
FILES = sorted(path.name for path in ROOT.glob("*.yaml"))
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
IMAGES = ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
# Of the published code: epsilon, strength.
PUBLISHED = {
    "flan-t5-base-lora16.yaml": (0.01, 1.0),
    "flan-t5-large-lora16.yaml": (0.01, 1.0),
    "vit-b32-full.yaml": (0.3, 1.0),
    "vit-b32-lora16.yaml": (2.0, 0.3),
    "vit-l14-full.yaml": (0.01, 1.0),
    "vit-l14-lora16.yaml": (0.01, 0.25),
}
RULES = {  # of the tiny models below; what no expert has is copied
    ("t5", False): {"matrix": 12, "copy": 40},
    ("clip", False): {"matrix": 8, "copy": 71},  # position_ids included, as in the .bin
    ("clip", True): {"matrix": 13, "average": 26, "copy": 40},
}


def on_tiny(name: str, makers: Makers, folder: Path) -> list[str]:
    """Overrides that put tiny models where `name` has those of the hub; stored as there."""
    kind, full = "t5" if name.startswith("flan") else "clip", "full" in name
    base = copied(makers.base(kind), folder / "base")
    if kind == "clip":
        ids = torch.arange(5)[None]
        tiny.pickled(base, "pytorch_model.bin", **{"vision_model.embeddings.position_ids": ids})
    overrides = [f"fetch.base.source={base}"]
    for seed, task in enumerate(load(ROOT / name).fetch.experts, start=1):
        expert = copied(makers.expert(kind, seed, full=full), folder / task)
        if kind == "clip" and not full:
            tiny.pickled(expert, "adapter_model.bin")
        overrides.append(f"fetch.experts.{task}.source={expert}")
    return overrides


def copied(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_all_experiments_are_there() -> None:
    assert sorted(PUBLISHED) == FILES


@pytest.mark.parametrize("name", FILES)
def test_settings_are_the_published_ones(name: str) -> None:
    params, (epsilon, strength) = load(ROOT / name), PUBLISHED[name]
    tasks = GLUE if name.startswith("flan") else IMAGES
    assert tuple(params.fetch.experts) == tasks
    assert params.evaluate.tasks == (list(GLUE) if name.startswith("flan") else [])
    paper = {"strength": strength, "preset": "paper"}
    assert params.merge.candidate("gaussian_poe") == ("gaussian_poe", paper)
    assert params.merge.candidate("cauchy_poe") == ("cauchy_poe", paper | {"epsilon": epsilon})
    for source in (params.fetch.base, *params.fetch.experts.values()):
        assert source.source.startswith("hf://")


@pytest.mark.parametrize("name", FILES)
def test_every_candidate_is_planned(
    name: str, makers: Makers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = load(ROOT / name, on_tiny(name, makers, tmp_path / "hub"))
    places = Places(params, params)
    for step in steps("fetch", places):
        assert step.run()
    kind, full = "t5" if name.startswith("flan") else "clip", "full" in name
    for label in params.merge.methods:
        method, settings = params.merge.candidate(label)
        with plan_merge(places.base, places.experts, method, settings) as plan:
            assert not [note for note in plan.notes if "left out" in note or "lacks" in note]
            counts = Counter(plan.rules.values())
        if label.endswith("poe"):
            assert counts == RULES[kind, full]
        assert counts["copy"] == RULES[kind, full]["copy"]


def strict(folder: Path, model: type) -> PreTrainedModel:
    """The model of a folder, every name of which must be the model's."""
    loaded, found = model.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return loaded.eval()


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def say(model: Any) -> torch.Tensor:
    """Logits of an encoder-decoder on fixed tokens."""
    torch.manual_seed(1)
    with torch.no_grad():
        return model(input_ids=torch.randint(3, 90, (2, 9)), labels=torch.ones(2, 4).long()).logits


def look(model: Any) -> torch.Tensor:
    """What a vision tower sees in random pixels."""
    torch.manual_seed(1)
    with torch.no_grad():
        return model(pixel_values=torch.randn(2, 3, tiny.SIDE, tiny.SIDE)).pooler_output


def test_an_adapter_of_t5_merges_as_peft_merges_it(makers: Makers, tmp_path: Path) -> None:
    base, expert = makers.base("t5"), makers.expert("t5", 1, full=False)
    merge_checkpoints(base, [expert], tmp_path / "out", "average")
    merged = strict(tmp_path / "out", AutoModelForSeq2SeqLM)
    assert not torch.equal(merged.lm_head.weight, merged.shared.weight)
    reference = strict(base, AutoModelForSeq2SeqLM)
    with warnings.catch_warnings(action="ignore"):  # that a head of its own is no tied one
        adapted = peft.PeftModel.from_pretrained(reference, expert).merge_and_unload()
    close(merged.state_dict(), adapted.state_dict())
    torch.testing.assert_close(say(merged), say(adapted), rtol=1e-4, atol=1e-4)


def test_a_merged_adapter_of_t5_is_one_of_an_encoder_decoder(
    makers: Makers, tmp_path: Path
) -> None:
    base, experts = makers.base("t5"), [makers.expert("t5", i, full=False) for i in (1, 2)]
    for output in ("full", "adapter"):
        merge_checkpoints(base, experts, tmp_path / output, "cauchy_poe", output=output)
    adapted = peft.PeftModel.from_pretrained(
        strict(base, AutoModelForSeq2SeqLM), tmp_path / "adapter"
    )
    assert isinstance(adapted, peft.PeftModelForSeq2SeqLM)
    full = strict(tmp_path / "full", AutoModelForSeq2SeqLM)
    torch.testing.assert_close(say(adapted), say(full), rtol=1e-4, atol=1e-4)


def test_full_fine_tunes_of_t5(makers: Makers, tmp_path: Path) -> None:
    base, experts = makers.base("t5"), [makers.expert("t5", i, full=True) for i in (1, 2)]
    merge_checkpoints(base, experts, tmp_path / "average", "average")
    weights = [load_file(expert / "model.safetensors") for expert in experts]
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert {bias, "shared.weight", "lm_head.weight"} <= weights[0].keys()
    mean = {name: (weights[0][name] + weights[1][name]) / 2 for name in weights[0]}
    close(load_file(tmp_path / "average/model.safetensors"), mean)
    merge_checkpoints(base, experts, tmp_path / "poe", "cauchy_poe", preset="paper")
    assert say(strict(tmp_path / "poe", AutoModelForSeq2SeqLM)).isfinite().all()


def test_a_head_of_its_own_is_kept_whatever_the_config_says(makers: Makers, tmp_path: Path) -> None:
    base = copied(makers.base("t5"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    both = {"tie_word_embeddings": True, "scale_decoder_outputs": False}  # as transformers 5 saves
    (base / "config.json").write_text(json.dumps(config | both))
    experts = [makers.expert("t5", i, full=True) for i in (1, 2)]
    merge_checkpoints(base, experts, tmp_path / "out", "average")
    heads = [load_file(expert / "model.safetensors")["lm_head.weight"] for expert in experts]
    merged = strict(tmp_path / "out", AutoModelForSeq2SeqLM)
    torch.testing.assert_close(merged.lm_head.weight.detach(), (heads[0] + heads[1]) / 2)


def test_an_adapter_of_the_vision_tower_finds_it_in_the_whole(
    makers: Makers, tmp_path: Path
) -> None:
    base, expert = makers.base("clip"), makers.expert("clip", 1, full=False)
    merge_checkpoints(base, [expert], tmp_path / "out", "average")
    merged = strict(tmp_path / "out", CLIPModel)
    adapted = peft.PeftModel.from_pretrained(tiny.vision_tower(base), expert).merge_and_unload()
    close(merged.vision_model.state_dict(), adapted.state_dict())
    whole = strict(base, CLIPModel)
    close(merged.text_model.state_dict(), whole.text_model.state_dict())
    torch.testing.assert_close(look(merged.vision_model), look(adapted), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(look(merged.vision_model), look(whole.vision_model), atol=1e-3)


@pytest.mark.parametrize("full", [True, False])
def test_a_tower_merges_alike_alone_and_in_the_whole(
    makers: Makers, tmp_path: Path, *, full: bool
) -> None:
    base, experts = makers.base("clip"), [makers.expert("clip", i, full=full) for i in (1, 2)]
    tiny.vision_tower(base).save_pretrained(tmp_path / "tower")
    for source, name in ((base, "whole"), (tmp_path / "tower", "alone")):
        merge_checkpoints(
            source, experts, tmp_path / name, "cauchy_poe", preset="paper", epsilon=0.3
        )
    whole = load_file(tmp_path / "whole/model.safetensors")
    alone = load_file(tmp_path / "alone/model.safetensors")
    assert alone
    for name, weight in alone.items():
        assert torch.equal(whole[name], weight), name
    tower = strict(tmp_path / "alone", CLIPVisionModel)
    seen = look(tower)
    assert seen.isfinite().all()
    assert torch.equal(seen, look(strict(tmp_path / "whole", CLIPModel).vision_model))


def test_convolutions_are_averaged(makers: Makers, tmp_path: Path) -> None:
    experts = [makers.expert("clip", i, full=True) for i in (1, 2, 3)]
    merge_checkpoints(
        makers.base("clip"), experts, tmp_path / "out", "gaussian_poe", preset="paper"
    )
    name = "vision_model.embeddings.patch_embedding.weight"
    mean = torch.stack([load_file(e / "model.safetensors")[name] for e in experts]).mean(dim=0)
    torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors")[name], mean)


def test_two_towers_of_one_shape_are_not_guessed_between(makers: Makers, tmp_path: Path) -> None:
    base = tiny.clip(tmp_path / "base", text_width=32)
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(base, [makers.expert("clip", 1, full=False)], tmp_path / "out")
    for word in ("text_model.", "vision_model.", "checkpoint of its own"):
        assert word in str(caught.value)


def test_what_lm_eval_cannot_score_is_merged_beside_the_project(
    makers: Makers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load(ROOT / FILES[-1], on_tiny(FILES[-1], makers, tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS.format(base="not/there"))
    places = Places(params, load(PLAIN))
    done = [step.name for stage in STAGES for step in steps(stage, places) if step.run()]
    assert done[-len(params.merge.methods) :] == [f"merge {m}" for m in params.merge.methods]
    for label in params.merge.methods:
        tower = strict(places.merge(label), CLIPModel).vision_model
        assert look(tower).isfinite().all()
    assert not Path("artifacts").exists()


def zero_shot() -> ModuleType:
    """examples/paper/clip_zero_shot.py as a module."""
    spec = util.spec_from_file_location("clip_zero_shot", ROOT / "clip_zero_shot.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def draw(folder: Path, classes: int, each: int) -> list[tuple[Path, int]]:
    """Images of one colour with labels, in the order in which `datasets` reads them."""
    generator = np.random.default_rng(0)
    drawn = []
    for label in range(classes):
        (folder / "test" / f"class_{label}").mkdir(parents=True)
        for index in range(each):
            path = folder / "test" / f"class_{label}" / f"{index}.png"
            colour = tuple(generator.integers(0, 256, 3).tolist())
            Image.new("RGB", (24, 20), colour).save(path)
            drawn.append((path, label))
    return drawn


@pytest.mark.parametrize("task", ["mnist", "eurosat"])
def test_zero_shot_accuracy_is_that_of_transformers(
    task: str, makers: Makers, tmp_path: Path
) -> None:
    script, base = zero_shot(), makers.base("clip")
    merge_checkpoints(
        base, [makers.expert("clip", i, full=True) for i in (1, 2)], tmp_path / "merged", "average"
    )
    drawn = draw(tmp_path / "images", classes=3, each=7)
    command = ["--task", task, "--data", str(tmp_path / "images"), "--batch-size", "4"]
    ran = CliRunner().invoke(script.main, [*command, str(tmp_path / "merged")])
    assert ran.exit_code == 0, ran.output
    model = CLIPModel.from_pretrained(tmp_path / "merged").eval()
    processor = CLIPImageProcessor.from_pretrained(base)
    tokens = AutoTokenizer.from_pretrained(base)
    found = []
    for path, _ in drawn:
        sums = []
        for name in ("class 0", "class 1", "class 2"):
            texts = [prompt.format(name) for prompt in script.TASKS[task].prompts]
            pixels = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
            text = tokens(texts, padding=True, return_tensors="pt")
            with torch.no_grad():
                seen = model(**text, **pixels)
            mean = seen.text_embeds.mean(dim=0)
            sums.append(float(seen.image_embeds[0] @ (mean / mean.norm())))
        found.append(sums.index(max(sums)))
    assert len(set(found)) > 1
    right = sum(answer == label for answer, (_, label) in zip(found, drawn, strict=True))
    assert float(ran.stdout.split()[0]) == pytest.approx(right / len(drawn), abs=1e-4)


def test_zero_shot_sees_experts_as_updates_of_the_base(makers: Makers, tmp_path: Path) -> None:
    script, base = zero_shot(), makers.base("clip")
    expert = makers.expert("clip", 1, full=True)
    draw(tmp_path / "images", classes=3, each=7)
    merge_checkpoints(base, [expert], tmp_path / "same", "average")
    command = ["--task", "mnist", "--data", str(tmp_path / "images"), "--limit", "20"]
    by_base = CliRunner().invoke(
        script.main, [*command, "--base", str(base), str(base), str(expert)]
    )
    alone = CliRunner().invoke(script.main, [*command, str(base), str(tmp_path / "same")])
    assert by_base.exit_code == alone.exit_code == 0, by_base.output + alone.output
    scores = [[line.split()[:3] for line in r.stdout.splitlines()] for r in (by_base, alone)]
    assert scores[0] == scores[1]
    assert scores[0][0][1:] == ["20", "images"]


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
