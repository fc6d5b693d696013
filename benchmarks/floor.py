"""The floor of a merge: read every input once, write one output, compute nothing.

python -m benchmarks.floor OUT BASE EXPERT...
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def floor(out: Path, folders: list[Path]) -> int:
    """Touch every byte of every checkpoint and write the first one out; returns a checksum."""
    total = 0
    for index, folder in enumerate(folders):
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file)
            total += sum(int(t.reshape(-1).view(torch.int16).amax()) for t in tensors.values())
            if index == 0:
                out.mkdir(exist_ok=True, parents=True)
                save_file(tensors, out / file.name, metadata={"format": "pt"})
    return total


if __name__ == "__main__":
    floor(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
