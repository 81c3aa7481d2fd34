"""Parameters it cannot handle and settings out of range are refused by name, before anything is written."""

# mypy: disable-error-code=no-untyped-call

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import distmuon
from distmuon.errors import ConfigError, ParameterError
from tests.distributed.scenario import Case, backward, digest, gradients, optimizer, parameters
from tests.ranks import run_threads

Groups = list[dict[str, Any]]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.zeros(shape, dtype=dtype))


def _views(first: int, second: int) -> Groups:
    """Two matrices in one buffer, starting at these rows."""
    base = torch.zeros(12, 4)
    matrices = [
        ("upper", Parameter(base[first : first + 4])),
        ("culprit", Parameter(base[second : second + 4])),
    ]
    return [{"params": matrices, "kind": "muon"}]


def _single(p: Parameter, kind: str = "muon") -> Groups:
    return [{"params": [("fine", zeros(4, 4)), ("culprit", p)], "kind": kind}]


PARAMETERS: dict[str, Callable[[], Groups]] = {
    "non-contiguous": lambda: _single(Parameter(torch.zeros(4, 6).t())),
    "strided": lambda: _single(Parameter(torch.zeros(4, 12)[:, ::2])),
    "shared storage": lambda: _views(0, 0),
    "overlapping storage": lambda: _views(0, 3),
    "complex": lambda: _single(zeros(4, 4, dtype=torch.complex64)),
    "complex adamw": lambda: _single(zeros(4, dtype=torch.complex64), "adamw"),
    "0-D muon": lambda: _single(zeros()),
    "1-D muon": lambda: _single(zeros(4)),
    "4-D muon": lambda: _single(zeros(2, 2, 4, 4)),
}


@pytest.mark.fault("F16")
@pytest.mark.parametrize("make", [distmuon.DistMuon, distmuon.Muon])
@pytest.mark.parametrize("what", PARAMETERS)
def test_parameter_refused_by_name(what: str, make: Callable[..., Any], figure: Callable[[str], None]) -> None:
    def body(rank: int, world: int) -> str:
        with pytest.raises(ParameterError) as caught:
            make(PARAMETERS[what]())
        return str(caught.value)

    named = sum("culprit" in message for message in run_threads(2, body))
    figure(f"{what}: refused by name on {named} of 2 ranks")
    assert named == 2


@pytest.mark.fault("F16")
def test_disjoint_views_of_one_buffer(figure: Callable[[str], None]) -> None:
    """Parameters laid out in one flat buffer, as other systems do, are fine while they do not overlap."""

    def body(rank: int, world: int) -> list[str]:
        groups = _views(0, 4)
        opt = distmuon.DistMuon(groups)
        sum(p.sum() for _, p in groups[0]["params"]).backward()
        opt.step()
        return [digest(p) for _, p in groups[0]["params"]]

    results = run_threads(2, body)
    figure(f"disjoint views of one buffer: {len({tuple(found) for found in results})} set of bits on 2 ranks")
    assert results[0] == results[1]
    assert len(set(results[0])) == 1


def test_sparse_gradient_is_refused() -> None:
    def body(rank: int, world: int) -> str:
        embed = nn.Embedding(6, 4, sparse=True, _weight=torch.ones(6, 4))
        before = digest(list(embed.parameters()))
        opt = distmuon.DistMuon([{"params": [("culprit", embed.weight)], "kind": "adamw"}])
        with pytest.raises(ParameterError) as caught:  # noqa: PT012  (either call may be the one to see it)
            embed(torch.tensor([1, 2])).sum().backward()
            opt.step()
        assert digest(list(embed.parameters())) == before
        return str(caught.value)

    assert all("culprit" in message and "sparse" in message for message in run_threads(2, body))


@pytest.mark.parametrize("start", [True, False])
def test_requires_grad_must_not_change(start: bool) -> None:
    """Turned off or on after construction: refused by name before anything is written."""

    def body(rank: int, world: int) -> str:
        fine, culprit = zeros(4, 4), zeros(4, 4)
        culprit.requires_grad_(start)
        opt = distmuon.DistMuon([{"params": [("fine", fine), ("culprit", culprit)], "kind": "muon"}])
        culprit.requires_grad_(not start)
        with pytest.raises(ParameterError) as caught:  # noqa: PT012
            (fine.sum() + culprit.sum()).backward()
            opt.step()
        assert not fine.any()
        assert not culprit.any()
        return str(caught.value)

    assert all("culprit" in message for message in run_threads(2, body))


NAN, INF = float("nan"), float("inf")
BAD_SETTINGS: list[tuple[str, Any]] = [
    *[("lr", value) for value in (-1.0, NAN, INF, "0.1", None, True)],
    *[("weight_decay", value) for value in (-0.1, NAN, INF)],
    *[("momentum", value) for value in (-0.1, 1.0, 1.5, NAN)],
    *[("adamw_lr", value) for value in (-1.0, NAN)],
    *[("adamw_betas", value) for value in ((1.0, 0.95), (0.9, -0.1), 0.9)],
    *[("adamw_eps", value) for value in (-1e-8, NAN)],
    *[("adamw_weight_decay", value) for value in (-0.1, NAN)],
    *[("bucket_mb", value) for value in (0, -1.0, NAN, INF)],
    *[("max_grad_norm", value) for value in (-1.0, 0.0, NAN)],
    ("policy", "team-of-one"),
    ("reduce_dtype", torch.int32),
    ("ns", 5),
    ("nesterov", "yes"),
]


@pytest.mark.parametrize(("field", "value"), BAD_SETTINGS, ids=str)
def test_setting_out_of_range(field: str, value: Any) -> None:
    """The message names the field and the value given."""
    groups = _single(zeros(4, 4))
    with pytest.raises(ConfigError) as caught:
        run_threads(1, _raise_here(groups, {field: value}))[0]()
    message = str(caught.value)
    assert field.removeprefix("adamw_") in message
    given = value if isinstance(value, tuple) else (value,)
    assert any(str(part).removeprefix("torch.") in message for part in given)
    assert "\n" not in message


def _raise_here(groups: Groups, settings: dict[str, Any]) -> Callable[..., Callable[[], None]]:
    """A rank body that hands its error back, to be raised where pytest sees its type."""

    def body(rank: int, world: int) -> Callable[[], None]:
        try:
            distmuon.DistMuon(groups, **settings)
        except Exception as error:
            caught = error

            def again() -> None:
                raise caught

            return again
        return lambda: None

    return body


@pytest.mark.parametrize(("field", "value"), [("lr", -1.0), ("momentum", 1.5), ("kind", "sgd")])
def test_group_setting_out_of_range(field: str, value: Any) -> None:
    groups = _single(zeros(4, 4))
    groups[0][field] = value
    with pytest.raises(ConfigError, match=field):
        run_threads(1, _raise_here(groups, {}))[0]()


def test_setting_changed_to_nonsense_later() -> None:
    """A learning rate that becomes NaN is refused at the step, before anything is written."""

    def body(rank: int, world: int) -> str:
        params = parameters()
        opt = optimizer(params, Case())
        backward(params, gradients(Case(), 0, 0, rank, world))
        opt.param_groups[0]["lr"] = NAN
        before = digest((params, opt.state_dict()))
        with pytest.raises(ValueError, match="lr") as caught:
            opt.step()
        assert digest((params, opt.state_dict())) == before
        return type(caught.value).__name__

    assert run_threads(2, body) == [ConfigError.__name__] * 2


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="param"):
        run_threads(1, _raise_here([], {}))[0]()
