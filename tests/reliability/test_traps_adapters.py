"""LoRA adapters of all kinds: merged as PEFT merges them, or refused by name."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from poemerge.lora_config import UNSUPPORTED
from tests.reliability.traps import ADAPTER, FILE, Trap, change, change_json
from tests.reliability.trials import Trials
from tests.zoo import Zoo, merged_by_peft

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj", "lm_head")
WHOLE = ("lm_head", "embed_tokens", "norm")


def options(trap: Trap) -> dict[str, Any]:
    """Of one adapter, at random: rank, scale, targets, and patterns for some of these."""
    draw = trap.draw
    targets = draw.sample(TARGETS, draw.randint(1, 5))
    how: dict[str, Any] = {
        "r": draw.choice([1, 2, 4, 16]),
        "lora_alpha": draw.choice([1, 8, 16, 0.5]),
        "target_modules": targets,
        "use_rslora": draw.random() < 0.5,
    }
    if draw.random() < 0.5:
        how["rank_pattern"] = {targets[0]: draw.choice([3, 5])}
    if draw.random() < 0.5:
        how["alpha_pattern"] = {targets[-1]: draw.choice([2, 32])}
    return how


def test_adapters_that_differ(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """LoRA of different rank, alpha, targets and scaling merge as PEFT puts each into the base"""
    start = load_file(zoo.base() / FILE)
    for number in trials(short=2, full=40):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            trap.method = "task_arithmetic"
            adapters = {name: zoo.adapter(number, **options(trap)) for name in ("a", "b")}
            _, merged = trap.merge(adapters, strength=1.0)
            tuned = [merged_by_peft(zoo.base(), folder) for folder in adapters.values()]
            for name, weight in merged.items():
                wanted = sum((one[name] - start[name] for one in tuned), start[name])
                torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-5)


def test_modules_kept_whole(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """Adapters with modules_to_save merge as PEFT does, beside adapters without"""
    start = load_file(zoo.base() / FILE)
    for number in trials(short=2, full=40):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            trap.method = "average"
            whole = trap.draw.sample(WHOLE, trap.draw.randint(1, 3))
            adapters = {
                "a": zoo.adapter(number, target_modules=["q_proj"], modules_to_save=whole),
                "b": zoo.adapter(number + 1),
            }
            _, merged = trap.merge(adapters)
            tuned = [merged_by_peft(zoo.base(), folder) for folder in adapters.values()]
            for name, weight in merged.items():
                wanted = (tuned[0][name] + tuned[1][name]) / 2
                torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-5)
            norm = "model.norm.weight"
            assert torch.equal(merged[norm], start[norm]) == ("norm" not in whole)


def test_what_factors_do_not_say(trials: Trials, zoo: Zoo, tmp_path: Path) -> None:
    """What two factors do not express (DoRA, biases, other kinds of adapters) is refused by name"""
    refusals: list[tuple[dict[str, object], str]] = [
        *(({key: True}, f"{key}=True, which plain LoRA") for key in UNSUPPORTED),
        ({"bias": "all"}, "bias='all', which plain LoRA"),
        ({"bias": "lora_only"}, "bias='lora_only', which plain LoRA"),
        *(({"peft_type": kind}, f"of type {kind}; only LORA") for kind in ("IA3", "LOHA", "VERA")),
        ({"init_lora_weights": "pissa"}, "initialised by pissa, which changes the base"),
        ({"r": 0}, "has r=0, which PEFT does not write"),
        ({"r": 3}, "says rank 3; save the adapter again"),
        ({"lora_alpha": 0}, "changes nothing, all its updates are zero"),
    ]
    for number in trials(short=len(refusals), full=3 * len(refusals)):
        with trials.trial(number):
            trap = Trap(zoo, tmp_path, number)
            changes, sentence = refusals[number % len(refusals)]
            folder = trap.copy(zoo.adapter(trap.draw.randint(1, 4)), "trapped")
            change_json(folder / "adapter_config.json", **changes)
            trap.refused(sentence, trap.among(folder))


def test_rank_nought(zoo: Zoo, tmp_path: Path) -> None:
    trap = Trap(zoo, tmp_path, 0)
    folder = trap.copy(zoo.adapter(1), "trapped")

    def empty(tensors: dict[str, torch.Tensor]) -> None:
        for name, factor in tensors.items():
            tensors[name] = (factor[:0] if "lora_A" in name else factor[:, :0]).contiguous()

    change(folder, empty, ADAPTER)
    change_json(folder / "adapter_config.json", r=0)
    trap.refused("has r=0, which PEFT does not write", {"a": folder})
