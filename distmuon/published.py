"""Newton-Schulz coefficient lists as they were published: plain data with sources.

A quintic (a, b, c) takes every singular value x to a x + b x^3 + c x^5; a list has one quintic per step.
"""

from __future__ import annotations

from dataclasses import dataclass

from distmuon.remez import MAX_STEPS, Quintic, divide_input

# Tuned for slope at zero: singular values end in about [0.68, 1.13], not at 1.
PAPERS: Quintic = (3.4445, -4.7750, 2.0315)
# Pulls them to 1 afterwards.
SETTLE: Quintic = (2.0, -1.5, 0.5)

# Division of the input that arXiv 2505.16932, algorithm 1, uses against rounding. Lists made for [0, 1] exactly need it
# too: CANS leaves the range of legal outputs at an input of 1.000004 and cubic5 at 1.0035.
SAFETY = 1.01

YOU: tuple[Quintic, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
CANS: tuple[Quintic, ...] = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
CUBIC5: tuple[Quintic, ...] = (
    (3.3656576, -3.3420992, 0.0),
    (2.5744352, -1.4957376, 0.0),
    (2.5368962, -1.4312570, 0.0),
    (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
)


@dataclass(frozen=True)
class Published:
    """A published list and the numbers of steps it may be run with."""

    quintics: tuple[Quintic, ...]
    """(a, b, c) of the longest run, safety factors on the input folded in; a shorter one takes the first ones."""
    least: int
    """Least number of steps."""
    default: int
    """Usual number of steps."""
    source: str
    """Authors, title, year or arXiv number."""


def safe_input(quintics: tuple[Quintic, ...]) -> tuple[Quintic, ...]:
    """Fold a division of the input by ``SAFETY`` into a list.

    Args:
        quintics: (a, b, c) per step.

    Returns:
        The list with another first quintic.
    """
    return (divide_input(quintics[0], SAFETY), *quintics[1:])


# The paper divides the input of every quintic but the last, and that of the first twice.
_POLAR_EXPRESS_SAFE = safe_input((*(divide_input(q, SAFETY) for q in POLAR_EXPRESS[:-1]), POLAR_EXPRESS[-1]))

PUBLISHED = {
    "papers": Published((PAPERS,) * MAX_STEPS, 1, 5, "K. Jordan et al., Muon, 2024; arXiv 2502.16982"),
    "you": Published(YOU, 5, 5, "J. You, 2025, in F. Cesista et al., Squeezing 1-2% efficiency gains out of Muon"),
    "polar_express": Published(_POLAR_EXPRESS_SAFE, 1, 5, "N. Amsel et al., The Polar Express, arXiv 2505.16932"),
    "cans": Published(safe_input(CANS), 5, 5, "E. Grishina et al., CANS, arXiv 2506.10935; NVIDIA Emerging-Optimizers"),
    "cubic5": Published(safe_input(CUBIC5), 5, 5, "H. Huang, How much orthogonalization..., arXiv 2606.00371"),
    "papers8+2": Published((PAPERS,) * 8 + (SETTLE,) * 2, 10, 10, "DeepSeek-AI, DeepSeek-V4, 2026"),
}
