"""Metrics files of runs that never were."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROUTING = [
    {"module": "layers.0.attention", "kind": "muon", "parameters": 300, "tensors": 3},
    {"module": "layers.1.attention", "kind": "muon", "parameters": 300, "tensors": 3},
    {"module": "embedding", "kind": "adamw", "parameters": 200, "tensors": 1},
]


def write_run(
    path: Path,
    name: str,
    losses: list[float],
    *,
    evals: dict[int, float] | None = None,
    end: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    tokens_per_step: int = 100,
    wire: float = 1000.0,
    skipped: tuple[int, ...] = (),
    exposed: float | None = None,
    trace: dict[str, Any] | None = None,
) -> Path:
    """A metrics file with one step per loss; ``end`` replaces the final record."""
    steps = len(losses)
    records = [start(name, config, data)]
    records += [one_step(step, loss, tokens_per_step, step in skipped) for step, loss in enumerate(losses, start=1)]
    for step, loss in (evals or {}).items():
        records.append({"type": "eval", "step": step, "loss": loss, "accuracy": 0.25, "sequences": 8})
    if exposed is not None:
        records[1:] = [{**record, "exposed_seconds": exposed} for record in records[1 : 1 + steps]] + records[
            1 + steps :
        ]
    records += [trace] if trace else []
    final = finish(steps, (evals or {}).get(steps, 2.0), tokens_per_step, wire)
    records += [final] if end is None else [end] if end else []
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def start(name: str, config: dict[str, Any] | None, data: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "type": "run",
        "schema": 1,
        "name": name,
        "started": "2026-01-02T03:04:05+00:00",
        "config": config or {"optimizer": {"lr": 0.02, "name": "distmuon"}},
        "environment": {"torch": "2.13.0", "git": None},
        "data": data or {"source": "some-text"},
        "optimizer": {"name": "distmuon", "routing": ROUTING},
        "state_bytes_per_rank": [1024, 3072],
    }


def one_step(step: int, loss: float, tokens_per_step: int, skipped: bool) -> dict[str, Any]:
    return {
        "type": "step",
        "step": step,
        "loss": loss if math.isfinite(loss) else None,
        "grad_norm": 1.0,
        "lr": 0.02,
        "tokens": tokens_per_step * step,
        "tokens_per_s": 400.0,
        # The first steps are slow: they must not count.
        "seconds": 9.0 if step == 1 else 0.25,
        "split": {"forward_backward": 0.15, "newton_schulz": 0.05, "complete": 0.0},
        "skipped": skipped,
    }


def finish(steps: int, val_loss: float, tokens_per_step: int, wire: float) -> dict[str, Any]:
    traffic = {
        "collective": "reduce_scatter",
        "group_size": 2,
        "dtype": "float32",
        "calls_per_step": 3.0,
        "payload_bytes_per_step": 2 * wire,
        "wire_bytes_per_step": wire,
    }
    return {
        "type": "final",
        "step": steps,
        "val_loss": val_loss,
        "val_accuracy": 0.375,
        "bits_per_byte": 1.2345,
        "tokens": tokens_per_step * steps,
        "wall_seconds": 75.0,
        "comm": [traffic],
        "state_bytes_per_rank": [1024, 3072],
    }
