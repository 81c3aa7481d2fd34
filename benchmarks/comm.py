"""Bytes per optimizer step of DistMuon, AdamW and DeepSpeed's own Muon on one MoE model: ``make bench``.

    distmuon bench comm [--worlds 2,4] [--model configs/models/moe_mini.toml]

Every contender trains the same model on the same tokens; parameters are checked to be equal on all ranks before its
bytes count. Collectives are counted where they enter torch.distributed, bytes by the ring model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distmuon.benchmarks import places

RESULTS = places.RESULTS / "comm.json"
README = places.ROOT / "README.md"
MARKS = ("<!-- bytes -->\n", "<!-- /bytes -->\n")
VOCABULARY = 4096
WORLDS = "2,4"
STEPS = 2

CONTENDERS: dict[str, dict[str, Any]] = {
    "DistMuon balanced": {"type": "DistMuon", "params": {"policy": "balanced"}},
    "DistMuon flat": {"type": "DistMuon", "params": {"policy": "flat"}},
    "AdamW ZeRO-1 on DistMuon's path": {"type": "DistMuon", "params": {}, "all": "adamw"},
    "DeepSpeed AdamW ZeRO-1": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "DeepSpeed Muon ZeRO-1": {"type": "Muon", "params": {"lr": 1e-3, "ns_method": "standard"}},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all contenders at all world sizes, write the results and print the table."""
    parser = argparse.ArgumentParser(
        prog="distmuon bench comm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", default=WORLDS, help="numbers of ranks, comma-separated; others are only printed")
    parser.add_argument("--model", default="configs/models/moe_mini.toml", help="model file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(Path(options.model), Path(options.worker))
        return 0
    rows = []
    for world in options.worlds.split(","):
        print(f"measuring at {world} ranks ...", flush=True)
        rows += launch(int(world), options.model)
    results = {"model": options.model, "vocabulary": VOCABULARY, "rows": rows}
    print(table(rows))
    if options.worlds != WORLDS:
        return 0
    places.write(RESULTS, json.dumps(results, indent=1) + "\n")
    if README.is_file():
        README.write_text(with_table(README.read_text(), rows))
    return 0


def with_table(readme: str, rows: list[dict[str, Any]]) -> str:
    """Put the float32 rows between the marks of the README."""
    before, rest = readme.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    chosen = [row for row in rows if row["parameters"] == "float32"]
    return f"{before}{MARKS[0]}{table(chosen)}\n{MARKS[1]}{after}"


def launch(world: int, model: str) -> list[dict[str, Any]]:
    """Run the worker under torchrun and read what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command += ["-m", "distmuon.benchmarks.comm", "--model", model, "--worker", str(result)]
        # DeepSpeed compiles its Muon with inductor, which takes minutes on a CPU and moves no bytes.
        env = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run(command, env=env, check=True)  # noqa: S603
        rows: list[dict[str, Any]] = json.loads(result.read_text())
        return rows


def worker(model_file: Path, result: Path) -> None:
    """Measure every contender on this rank; rank 0 writes the rows."""
    from distmuon.benchmarks.tracer import Tracer

    tracer = Tracer()
    tracer.install()
    import torch.distributed as dist

    from distmuon.train import engine as engines

    engines.quiet_deepspeed()
    engines.join_ranks()
    rows = []
    for bf16 in (False, True):
        for name, optimizer in CONTENDERS.items():
            row = measure(name, optimizer, bf16, model_file, tracer)
            rows.append({"world": dist.get_world_size(), "parameters": "bfloat16" if bf16 else "float32", **row})
    if dist.get_rank() == 0:
        result.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def measure(name: str, optimizer: dict[str, Any], bf16: bool, model_file: Path, tracer: Any) -> dict[str, Any]:
    """Train a few steps and count the last one's collectives."""
    import deepspeed
    import torch

    from distmuon.train.config import ModelConfig, read_toml
    from distmuon.train.model import MoETransformer

    model = MoETransformer(ModelConfig(**read_toml(model_file)), VOCABULARY, seed=0)
    numel = sum(parameter.numel() for parameter in model.parameters())
    groups: Any = list(model.parameters())
    if "all" in optimizer:
        groups = [{"params": groups, "name": "all", "kind": optimizer["all"]}]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": optimizer["type"], "params": optimizer["params"]},
            "bf16": {"enabled": bf16},
            "steps_per_print": 2**31 - 1,
        },
    )
    generator = torch.Generator().manual_seed(engine.global_rank)
    for _ in range(STEPS):
        tracer.reset()
        tokens = torch.randint(0, VOCABULARY, (1, 65), generator=generator)
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]).objective)
        engine.step()
    calls, wire = dict(tracer.calls), dict(tracer.wire)
    verify_equal(model)
    ideal = 2 * numel * (2 if bf16 else 4) * (engine.world_size - 1) / engine.world_size
    return {
        "name": name,
        "wire_bytes": sum(wire.values()),
        "ratio": sum(wire.values()) / ideal,
        "calls": calls,
        "wire": wire,
        "elements": numel,
    }


def verify_equal(model: Any) -> None:
    """Fail unless all ranks hold the same parameters, bit for bit."""
    import torch
    import torch.distributed as dist

    for name, parameter in model.named_parameters():
        largest, smallest = parameter.detach().clone(), parameter.detach().clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        if not torch.equal(largest, smallest):
            raise RuntimeError(f'ranks disagree on "{name}"; its bytes are not worth counting')


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown."""
    lines = [
        "| ranks | parameters | contender | MB sent per rank and step | / AdamW-ZeRO-1 (ring) | collectives |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        calls = ", ".join(f"{count} {name}" for name, count in sorted(row["calls"].items()))
        lines.append(
            f"| {row['world']} | {row['parameters']} | {row['name']} | {row['wire_bytes'] / 1e6:.3f} "
            f"| {row['ratio']:.4f} | {calls} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
