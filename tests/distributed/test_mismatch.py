"""Ranks that disagree get one error, the same on every rank, naming the first difference."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import distmuon
from distmuon.errors import RankMismatchError
from tests.distributed.scenario import Case, backward, digest, gradients, optimizer, parameters
from tests.ranks import RankPool, run_threads

Groups = list[dict[str, Any]]
Figure = Callable[[str], None]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.zeros(shape, dtype=dtype))


def agreed() -> tuple[Groups, dict[str, Any]]:
    """Groups and settings every rank starts from."""
    matrices = [("first", zeros(6, 4)), ("second", zeros(6, 4)), ("third", zeros(4, 4))]
    muon: dict[str, Any] = {"params": matrices, "kind": "muon"}
    adamw: dict[str, Any] = {"params": [("bias", zeros(6)), ("embed", zeros(6, 4))], "kind": "adamw"}
    return [muon, adamw], {}


def _swap(groups: Groups, settings: dict[str, Any]) -> None:
    pair = groups[0]["params"]
    pair[0], pair[1] = pair[1], pair[0]


def _shape(groups: Groups, settings: dict[str, Any]) -> None:
    groups[0]["params"][1] = ("second", zeros(4, 6))


def _dtype(groups: Groups, settings: dict[str, Any]) -> None:
    groups[0]["params"][1] = ("second", zeros(6, 4, dtype=torch.bfloat16))


def _kind(groups: Groups, settings: dict[str, Any]) -> None:
    groups[1]["params"].insert(0, groups[0]["params"].pop())


def _count(groups: Groups, settings: dict[str, Any]) -> None:
    groups[0]["params"].append(("fourth", zeros(4, 4)))


def _name(groups: Groups, settings: dict[str, Any]) -> None:
    groups[0]["params"][1] = ("other", groups[0]["params"][1][1])


def _frozen(groups: Groups, settings: dict[str, Any]) -> None:
    groups[0]["params"][1][1].requires_grad_(False)


def _empty(groups: Groups, settings: dict[str, Any]) -> None:
    del groups[1]


Change = Callable[[Groups, dict[str, Any]], None]
STRUCTURE: dict[str, tuple[Change, str]] = {
    "order": (_swap, "second"),
    "shape": (_shape, "second"),
    "dtype": (_dtype, "second"),
    "kind": (_kind, "third"),
    "count": (_count, "fourth"),
    "name": (_name, "other"),
    "frozen": (_frozen, "second"),
    "group": (_empty, ""),
}
SETTINGS: dict[str, Any] = {
    "lr": 0.5,
    "weight_decay": 0.5,
    "momentum": 0.5,
    "nesterov": False,
    "adamw_lr": 0.5,
    "adamw_betas": (0.5, 0.95),
    "adamw_eps": 0.5,
    "adamw_weight_decay": 0.5,
    "policy": "flat",
    "reduce_dtype": torch.bfloat16,
    "bucket_mb": 1.0,
    "max_grad_norm": 0.5,
    "ns": distmuon.NewtonSchulz(steps=4),
    "coefficients": distmuon.NewtonSchulz(preset="cubic5"),
}
SHOWN_AS = {
    "coefficients": "cubic5",
    "adamw_betas": "betas",
    "adamw_eps": "eps",
    "adamw_lr": "lr",
    "adamw_weight_decay": "weight_decay",
}


def construct(rank: int, world: int, what: str, odd: int, group: Any = None) -> tuple[str, str, float]:
    """Type and text of what construction raises when one rank differs in one thing, and how long it took."""
    groups, settings = agreed()
    if rank == odd:
        if what in STRUCTURE:
            STRUCTURE[what][0](groups, settings)
        else:
            settings["ns" if what == "coefficients" else what] = SETTINGS[what]
    start = time.monotonic()
    try:
        distmuon.DistMuon(groups, process_group=group, **settings)
    except ValueError as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "nothing", "", time.monotonic() - start


def construct_in_process(rank: int, world: int, group: Any, what: str, odd: int) -> tuple[str, str, float]:
    # What is timed is the disagreement, not what the first optimizer of a process imports.
    assert construct(rank, world, "order", -1, group)[0] == "nothing"
    return construct(rank, world, what, odd, group)


def check_mismatch(what: str, results: list[tuple[str, str, float]], figure: Figure) -> None:
    raised = sum(kind == RankMismatchError.__name__ for kind, _, _ in results)
    slowest = max(seconds for _, _, seconds in results)
    figure(f"{what}: {raised} of {len(results)} ranks raise, the last after {1000 * slowest:.0f} ms")
    expected = STRUCTURE[what][1] if what in STRUCTURE else SHOWN_AS.get(what, what)
    for kind, message, seconds in results:
        assert kind == RankMismatchError.__name__, (kind, message)
        assert expected in message
        assert "\n" not in message
        assert seconds < 2.0
    assert len({message for _, message, _ in results}) == 1


@pytest.mark.fault("F15")
@pytest.mark.parametrize("what", [*STRUCTURE, *SETTINGS])
@pytest.mark.parametrize(("world", "odd"), [(2, 0), (2, 1), (4, 2)])
def test_ranks_that_disagree(world: int, odd: int, what: str, figure: Figure) -> None:
    """Every rank gets the same error, naming the first difference."""
    check_mismatch(what, run_threads(world, construct, what, odd), figure)


@pytest.mark.fault("F15")
@pytest.mark.parametrize("what", ["order", "shape", "dtype", "lr", "coefficients", "count"])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_that_disagree(pool: RankPool, world: int, what: str, figure: Figure) -> None:
    check_mismatch(what, pool.run(world, construct_in_process, what, world - 1), figure)


@pytest.mark.fault("F15")
@pytest.mark.parametrize(
    ("setting", "factor"), [("lr", 0.5), ("momentum", 0.5), ("weight_decay", 0.5), ("lr", float("nan"))]
)
@pytest.mark.parametrize("world", [2, 4])
def test_setting_that_diverges_later(world: int, setting: str, factor: float, figure: Figure) -> None:
    """A scheduler on one rank only is an error on every rank at that step, and the state stays as it was."""

    def body(rank: int, ranks: int) -> str:
        params = parameters()
        opt = optimizer(params, Case())
        for step in range(2):
            if step == 1 and rank == 1:
                opt.param_groups[0][setting] *= factor
            backward(params, gradients(Case(), step, 0, rank, ranks))
            before = digest((params, opt.state_dict()))
            if step == 1:
                with pytest.raises(ValueError if factor != factor else RankMismatchError) as caught:
                    opt.step()
                assert digest((params, opt.state_dict())) == before
            else:
                opt.step()
            opt.zero_grad()
        return str(caught.value)

    start = time.monotonic()
    messages = run_threads(world, body, timeout=5.0)
    figure(f"{setting} differs at a step: {world} of {world} ranks raise, {time.monotonic() - start:.2f} s in all")
    assert all(setting in message for message in messages)
