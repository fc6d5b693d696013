"""Which density describes residuals best, as a name and as a sentence.

Sampled entries share rows and columns and are not independent, so that a p-value would mean little:
what counts is by how many nats an entry one density beats another.
"""

from collections.abc import Mapping

from poemerge.residuals.densities import DENSITIES

MARGIN = 0.01  # nats an entry by which a density must beat the simpler ones
BODY = 4.0  # ν above which Gaussian beats Cauchy, unless outliers beyond any Student-t ruin it
EXPERTS = ("gaussian", "cauchy", "student_t")  # the densities that experts have
MET = (
    "There is nothing to fit: the residuals are no larger than the rounding of the merged weights "
    "makes them, so that every expert is met along its own directions; store the merge in float32 "
    "to see smaller ones."
)
TOO_FEW = "There is nothing to fit: no matrix has enough residuals that are not 0."


def best_of(likelihoods: Mapping[str, float]) -> str:
    """The first of Gaussian, Cauchy, Student-t and Weibull within MARGIN of the likeliest.

    Args:
        likelihoods: name → mean log-likelihood of an entry, in nats.
    """
    least = max(likelihoods.values()) - MARGIN
    return next(name for name in DENSITIES if likelihoods.get(name, -float("inf")) >= least)


def best_expert(likelihoods: Mapping[str, float]) -> str:
    """The same among the densities that experts have."""
    return best_of({name: likelihoods[name] for name in EXPERTS})


def sentence(
    likelihoods: Mapping[str, float], nu: float, agreeing: int, fitted: int, left_out: int
) -> str:
    """Whether Gaussian, Student-t or Cauchy describes the residuals best, and by how much.

    Args:
        likelihoods: as in `best_of`, of all matrices pooled.
        nu: degrees of freedom of the Student-t.
        agreeing: matrices of which, taken alone, the same one is the best.
        fitted: matrices that were fitted.
        left_out: matrices that were not.
    """
    best = best_expert(likelihoods)
    lead = {name: likelihoods[best] - value for name, value in likelihoods.items()}
    subject = DENSITIES[best].title
    if best == "student_t":
        subject += f" with {nu:.1f} degrees of freedom"
    text = (
        f"{subject} describes these residuals best ({_leads(best, lead, nu)}): {_tails(lead, nu)}"
    )
    text += f"; so it is in {agreeing} of {fitted} matrices alone"
    text += f" ({left_out} more are left out)" if left_out else ""
    if lead["weibull"] < -MARGIN:
        text += f"; Weibull, which no expert has, fits {-lead['weibull']:.2f} nats better still"
    return text + "."


def _leads(best: str, lead: Mapping[str, float], nu: float) -> str:
    """By how much the best beats the others."""
    if best == "student_t":
        gaussian, cauchy = lead["gaussian"], lead["cauchy"]
        return f"{gaussian:.2f} nats an entry above Gaussian, {cauchy:.2f} above Cauchy"
    other = "cauchy" if best == "gaussian" else "gaussian"
    gain = max(0.0, -lead["student_t"])
    return (
        f"{lead[other]:.2f} nats an entry above {DENSITIES[other].title}; Student-t, with "
        f"{nu:.1f} degrees of freedom, gains only {gain:.3f}"
    )


def _tails(lead: Mapping[str, float], nu: float) -> str:
    """What that says of the tails."""
    if lead["gaussian"] == 0:
        return "the tails are light"
    if lead["cauchy"] == 0:
        return "the tails are as heavy as Cauchy's"
    if lead["cauchy"] < lead["gaussian"] and nu > BODY:
        return "most residuals are near Gaussian, and a few are far larger"
    if lead["cauchy"] < lead["gaussian"]:
        return "the tails are heavy, nearer Cauchy than Gaussian"
    return "the tails are heavier than Gaussian, yet nearer it than Cauchy"
