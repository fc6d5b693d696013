"""A whole merge of layers shaped like those of a Llama of 7 B parameters, on CPU and GPU.

python -m benchmarks.layers FOLDER
python -m benchmarks.layers FOLDER --device cuda --layers 4
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from poemerge import merge_checkpoints

WIDTH, INNER = 4096, 11008
SHAPES = {
    **{f"self_attn.{x}_proj": (WIDTH, WIDTH) for x in "qkvo"},
    **{f"mlp.{x}_proj": (INNER, WIDTH) for x in ("gate", "up")},
    "mlp.down_proj": (WIDTH, INNER),
}
EXPERTS = 4
NOISE = 1e-3  # entries of a task vector
METHODS = ("average", "task_arithmetic", "ties", "gaussian_poe", "cauchy_poe")


def make(folder: Path, layers: int, device: torch.device) -> tuple[Path, list[Path]]:
    """A base and its experts in bf16, seeded, one file each; made on `device`, for speed."""
    made = []
    for expert in range(EXPERTS + 1):
        out = folder / (f"expert{expert}" if expert else "base")
        made.append(out)
        if out.exists():
            continue
        tensors = {}
        for index in range(layers):
            for place, (name, shape) in enumerate(SHAPES.items()):
                seed = 1000 * index + 10 * place
                weight = 0.02 * _normal(shape, seed, device)
                if expert:
                    weight += NOISE * _normal(shape, seed + expert, device)
                tensors[f"model.layers.{index}.{name}.weight"] = weight.bfloat16().cpu()
        out.mkdir(parents=True)
        save_file(tensors, out / "model.safetensors")
    return made[0], made[1:]


def _normal(shape: tuple[int, int], seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def main() -> None:
    """Merge by every method, and print seconds and gigabytes a second of weights read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--only", default="", help="methods with this in their name")
    given = parser.parse_args()
    device = torch.device(given.device)
    base, experts = make(given.folder, given.layers, device)
    size = sum(file.stat().st_size for e in (base, *experts) for file in e.glob("*.safetensors"))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}: {EXPERTS} experts, {given.layers} layers, {size / 1e9:.1f} GB read")
    for method in (method for method in METHODS if given.only in method):
        out = given.folder / "merged"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        report = merge_checkpoints(base, experts, out, method, given.device)
        seconds = time.perf_counter() - start
        print(f"{method:16} {seconds:7.1f} s {size / seconds / 1e9:6.2f} GB/s", flush=True)
        for warning in report.warnings:
            print(f"  {warning}")


if __name__ == "__main__":
    main()
