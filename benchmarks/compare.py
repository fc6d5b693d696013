"""How far merged checkpoints are from exact task arithmetic, and from one another.

python -m benchmarks.compare BASE,EXPERT,... MERGED MERGED
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Tensors = Mapping[str, Tensor]


def compare(inputs: Sequence[Path], merged: Sequence[Path]) -> dict[str, list[float] | float]:
    """Largest errors of each merge against θ_0 + Σ (θ_i - θ_0) in fp64, and their difference.

    `ulps` counts in units of the last place of bf16 at the largest of inputs and exact value:
    rounding once costs 0.5 at most.
    """
    base, *experts = (_load(folder) for folder in inputs)
    results = [_load(folder) for folder in merged]
    errors, ulps, apart = [0.0] * len(merged), [0.0] * len(merged), 0.0
    for name, start in base.items():
        origin = start.double()
        tuned = torch.stack([expert[name].double() for expert in experts])
        exact = origin + (tuned - origin).sum(dim=0)
        place = _last_place(torch.cat([tuned, origin[None], exact[None]]).abs().amax(dim=0))
        for index, result in enumerate(results):
            error = (result[name].double() - exact).abs()
            errors[index] = max(errors[index], float(error.max()))
            ulps[index] = max(ulps[index], float((error / place).max()))
        difference = results[0][name].double() - results[-1][name].double()
        apart = max(apart, float(difference.abs().max()))
    return {"error": errors, "ulps": ulps, "apart": apart}


def _last_place(values: Tensor) -> Tensor:
    """Spacing of bf16 numbers (8 significant bits) around each value."""
    return torch.exp2(torch.frexp(values).exponent.double() - 8).clamp_min(1e-30)


def _load(folder: Path) -> Tensors:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


if __name__ == "__main__":
    given = [[Path(path) for path in text.split(",")] for text in sys.argv[1:]]
    print(json.dumps(compare(given[0], [path for paths in given[1:] for path in paths])))
