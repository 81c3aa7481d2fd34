"""The held-out score: the same on any number of ranks and with any micro-batch."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distmuon.errors import ConfigError
from distmuon.train.data import TokenData
from distmuon.train.evaluate import Score, bits_per_byte, evaluate
from tests.ranks import run_threads

VOCABULARY, CONTEXT = 11, 6


class Bigram(nn.Module):
    """Has the two methods of the language model that an evaluation needs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.calls: list[tuple[tuple[int, ...], bool, bool]] = []

    def logits(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append((tuple(tokens_BT.shape), self.training, torch.is_grad_enabled()))
        return self.table[tokens_BT], torch.tensor(0.0), torch.zeros(1, 1)


def data(numel: int = 200) -> Any:
    tokens = np.random.Generator(np.random.PCG64(5)).integers(0, VOCABULARY, numel).astype(np.uint16)
    return SimpleNamespace(val=tokens)


def score(rank: int, world: int, sequences: int, micro: int) -> tuple[Score, list[Any], bool]:
    model = Bigram().train()
    found = evaluate(model, data(), CONTEXT, sequences, micro)
    return found, model.calls, model.training


def by_hand(sequences: int) -> Score:
    """One token after the other, in float64."""
    tokens, logs = data().val.tolist(), Bigram().table.detach().double().log_softmax(-1)
    total = (len(tokens) - 1) // CONTEXT
    pairs = []
    for number in range(sequences):
        start = number * total // sequences * CONTEXT
        pairs += [(tokens[start + i], tokens[start + i + 1]) for i in range(CONTEXT)]
    correct = [int(logs[now].argmax()) == following for now, following in pairs]
    loss = -sum(float(logs[now, following]) for now, following in pairs) / len(pairs)
    return Score(loss, sum(correct) / len(correct))


@pytest.mark.parametrize("sequences", [1, 7, 8, 33])
@pytest.mark.parametrize("micro", [1, 3, 8, 50])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_same_score_everywhere(world: int, micro: int, sequences: int) -> None:
    expected = by_hand(sequences)
    results = run_threads(world, score, sequences, micro)
    for found, _, _ in results:
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.accuracy == pytest.approx(expected.accuracy, rel=1e-12)
    assert len({found for found, _, _ in results}) == 1


@pytest.mark.parametrize(("sequences", "micro"), [(1, 1), (5, 2), (8, 4), (9, 4)])
def test_every_rank_runs_as_many_forward_passes(sequences: int, micro: int) -> None:
    """Experts may live on other ranks: a rank that is out of sequences must not stay away."""
    results = run_threads(2, score, sequences, micro)
    first, second = (len(calls) for _, calls, _ in results)
    assert first == second == math.ceil(sequences / (2 * micro))
    shapes = [shape for _, calls, _ in results for shape, _, _ in calls]
    assert all(1 <= shape[0] <= micro and shape[1] == CONTEXT for shape in shapes)


def test_model_is_evaluated_without_gradients_and_put_back() -> None:
    ((_, calls, training),) = run_threads(1, score, 8, 4)
    assert calls
    assert not any(was_training or grad for _, was_training, grad in calls)
    assert training


def stays_in_evaluation(rank: int, world: int) -> bool:
    model = Bigram().eval()
    evaluate(model, data(), CONTEXT, 4, 4)
    return model.training


def test_a_model_in_evaluation_mode_stays_there() -> None:
    assert run_threads(1, stays_in_evaluation) == [False]


def too_many(rank: int, world: int) -> str:
    with pytest.raises(ConfigError) as caught:
        evaluate(Bigram(), data(), CONTEXT, 34, 4)
    return str(caught.value)


def test_more_sequences_than_there_are() -> None:
    (text,) = run_threads(1, too_many)
    assert "34 validation sequences" in text


@pytest.mark.parametrize(("bytes_per_token", "expected"), [(4.0, 0.5), (None, None)])
def test_bits_per_byte(bytes_per_token: float | None, expected: float | None) -> None:
    """2 bits a token, 4 bytes a token."""
    meta = {"val": {"bytes_per_token": bytes_per_token}}
    tokens = TokenData(Path(), meta, None, None)  # type: ignore[arg-type]
    assert bits_per_byte(2 * math.log(2), tokens) == (None if expected is None else pytest.approx(expected))
