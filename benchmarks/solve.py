"""One matrix, our solver against the published procedure, in one process.

python -m benchmarks.solve                      # on the CPU
python -m benchmarks.solve --device cuda        # layers of a Llama of 7 B parameters too
python -m benchmarks.solve --only lora --json lora.json
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import clock
from benchmarks.problems import Case, cases, make
from benchmarks.sides import agreement, energies, ours, paper, theirs
from benchmarks.tables import console, show_solves
from benchmarks.work import Work, count

REPEATS = 5
BUDGET = 10.0  # seconds after which a side is not run again


def main() -> None:
    """Measure the cases that were asked for."""
    given = _arguments()
    device = torch.device(given.device)
    clock.full_precision()
    ceilings = clock.Ceilings.of(device)
    rows: list[dict[str, Any]] = []
    for case in cases():
        if given.only not in case.name or (case.gpu and device.type == "cpu" and not given.quick):
            continue
        rows += _try(case.shrunk() if given.quick else case, device)
        ceilings = ceilings.at_best(clock.Ceilings.of(device))
        result = {
            "machine": clock.name_of(device),
            "torch": torch.__version__,
            "ceilings": asdict(ceilings),
            "cases": [row | _shares(row, ceilings) for row in rows],
        }
        if given.json:
            text = json.dumps(result, indent=2, ensure_ascii=False)
            given.json.write_text(text + "\n", encoding="utf-8")
    if rows:
        show_solves(result)


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Everything about one case: seconds, work, steps, energies, agreement."""
    problem = make(case, device)
    theirs_by = {
        side: partial(theirs, problem, case, cached=side == "cached")
        for side in ("plain", "cached")
    }
    sides = {"ours": partial(ours, problem, paper(case)), **theirs_by}
    work = {"ours": count(sides["ours"])}  # counting warms every side up
    costs = {side: _work_by_steps(run) for side, run in theirs_by.items()}
    ends = clock.race(sides, device, REPEATS, BUDGET)
    work |= {side: cost(ends[side].result.steps) for side, cost in costs.items()}
    answers = ends["ours"].result, ends["plain"].result
    return {
        "name": case.name,
        "case": asdict(case),
        "seconds": {side: end.seconds for side, end in ends.items()},
        "ratio": {side: ends[side].seconds / ends["ours"].seconds for side in theirs_by},
        "work": {side: vars(done) for side, done in work.items()},
        **energies(*answers, problem, case),
        "off": agreement(*answers, problem, case) if case.rank else {},
    }


def _try(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """The row of a case; none where a factorisation in fp32 breaks down."""
    try:
        row = measure(case, device)
    except torch.linalg.LinAlgError as error:
        console.print(f"{case.name}: a factorisation breaks down: {error}")
        return []
    console.print(f"{row['name']}: {row['ratio']}")
    return [row]


def _work_by_steps(run: Callable[..., object]) -> Callable[[Sequence[int]], Work]:
    """Steps of each chunk → work of the published procedure, from runs of one and two steps."""
    one, two = (count(partial(run, max_steps=steps)) for steps in (1, 2))
    return lambda steps: one + (two - one) * (sum(steps) / len(steps) - 1)


def _shares(row: Mapping[str, Any], ceilings: clock.Ceilings) -> dict[str, Any]:
    """How much of the device's rates each side of a case reaches."""
    shares = {
        side: ceilings.shares(Work(**done), row["seconds"][side])
        for side, done in row["work"].items()
    }
    return {
        "share_of_matmul_rate": {side: share[0] for side, share in shares.items()},
        "share_of_bandwidth": {side: share[1] for side, share in shares.items()},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--quick", action="store_true", help="all cases, small: to try it out")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
