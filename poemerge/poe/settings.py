"""Settings of every product of experts, and the rows of the family that have names of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from poemerge.mappings import file_names, pattern_sizes
from poemerge.poe.experts import PRECISIONS
from poemerge.poe.inference import Stop
from poemerge.settings import Settings, setting

PUBLISHED: Mapping[str, Any] = {
    "precision": "gram",
    "side": "output",
    "ridge": 1e-3,
    "ridge_mode": "absolute",
    "granularity": "square",
}
PUBLISHED_STOP = 1e-5  # ||M_new - M||, absolute
ROWS: Mapping[str, Mapping[str, Any]] = {
    "paper": PUBLISHED,
    "average": {"precision": "identity", "ridge": 0.0, "ridge_mode": "relative"},
    "fisher": {"precision": "diagonal", "ridge": 0.0, "ridge_mode": "relative"},
    "regmean": {"precision": "activation", "ridge": 0.0, "ridge_mode": "relative"},
    "wudi": {"precision": "gram", "side": "input", "balance": "norm"},
}


@dataclass(frozen=True)
class ProductSettings(Settings):
    """Settings of every product of experts."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = ROWS

    precision: str = setting(
        "gram",
        "which disagreement counts: along each expert's own directions (gram), in every entry "
        "alike (identity), by Fisher information (diagonal), along the inputs seen (activation)",
        choices=tuple(PRECISIONS),
    )
    side: str = setting(
        "input",
        "side of the gram: the features that a layer reads (Aᵀ A, which theory favours for linear "
        "layers) or those that it writes (A Aᵀ, as published)",
        choices=("input", "output"),
    )
    ridge: float = setting(
        3e-2, "precision λ of the prior that pulls the update towards 0", low=0.0
    )
    ridge_mode: str = setting(
        "relative",
        "unit of `ridge`: the mean diagonal of the experts' precision, or 1 (which shrinks small "
        "updates hard)",
        choices=("relative", "absolute"),
    )
    balance: str = setting(
        "none",
        "`norm` divides an expert's weight by the squared norm of its update, matrix by matrix, as "
        "WUDI does",
        choices=("none", "norm"),
    )
    granularity: str = setting(
        "matrix",
        "what has experts' weights of its own: a matrix, an attention head (by the config's head "
        "size and the usual names), a block of `block_rows` rows, or a square block of rows of a "
        "tall dense matrix (as the published code does)",
        choices=("matrix", "head", "rows", "square"),
    )
    block_rows: int = setting(128, "rows of a block, for granularity rows", low=1)
    fused: Mapping[str, tuple[int, ...]] = setting(
        {},
        "projections fused in one matrix, solved apart: name pattern (`*qkv_proj.weight`) to the "
        "rows of each",
        check=pattern_sizes,
    )
    curvature: Mapping[str, str] = setting(
        {},
        "an expert's curvature, by its name: a safetensors file that holds, under the base's "
        "tensor names, diagonal Fisher information (precision diagonal) or Xᵀ X (activation)",
        check=file_names,
    )
    preset: str = setting(
        "",
        "a named row of the family: the published procedure (paper), or average, fisher, regmean, "
        "wudi; settings that are given win over it",
        choices=("", *ROWS),
    )

    @property
    def acts_on(self) -> str:
        """Side of the matrix on which the precision acts; output where it is entrywise."""
        if self.precision == "activation":
            return "input"
        return self.side if self.precision == "gram" else "output"

    @property
    def is_structured(self) -> bool:
        """True if matrices are treated as matrices."""
        return PRECISIONS[self.precision].matrices

    @property
    def streams(self) -> bool:
        """True if the experts of a matrix may come one by one."""
        return PRECISIONS[self.precision].streams and self.granularity == "matrix"

    @property
    def keeps_factors(self) -> bool:
        """True if updates in factors give a merged one in factors."""
        acting, free = PRECISIONS[self.precision].reduces
        # Activations act on the inputs; a cut takes the other axis, along which factors are kept.
        is_cut = self.granularity in {"head", "rows"} or bool(self.fused)
        return acting or (free and not is_cut)


@dataclass(frozen=True)
class HeavySettings(ProductSettings):
    """Settings of every product of heavy-tailed experts."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **ROWS,
        "paper": {**PUBLISHED, "scale": "paper", "max_steps": 50},
    }

    scale: str = setting(
        "equivariant",
        "what the squared scale γ² is a multiple of: q(0), which is ‖A Aᵀ‖² for grams (updates "
        "of every size alike); ‖A‖² (the paper's); or q(0) times the residuals' likeliest scale",
        choices=("equivariant", "paper", "estimated"),
    )
    epsilon: float = setting(
        0.1,
        "γ² in units of `scale`; large is Gaussian, small trusts the nearest expert; with scale "
        "estimated, 1 is the maximum-likelihood estimate",
        low=1e-12,
    )
    max_steps: int = setting(100, "reweighting steps at most", low=1)
    rtol: float = setting(
        1e-5,
        "the loop ends when no expert's weight would change by more than this part (or than "
        "rounding)",
        low=0.0,
    )

    @property
    def stop(self) -> Stop:
        """When the loop ends; the published rule under the preset of that name."""
        atol = PUBLISHED_STOP if self.preset == "paper" else 0.0
        return Stop(self.max_steps, self.rtol, atol)
