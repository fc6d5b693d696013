"""Merges of T5 and CLIP as in the paper: they are what peft and transformers make of them."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, CLIPModel, CLIPVisionModel

from poemerge.errors import CheckpointError
from poemerge.merge import merge_checkpoints
from tests.examples import tiny
from tests.examples.conftest import Makers
from tests.examples.paper import close, copied, look, say, strict


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
