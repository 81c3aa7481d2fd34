"""Which tokens a training position sees: a pure function of position, whatever the number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distmuon.errors import ConfigError

Ids = npt.NDArray[np.int64]


class SequenceOrder:
    """A seeded permutation of sequence ids, a new one each epoch, read at any position.

    Rank r of w takes ``ids(start + r * n, n)`` of a step of ``w * n`` sequences, so the step sees the same
    sequences for every w. No other random number generator is read or advanced.
    """

    def __init__(self, num_tokens: int, seq_len: int, seed: int) -> None:
        """Set up the order.

        Args:
            num_tokens: tokens in the split.
            seq_len: tokens per sequence.
            seed: at least 0.

        Raises:
            ConfigError: the split holds no whole sequence, or ``seed`` is negative.
        """
        if seed < 0:
            raise ConfigError(f"seed = {seed} of the data order is negative; use at least 0.")
        self.num_sequences = _num_sequences(num_tokens, seq_len)
        self._seed = seed
        self._latest: tuple[int, Ids] | None = None

    def ids(self, start: int, count: int) -> Ids:
        """Sequence ids at consecutive positions; epochs follow each other without a gap.

        Args:
            start: first position, at least 0; position ``num_sequences`` opens the second epoch.
            count: number of positions, at least 0.

        Returns:
            int64 [count].

        Raises:
            ConfigError: ``start`` or ``count`` is negative.
        """
        if start < 0 or count < 0:
            raise ConfigError(f"start = {start} and count = {count} of the data order must be at least 0.")
        parts = [np.empty(0, dtype=np.int64)]
        position, end = start, start + count
        while position < end:
            epoch, offset = divmod(position, self.num_sequences)
            part = self._permutation(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> Ids:
        if self._latest is None or self._latest[0] != epoch:
            # NumPy keeps raw bit streams stable between versions, but not Generator.permutation.
            raw = np.random.PCG64(np.random.SeedSequence([self._seed, epoch])).random_raw(self.num_sequences)
            self._latest = (epoch, np.argsort(raw, kind="stable").astype(np.int64))
        return self._latest[1]


def gather(tokens: npt.NDArray[Any], ids: Ids, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read sequences and their next-token targets.

    Args:
        tokens: token ids of a split, [tokens].
        ids: sequence ids, int64 [B].
        seq_len: tokens per sequence, T; sequence i starts at token i * T.

    Returns:
        Inputs and targets, int64 [B, T]; the targets are the inputs shifted by one token.

    Raises:
        ConfigError: a sequence id does not exist.
    """
    total = _num_sequences(tokens.size, seq_len)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < total:
        raise ConfigError(
            f"sequence ids {int(ids.min())} to {int(ids.max())} do not exist in a split of {total} sequences "
            f"of {seq_len} tokens; use the ids of a SequenceOrder of the same split and length."
        )
    positions = ids[:, None] * seq_len + np.arange(seq_len + 1, dtype=np.int64)
    window = torch.from_numpy(np.asarray(tokens[positions], dtype=np.int64))
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def validation_ids(num_tokens: int, seq_len: int, count: int) -> Ids:
    """Evenly spaced sequence ids of the validation split, the same for every run.

    Args:
        num_tokens: tokens in the split.
        seq_len: tokens per sequence.
        count: number of sequences, at least 1.

    Returns:
        Increasing distinct ids, int64 [count].

    Raises:
        ConfigError: the split holds fewer than ``count`` sequences.
    """
    total = _num_sequences(num_tokens, seq_len)
    if not 1 <= count <= total:
        raise ConfigError(
            f"{count} validation sequences of {seq_len} tokens are asked for, but the split of "
            f"{num_tokens} tokens holds {total}; ask for 1 to {total}, or hold out more text."
        )
    return np.arange(count, dtype=np.int64) * total // count


def _num_sequences(num_tokens: int, seq_len: int) -> int:
    if seq_len < 1:
        raise ConfigError(f"seq_len = {seq_len} is not legal; use a whole number of at least 1.")
    if num_tokens < seq_len + 1:
        raise ConfigError(
            f"the split has {num_tokens} tokens, but a sequence of seq_len = {seq_len} needs {seq_len + 1}; "
            "use a shorter seq_len or more text."
        )
    return (num_tokens - 1) // seq_len
