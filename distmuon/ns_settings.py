"""How matrices are orthogonalized: the settings, and the rules that a combination of them must keep."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distmuon.coefficients import GENERATED, GRAM_MARGIN, Preset, PresetName, Quintic, Start, gram_margin, preset
from distmuon.errors import ConfigError
from distmuon.strict import DTypeName, Strict

# In 16 bits, three steps on XX^T alone overshoot on sparse matrices, in bfloat16 without bound.
LONGEST_SEGMENT = {"bfloat16": 2, "float16": 2, "float32": 3}
# Coefficients of wide margin whose steep first steps still let a singular value grow to 2.7 on a sparse matrix.
UNSAFE = (preset("you").quintics,)


class NewtonSchulz(Strict):
    """How matrices are orthogonalized."""

    preset: PresetName = "papers"
    """Coefficients: "papers" is (3.4445, -4.7750, 2.0315) at every step; "opt4", "opt5" and "opt6" are the most exact
    for their number of steps; docs/newton-schulz.md compares all."""
    steps: int | None = Field(default=None, ge=1, le=20)
    """Number of Newton-Schulz iterations, 1 to 20; None takes the preset's own."""
    dtype: DTypeName = "bfloat16"
    """Precision of the iteration and of the pieces sent between ranks; "float32" on CUDA obeys torch's TF32 switch."""
    form: Literal["auto", "plain", "gram"] = "auto"
    """"gram" iterates on XX^T, cheaper for wide matrices but less exact with generated presets ("opt4" and the like);
    "auto" takes the cheaper form where that makes no difference, "plain" elsewhere."""
    restarts: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """"gram" only: numbers of steps after which X is multiplied out; None: segments of two, first one if odd."""
    lower: float | None = Field(default=None, gt=0, lt=1)
    """"optimal" only: smallest singular value, relative to the largest, that is to reach 1; None is 0.0025."""
    coefficients: Annotated[tuple[Annotated[Quintic, Field(strict=False)], ...], Field(strict=False)] | None = None
    """"custom" only: (a, b, c) of every step."""
    start: Start | None = None
    """"custom" only: norm that matrices are divided by first, "frobenius" (None) or "schatten8"."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Matrix products: "auto" takes those of DISTMUON_KERNELS, or else Triton's on CUDA and the fastest on a CPU;
    "torch" takes plain ones anywhere, "triton" raises where it cannot run."""

    @model_validator(mode="after")
    def _obey_the_rules(self) -> NewtonSchulz:
        steps = len(self.polynomials("plain").quintics)
        if self.form == "gram":
            _check_gram(self, steps)
        elif self.restarts is not None:
            raise ValueError(f'restarts = {self.restarts} needs form = "gram", not "{self.form}"')
        return self

    def polynomials(self, form: Literal["plain", "gram"]) -> Preset:
        """Coefficients for a form; generated ones get the margin that the form needs.

        Args:
            form: "plain" or "gram".

        Returns:
            The preset.

        Raises:
            ConfigError: no such preset.
        """
        margin = GRAM_MARGIN if form == "gram" and self.preset in GENERATED else None
        return preset(self.preset, self.steps, self.lower, margin, self.coefficients, self.start)

    def gram_segments(self) -> tuple[int, ...] | None:
        """Steps between the restarts of the Gram form.

        Returns:
            The lengths; None where the Gram form is not safe.
        """
        try:
            chosen = self.polynomials("gram")
        except ConfigError:
            # With the wider margin these steps do not reach that far down.
            return None
        steps = len(chosen.quintics)
        if _unsafe(self.preset, chosen.quintics) is not None:
            return None
        if self.restarts is None:
            return (1,) * (steps % 2) + (2,) * (steps // 2)
        return tuple(end - begin for begin, end in pairwise((0, *self.restarts, steps)))


def _unsafe(name: str, quintics: tuple[Quintic, ...]) -> str | None:
    """Why the Gram form is not safe with coefficients, whatever the precision; None if it is."""
    if quintics in UNSAFE:
        return 'form = "gram" diverges with preset "you" on sparse matrices; use form = "plain"'
    margin = gram_margin(quintics)
    if margin < GRAM_MARGIN:
        return (
            f'form = "gram" needs coefficients that tolerate {GRAM_MARGIN:.0%} of overshoot, preset "{name}" '
            f'tolerates {margin:.1%}; use form = "plain" or another preset'
        )
    if len(quintics) < 3:
        return f'form = "gram" needs at least 3 steps, not {len(quintics)}, to have a restart; use form = "plain"'
    return None


def _check_gram(ns: NewtonSchulz, steps: int) -> None:
    """Raise a ValueError unless the Gram form of these settings stays stable in their precision."""
    unsafe = _unsafe(ns.preset, ns.polynomials("gram").quintics)
    if unsafe is not None:
        raise ValueError(unsafe)
    if ns.restarts is None:
        return
    if not ns.restarts or any(end <= begin for begin, end in pairwise((0, *ns.restarts, steps))):
        raise ValueError(
            f"restarts = {ns.restarts} must be one or more increasing numbers of steps from 1 to {steps - 1}; "
            f"without a restart the Gram form diverges in every precision"
        )
    longest, limit = max(ns.gram_segments() or ()), LONGEST_SEGMENT[ns.dtype]
    if longest > limit:
        raise ValueError(
            f"restarts = {ns.restarts} leaves {longest} steps without a restart; {ns.dtype} allows {limit}"
        )
