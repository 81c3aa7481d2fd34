"""Ways to ask DeepSpeed for DistMuon, and what must stay as it was for everybody else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.ds import session
from tests.ds.engines import MATRICES, PARAMS, advance, build, config, network, rule, weights
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def late() -> Iterator[dict[str, Any]]:
    """A single process that imports DeepSpeed first and distmuon after it."""
    alone = RankPool(1)
    yield alone.run(1, session.import_late, timeout=100.0)[0]
    alone.close()


def selected(rank: int, world: int, group: Any, settings: Any, how: str) -> dict[str, Any]:
    """Build an engine and describe its optimizer."""
    model, arguments = network(1), {}
    if how == "args":
        arguments["args"] = SimpleNamespace(deepspeed_config=settings, local_rank=rank, device_rank=rank)
        settings = None
    engine = build(settings, 1, model=model, **arguments)
    names = {id(parameter): name for name, parameter in engine.named.items()}
    before = weights(engine)
    advance(engine, 0, 1)
    return {
        "classes": [cls.__name__ for cls in type(engine.optimizer).__mro__],
        "kinds": {names[id(p)]: g["kind"] for g in engine.optimizer.param_groups for p in g["params"]},
        "lrs": sorted({group["lr"] for group in engine.optimizer.param_groups}),
        "moved": all(not torch.equal(before[name], after) for name, after in weights(engine).items()),
        "name": engine.optimizer_name(),
    }


@pytest.mark.parametrize("how", ["dict", "file", "args"])
@pytest.mark.parametrize(
    "optimizer",
    ["DistMuon", "distmuon", {"type": "DistMuon"}, {"type": "distmuon", "params": PARAMS}],
    ids=["short", "short lower", "table", "table lower"],
)
def test_every_spelling_selects_distmuon(ds2: RankPool, tmp_path: Path, optimizer: Any, how: str) -> None:
    settings: Any = {**config(), "optimizer": optimizer}
    if how != "dict":
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(settings))
        settings = str(path)
    table = optimizer.get("params", {}) if isinstance(optimizer, dict) else {}
    for seen in ds2.run(2, selected, settings, how):
        assert {"DistMuon", "ZeROOptimizer", "Optimizer"} <= set(seen["classes"])
        assert seen["kinds"] == {name: rule(name) for name in seen["kinds"]}
        assert list(seen["kinds"].values()).count("muon") == MATRICES
        assert seen["lrs"] == sorted({table.get("lr", 1e-3), table.get("adamw_lr", 1e-3)})
        assert seen["moved"]


def keep(rank: int, world: int, group: Any, settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed leaves the user's dict as it was given."""
    before = json.dumps(settings)
    build(settings, None)
    return json.dumps(settings) == before


def test_the_given_dict_is_not_written_to(ds2: RankPool) -> None:
    assert ds2.run(2, keep, {**config(), "optimizer": "DistMuon"}) == [True, True]


def test_the_router_rule_is_a_setting(ds2: RankPool) -> None:
    seen = ds2.run(2, selected, config(params={"router": "adamw"}), "dict")[0]
    assert seen["kinds"].pop("moe.deepspeed_moe.gate.wg.weight") == "adamw"
    assert seen["kinds"] == {name: rule(name) for name in seen["kinds"]}


def test_without_distmuon_the_name_is_refused(late: dict[str, Any]) -> None:
    classes, message = late["refused"]
    assert classes[0] == "AssertionError"
    assert "DistMuon is not a supported DeepSpeed Optimizer" in message


def test_import_after_deepspeed_works(late: dict[str, Any]) -> None:
    assert late["late"][0] == "ZeroDistMuon"
    assert late["late"] == late["short"]


def test_stock_optimizers_are_untouched(late: dict[str, Any]) -> None:
    """Same wrappers, same wrapped classes, same bits with and without distmuon."""
    before, after = late["stock before"], late["stock after"]
    assert before == after
    assert before["AdamW 1"][:2] == ("DeepSpeedZeroOptimizer", "AdamW")
    assert before["Muon 1"][:2] == ("DeepSpeedZeroOptimizer", "MuonWithAuxAdam")
    assert before["AdamW 0"][1] == "AdamW"
    assert before["AdamW 1"][2] != before["Muon 1"][2]


def stock(rank: int, world: int, group: Any) -> dict[str, Any]:
    """Stock optimizers where distmuon came first."""
    network(None)
    return session.stock_steps()


def test_stock_optimizers_work_where_distmuon_came_first(ds2: RankPool, late: dict[str, Any]) -> None:
    """Every rank sees the same batch here, so two ranks must give what one gives."""
    for seen in ds2.run(2, stock):
        for name, (wrapper, inner, values) in late["stock before"].items():
            assert seen[name][:2] == (wrapper, inner)
            torch.testing.assert_close(torch.tensor(seen[name][2]), torch.tensor(values))
