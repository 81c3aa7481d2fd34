"""Scale of the orthogonalized update."""

from __future__ import annotations

import math

# Moonlight (arXiv 2502.16982) section 2.2: matches the update RMS of AdamW, 0.2 to 0.4 in practice.
TARGET_RMS = 0.2


def rms_matched_scale(rows: int, cols: int) -> float:
    """Scale that gives an orthogonal A x B update an RMS of 0.2, as AdamW's updates have.

    Args:
        rows: A, number of outputs.
        cols: B, number of inputs.

    Returns:
        0.2 * sqrt(max(A, B)). By Lemma 1 a full-rank UV^T has RMS sqrt(1 / max(A, B)).

    Source: Moonlight (arXiv 2502.16982), equation 4 and Lemma 1.
    """
    return TARGET_RMS * math.sqrt(max(rows, cols))
