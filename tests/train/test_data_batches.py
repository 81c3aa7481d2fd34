"""The data order: a permutation, resumable anywhere, the same for every world size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distmuon.errors import ConfigError
from distmuon.train.data import SequenceOrder, gather, validation_ids

NUM_TOKENS, SEQ_LEN = 1001, 10  # 100 sequences and the last target


def test_every_epoch_is_a_new_permutation() -> None:
    order = SequenceOrder(NUM_TOKENS, SEQ_LEN, seed=3)
    epochs = order.ids(0, 300).reshape(3, 100)
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], np.arange(100))


def test_order_is_pinned() -> None:
    assert SequenceOrder(NUM_TOKENS, SEQ_LEN, seed=3).ids(98, 4).tolist() == [71, 21, 34, 14]


def test_order_depends_on_the_seed_and_on_no_other_generator() -> None:
    first = SequenceOrder(NUM_TOKENS, SEQ_LEN, seed=3).ids(0, 50)
    state = torch.get_rng_state()
    np.random.seed(11)  # noqa: NPY002
    torch.manual_seed(11)
    assert np.array_equal(SequenceOrder(NUM_TOKENS, SEQ_LEN, seed=3).ids(0, 50), first)
    torch.set_rng_state(state)
    SequenceOrder(NUM_TOKENS, SEQ_LEN, seed=3).ids(0, 50)
    assert torch.equal(torch.get_rng_state(), state)
    assert not np.array_equal(SequenceOrder(NUM_TOKENS, SEQ_LEN, seed=4).ids(0, 50), first)


def test_resumes_at_any_position() -> None:
    whole = SequenceOrder(NUM_TOKENS, SEQ_LEN, seed=0).ids(0, 350)
    used = SequenceOrder(NUM_TOKENS, SEQ_LEN, seed=0)
    for start, count in ((0, 0), (0, 1), (99, 2), (100, 100), (250, 100), (7, 300), (1, 3)):
        assert np.array_equal(used.ids(start, count), whole[start : start + count])
        assert np.array_equal(SequenceOrder(NUM_TOKENS, SEQ_LEN, 0).ids(start, count), whole[start : start + count])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_sees_the_same_sequences_for_every_world_size(world: int) -> None:
    step_size, expected = 8, SequenceOrder(NUM_TOKENS, SEQ_LEN, seed=0).ids(0, 160)
    ranks = [SequenceOrder(NUM_TOKENS, SEQ_LEN, seed=0) for _ in range(world)]
    share = step_size // world
    seen = [ranks[r].ids(step * step_size + r * share, share) for step in range(20) for r in range(world)]
    assert np.array_equal(np.concatenate(seen), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_targets_are_inputs_shifted_by_one(dtype: type[np.unsignedinteger]) -> None:
    tokens = (np.arange(NUM_TOKENS) * 7 % 5003).astype(dtype)
    ids = np.array([0, 99, 42], dtype=np.int64)
    x, y = gather(tokens, ids, SEQ_LEN)
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (3, SEQ_LEN)
    assert x.is_contiguous()
    assert y.is_contiguous()
    for row, i in enumerate(ids):
        assert x[row].tolist() == tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN].tolist()
        assert y[row].tolist() == tokens[i * SEQ_LEN + 1 : (i + 1) * SEQ_LEN + 1].tolist()


def test_the_last_token_is_only_a_target() -> None:
    assert SequenceOrder(1000, SEQ_LEN, seed=0).num_sequences == 99
    assert SequenceOrder(1001, SEQ_LEN, seed=0).num_sequences == 100


def test_validation_ids_are_even_and_fixed() -> None:
    assert validation_ids(NUM_TOKENS, SEQ_LEN, 4).tolist() == [0, 25, 50, 75]
    assert validation_ids(NUM_TOKENS, SEQ_LEN, 7).tolist() == [0, 14, 28, 42, 57, 71, 85]
    assert validation_ids(NUM_TOKENS, SEQ_LEN, 100).tolist() == list(range(100))


def test_refused() -> None:
    for build in (
        lambda: SequenceOrder(100, 100, 0),
        lambda: validation_ids(100, 100, 1),
        lambda: gather(np.zeros(100, dtype=np.uint16), np.array([0]), 100),
    ):
        with pytest.raises(ConfigError, match="100 tokens, but a sequence of seq_len = 100 needs 101; use a short"):
            build()
    with pytest.raises(ConfigError, match="101 validation sequences of 10 tokens .* 1001 tokens holds 100; ask for"):
        validation_ids(NUM_TOKENS, SEQ_LEN, 101)
    with pytest.raises(ConfigError, match="0 validation sequences"):
        validation_ids(NUM_TOKENS, SEQ_LEN, 0)
    with pytest.raises(ConfigError, match="seq_len = 0"):
        SequenceOrder(NUM_TOKENS, 0, 0)
    with pytest.raises(ConfigError, match="seed = -1"):
        SequenceOrder(NUM_TOKENS, SEQ_LEN, -1)
    with pytest.raises(ConfigError, match="start = -1"):
        SequenceOrder(NUM_TOKENS, SEQ_LEN, 0).ids(-1, 1)
    for bad in (-1, 100):
        with pytest.raises(ConfigError, match=f"{bad} to {bad} do not exist in a split of 100 sequences"):
            gather(np.zeros(NUM_TOKENS, dtype=np.uint16), np.array([bad]), SEQ_LEN)
