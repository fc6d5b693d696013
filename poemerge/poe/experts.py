"""An expert's energy: how far the merged update M may be from it, and how much that costs.

Two independent choices (docs/family.md; Bui et al., arXiv 2607.01689):

    precision   which disagreement counts: q_i(M) = <M - A_i, P_i (M - A_i)>
    tail        what it costs:             E_i(M) = φ(q_i(M)), and its weight α_i = 2 φ'(q_i)

A tail stands in the file of its method (methods/cauchy_poe.py, say), a precision in the table
below. Everything is batched: B matrices of one shape, E experts. Scalars are in fp64, since the
terms of q_i cancel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from poemerge.poe.entrywise import Entrywise
from poemerge.poe.onesided import OneSided
from poemerge.poe.root import Root
from poemerge.poe.streamed import StreamedGrams
from poemerge.task_vector import StreamedStack


class Tail(Protocol):
    """The cost φ of a squared residual; concave in q, so reweighting never raises the energy."""

    is_robust: ClassVar[bool]  # False if the weights are the same whatever q

    def energy(self, residuals: Tensor) -> Tensor:
        """E_i for q_i; both (B, E)."""

    def weights(self, residuals: Tensor) -> Tensor:
        """α_i = 2 φ'(q_i); both (B, E)."""


class Form(Protocol):
    """The quadratic forms q_i of E experts for B matrices, and the systems that they make."""

    @property
    def norms(self) -> Tensor:
        """||A_i||² (B, E), fp64."""

    @property
    def origins(self) -> Tensor:
        """q_i(0) (B, E), fp64."""

    @property
    def speaks(self) -> Tensor:
        """True (B, E) where an expert has a say: its P_i is not zero."""

    def residuals(self, merged: Tensor) -> tuple[Tensor, Tensor]:
        """q_i(M) and the size of its terms, (B, E) each, for M (B, O, I)."""

    def mode(self, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """The M (B, O, I) with Σ α_i P_i (M - A_i) + λ M = 0; True (B,) where there is none."""

    def certify(self, merged: Tensor, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """||H M - b|| / ||b|| and the condition of H, (B,) each."""

    def pulls(self, merged: Tensor) -> Tensor:
        """P_i (M - A_i) (B, E, O, I): half the gradient of q_i."""

    def root(self, weights: Tensor, ridge: Tensor) -> Root:
        """L with L Lᵀ = H = Σ α_i P_i + λ I."""

    def mean_diagonal(self, weights: Tensor) -> Tensor:
        """Mean diagonal entry of Σ w_i P_i (B,): the unit of a relative ridge."""


@dataclass(frozen=True)
class Precision:
    """A row of the table: which disagreement counts.

    Attributes:
        meaning: one line for people.
        matrices: True if it acts on one side of a matrix; vectors are then averaged.
        reduces: axes that may be exchanged for a joint orthonormal basis without changing any q_i:
            that on which P_i acts, and the free one.
        curvature: what the experts' files must hold for each tensor; empty if none is needed.
        form: (updates (B, E, O, I), or a stream of them; curvature or None; O; pieces) → Form;
            P_i acts on the axis O.
        streams: True if experts may come one by one.
    """

    meaning: str
    matrices: bool
    reduces: tuple[bool, bool]
    curvature: str
    form: Callable[..., Form]
    streams: bool = False


def _grams(deltas: Tensor | StreamedStack, _: None, dimension: int, pieces: int = 1) -> Form:
    """Held, or formed anew for every pass where there are too many."""
    if isinstance(deltas, StreamedStack):
        return StreamedGrams.of(deltas, dimension)
    return OneSided.of_grams(deltas, None, dimension, pieces)


PRECISIONS: Mapping[str, Precision] = {
    "gram": Precision(
        "along each expert's own directions: A Aᵀ, or Aᵀ A on the input side",
        matrices=True,
        reduces=(True, True),
        curvature="",
        form=_grams,
        streams=True,
    ),
    "identity": Precision(
        "every entry alike",
        matrices=False,
        reduces=(True, True),
        curvature="",
        form=Entrywise.of,
    ),
    "diagonal": Precision(
        "every entry by its Fisher information",
        matrices=False,
        reduces=(False, False),
        curvature="the diagonal Fisher information, in the tensor's shape",
        form=Entrywise.of,
    ),
    "activation": Precision(
        "along the inputs that the expert's layer has seen: Xᵀ X",
        matrices=True,
        reduces=(False, True),
        curvature="Xᵀ X of the layer's inputs, (I, I)",
        form=OneSided.of_activations,
    ),
}
