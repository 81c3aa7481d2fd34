"""Which parameters are several matrices on top of each other: fused projections, gate and up, heads."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from distmuon.errors import ConfigError, ParameterError

Split = int | Sequence[int]
"""Number of equal blocks of rows, or the rows of each block."""


def find_split(name: str, splits: Mapping[str, Split] | None) -> Split | None:
    """Look up how a parameter is split.

    Args:
        name: of the parameter.
        splits: shell-style patterns of names; of several that match, the last counts.

    Returns:
        The split, None for one matrix.
    """
    matching = [split for pattern, split in (splits or {}).items() if fnmatch.fnmatch(name, pattern)]
    return matching[-1] if matching else None


def check_patterns(splits: Mapping[str, Split] | None, names: Iterable[str]) -> None:
    """Make sure that every pattern is about a matrix.

    Args:
        splits: shell-style patterns of names.
        names: all parameters that Muon updates.

    Raises:
        ConfigError: a pattern matches none of them.
    """
    known = list(names)
    for pattern in splits or {}:
        if not fnmatch.filter(known, pattern):
            example = f'; their names look like "{known[0]}"' if known else ""
            raise ConfigError(f'splits["{pattern}"] matches no parameter that Muon updates{example}.')


def row_blocks(name: str, shape: Sequence[int], split: Split | None) -> tuple[int, ...]:
    """Rows of each matrix within the [A, B] of a parameter.

    Args:
        name: of the parameter, for messages.
        shape: [A, B] or [E, A, B].
        split: how it is split.

    Returns:
        The rows of each block; () for one matrix.

    Raises:
        ParameterError: the blocks are not the parameter's rows.
    """
    if split is None:
        return ()
    if len(shape) < 2:
        raise ParameterError(f'parameter "{name}" of shape {tuple(shape)} cannot be split: it is no matrix.')
    rows = shape[-2]
    if isinstance(split, int):
        wanted, blocks = f"{split} blocks", (rows // max(split, 1),) * min(split, rows)
    else:
        listed = isinstance(split, Sequence) and not isinstance(split, str)
        wanted, blocks = (f"{list(split)} rows", tuple(split)) if listed else (repr(split), ())
    if not all(isinstance(size, int) and size > 0 for size in blocks) or sum(blocks) != rows:
        raise ParameterError(
            f'parameter "{name}" of shape {tuple(shape)} cannot be split into {wanted}; give a number that divides its '
            f"{rows} rows, or the rows of each block, which add up to {rows}."
        )
    return blocks if len(blocks) > 1 else ()
