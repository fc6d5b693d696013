"""Our solver and the published procedure on one problem, and how their answers compare."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.fixed_point import distance, fixed_point
from benchmarks.problems import Case, Problem
from poemerge.method import Call, Merged
from poemerge.methods import find

CAUCHY = find("cauchy_poe")
NOISE = 1e-6  # by which fp32 may miss an energy, relative
PAPER = {
    "side": "output",
    "scale": "paper",
    "ridge": published.RIDGE,
    "ridge_mode": "absolute",
}


def paper(case: Case) -> dict[str, Any]:
    """Settings of ours for the problem that the published procedure solves; our stopping rule."""
    granularity = "square" if case.chunks else "matrix"
    return {**PAPER, "epsilon": case.epsilon, "granularity": granularity}


def ours(problem: Problem, settings: Mapping[str, Any]) -> Merged:
    """Our solver, one say for each expert."""
    device = problem.updates.device
    say = torch.ones(1, len(problem.updates), dtype=torch.float64, device=device)
    return CAUCHY.merge(problem.stack, CAUCHY.settings.parse(settings), Call(say))


def theirs(problem: Problem, case: Case, **options: Any) -> published.Outcome:
    """The published procedure."""
    solver = published.published_in_chunks if case.chunks else published.published
    return solver(problem.updates, case.epsilon, **options)


def energies(
    found: Merged, reached: published.Outcome, problem: Problem, case: Case
) -> dict[str, Any]:
    """Steps and energies of both; ours may be above only by what fp32 cannot tell."""
    certificate = found.certificates[0]
    by = {
        "ours": _energy(found.update.dense()[0], problem.updates, case),
        "published": _energy(reached.merged, problem.updates, case),
        "certificate": certificate["energies"][-1],
    }
    excess = (by["ours"] - by["published"]) / max(1.0, abs(by["published"]))
    return {
        "steps": {"ours": certificate["steps"], "published": max(reached.steps)},
        "settled": {"ours": certificate["converged"], "published": reached.settled},
        "energy": by,
        "excess": excess,
        "same_energy": excess <= NOISE,
    }


def _energy(merged: Tensor, updates: Tensor, case: Case) -> float:
    if not case.chunks:
        return published.energy(merged, updates, case.epsilon)
    pieces = zip(published.square_chunks(merged), published.square_chunks(updates), strict=True)
    return sum(published.energy(m, u, case.epsilon) for m, u in pieces)


def agreement(
    found: Merged, reached: published.Outcome, problem: Problem, case: Case
) -> dict[str, float]:
    """Relative distances to the dense fp64 fixed point, at our defaults and on the paper's."""
    usual = fixed_point(problem.updates, CAUCHY.settings.parse({}))
    exact = fixed_point(problem.updates, CAUCHY.settings.parse(paper(case)))
    return {
        "ours, defaults": distance(ours(problem, {}).update.dense()[0], usual),
        "ours": distance(found.update.dense()[0], exact),
        "published": distance(reached.merged, exact),
    }
