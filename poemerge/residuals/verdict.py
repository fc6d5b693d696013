"""Which density describes residuals best, as a name and as a sentence.

Sampled entries share rows and columns and are not independent, so that a p-value would mean little:
what counts is by how many nats an entry one density beats another.
"""

from collections.abc import Mapping
from dataclasses import fields

from poemerge.residuals.densities import DENSITIES

MARGIN = 0.01  # nats an entry; within it the density of fewer parameters is as good
EXPERTS = ("gaussian", "cauchy", "student_t")  # the densities that experts have
MET = (
    "There is nothing to fit: the residuals are no larger than the rounding of the merged weights "
    "makes them, so every expert is met along its own directions."
)
TOO_FEW = "There is nothing to fit: no matrix has enough residuals that are not zero."


def best_of(likelihoods: Mapping[str, float]) -> str:
    """The density of fewest parameters among those within MARGIN of the likeliest.

    Args:
        likelihoods: name → mean log-likelihood of an entry, in nats.
    """
    top = max(likelihoods.values())
    near = [name for name, value in likelihoods.items() if value >= top - MARGIN]
    return min(near, key=lambda name: (len(fields(DENSITIES[name])), -likelihoods[name]))


def best_expert(likelihoods: Mapping[str, float]) -> str:
    """The same among the densities that experts have."""
    return best_of({name: likelihoods[name] for name in EXPERTS})


def sentence(likelihoods: Mapping[str, float], nu: float, agreeing: int, matrices: int) -> str:
    """Whether Gaussian, Student-t or Cauchy describes the residuals best, and by how much.

    Args:
        likelihoods: as in `best_of`, of all matrices pooled.
        nu: degrees of freedom of the Student-t.
        agreeing: matrices of which, taken alone, the same one is the best.
        matrices: in all.
    """
    best = best_expert(likelihoods)
    lead = {name: likelihoods[best] - value for name, value in likelihoods.items()}
    above = {n: f"{lead[n]:.2f} nats an entry above {DENSITIES[n].title}" for n in lead}
    title, weibull = DENSITIES[best].title, ""
    if lead["weibull"] < -MARGIN:
        weibull = f" Weibull, which no expert has, fits {-lead['weibull']:.2f} nats better still."
    if best == "student_t":
        heavy = "nearer Cauchy than Gaussian" if lead["cauchy"] < lead["gaussian"] else ""
        text = (
            f"{title} with {nu:.1f} degrees of freedom describes these residuals best "
            f"({above['gaussian']}, {lead['cauchy']:.2f} above Cauchy): tails are "
            f"{heavy or 'heavier than Gaussian, yet nearer it than Cauchy'}"
        )
    else:
        other, tails = ("cauchy", "light") if best == "gaussian" else ("gaussian", "heavy")
        text = (
            f"{title} describes these residuals best ({above[other]}; Student-t, with "
            f"{nu:.1f} degrees of freedom, gains {max(0.0, -lead['student_t']):.3f}): tails are "
            f"{tails}"
        )
    return f"{text}; so it is in {agreeing} of {matrices} matrices alone.{weibull}"
