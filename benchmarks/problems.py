"""The problems that the solvers are measured on: seeded, and the same on every machine."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poemerge.task_vector import DenseStack, LowRankStack, Stack

EXPERTS = 8
SMALL, LARGE = 1e-3, 5e-2  # size of an update's entries
SPREAD = 0.5, 1.5  # experts' sizes in that unit: some are trained for longer than others
FACTORS = 2e-2  # the same for large factors of a Llama: with more, fp32 Cholesky may break down
FULL, LORA = 0.3, 0.01  # ε: published for ViT-B/32, and for Flan-T5 and ViT-L/14
SHRINK = 8  # of all dimensions, by --quick


@dataclass(frozen=True)
class Case:
    """One matrix and its experts, with normal entries.

    Attributes:
        kind: its first words.
        rows: output features O.
        columns: input features I.
        entries: standard deviation of the entries of an update of middling size.
        epsilon: γ² in units of ||A||².
        rank: of the factors; 0 is dense.
        chunks: cut into square row chunks, by both sides.
        gpu: too large for a CPU.
    """

    kind: str
    rows: int
    columns: int
    entries: float
    epsilon: float
    rank: int = 0
    chunks: bool = False
    gpu: bool = False

    @property
    def name(self) -> str:
        """What --only looks at."""
        return f"{self.kind} {self.rows}×{self.columns}{' in chunks' * self.chunks}"

    def shrunk(self) -> "Case":
        """The same with small sides, to try things out."""
        rows, columns, rank = self.rows // SHRINK, self.columns // SHRINK, self.rank // SHRINK
        return replace(self, rows=rows, columns=columns, rank=rank)


@dataclass(frozen=True)
class Problem:
    """The experts of a case, on a device: dense for the published procedure, a stack for ours."""

    updates: Tensor  # (E, O, I), fp32
    stack: Stack


DENSE = ((1024, 1024, False), (768, 3072, False), (3072, 768, False), (3072, 768, True))
LLAMA = ((4096, 4096), (4096, 11008), (11008, 4096))


def cases() -> list[Case]:
    """Every case, those for a CPU first."""
    made = [
        Case("lora small", 2048, 2048, SMALL, LORA, rank=16),
        Case("lora large", 2048, 2048, LARGE, LORA, rank=16),
    ]
    for size, entries in (("small", SMALL), ("large", LARGE)):
        made += [
            Case(f"dense {size}", rows, columns, entries, FULL, chunks=cut)
            for rows, columns, cut in DENSE
        ]
    for shape in LLAMA:
        made += [
            Case("llama lora small", *shape, SMALL, LORA, rank=16, gpu=True),
            Case("llama lora large", *shape, FACTORS, LORA, rank=16, gpu=True),
            Case("llama dense small", *shape, SMALL, FULL, gpu=True),
            Case("llama dense large", *shape, LARGE, FULL, gpu=True),
        ]
    return made


def make(case: Case, device: torch.device) -> Problem:
    """Draw the experts of a case on the CPU, and take them to a device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(EXPERTS, 1, *shape, generator=generator)

    sizes = case.entries * torch.linspace(*SPREAD, EXPERTS).view(EXPERTS, 1, 1, 1)
    if not case.rank:
        updates = (sizes * draw(case.rows, case.columns))[:, 0].to(device)
        return Problem(updates, DenseStack(updates.unsqueeze(0)))
    ups = (sizes * draw(case.rows, case.rank)).to(device)
    downs = (draw(case.rank, case.columns) / case.rank**0.5).to(device)
    return Problem((ups @ downs)[:, 0], LowRankStack(tuple(ups), tuple(downs)))
