"""The tiny models of the paper's experiments, each made once."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from transformers import T5ForConditionalGeneration

from tests.examples import tiny


@dataclass(frozen=True)
class Makers:
    """Folders of tiny models; for reading only."""

    root: Path

    @cache  # noqa: B019 - lives as long as the session
    def base(self, kind: str) -> Path:
        """`t5` or `clip`; the latter as a pickle with the buffer that older ones hold."""
        folder = self.root / kind
        return tiny.flan_t5(folder) if kind == "t5" else tiny.clip(folder)

    @cache  # noqa: B019
    def expert(self, kind: str, seed: int, *, full: bool) -> Path:
        """A full fine-tune, or an adapter as the hub's of that kind."""
        base, folder = self.base(kind), self.root / f"{kind}-{seed}-{full}"
        model = (
            T5ForConditionalGeneration.from_pretrained(base)
            if kind == "t5"
            else tiny.vision_tower(base)
        )
        if full:
            return tiny.tuned(model, folder, seed)
        if kind == "t5":
            settings = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
            return tiny.lora(model, folder, seed, **settings)
        targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
        return tiny.lora(model, folder, seed, target_modules=targets)


@pytest.fixture(scope="session")
def makers(tmp_path_factory: pytest.TempPathFactory) -> Makers:
    """The maker of tiny models."""
    return Makers(tmp_path_factory.mktemp("paper"))
