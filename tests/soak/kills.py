"""F25, a long run that is killed again and again: of two ranks one dies every 500 steps, both go on from a checkpoint.

``python -m tests.soak kills``. A second run of as many steps that nobody disturbs must have the same losses and state,
bit for bit; it also shows whether memory or open files grow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import nn

import distmuon
from distmuon import checkpoint
from tests.faults import plugin
from tests.faults.launch import Ending, die, run_ranks

WORLD = 2
SAVE_EVERY = 100
WARM = 500
RECORD = struct.Struct("<qd")
# A step takes milliseconds: the blow falls anywhere in the next few, also into a save.
WITHIN_S = 0.1


def main(arguments: Sequence[str]) -> int:
    """Run both; exit status 1 if anything that must hold does not."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak kills", description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--kill-every", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=30.0, help="of both runs; fewer steps if it must be")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write a fault report")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        disturbed, calm = Path(folder) / "disturbed", Path(folder) / "calm"
        deadline = start + 60 * options.minutes * 0.6
        reached, kills = disturb(disturbed, options.steps, options.kill_every, deadline, random.Random(options.seed))
        ending = run_ranks(WORLD, live, str(calm), reached, None, timeout=7200.0)
        figures, problems = judge(disturbed, reached, kills, [end.verdict for end in ending])
    for line in [*figures, *(f"PROBLEM {problem}" for problem in problems)]:
        print(line)
    if options.report:
        row = {"faults": ["F25"], "test": "tests/soak/kills.py", "outcome": "failed" if problems else "passed"}
        row |= {"figures": [*figures, *problems], "seconds": round(time.monotonic() - start, 1)}
        plugin.write(options.report, [row], plugin.environment())
    return 1 if problems else 0


def disturb(folder: Path, steps: int, every: int, deadline: float, chance: random.Random) -> tuple[int, int]:
    """Train under kills: how far it came, and how many kills there were."""
    kills = 0
    target = every
    while target + 2 * SAVE_EVERY < steps and time.monotonic() < deadline:
        step = target + chance.randrange(SAVE_EVERY)
        blow = {"rank": chance.randrange(WORLD), "step": step, "seconds": chance.uniform(0.0, WITHIN_S)}
        endings = run_ranks(WORLD, live, str(folder), steps, blow, timeout=600.0)
        struck = endings[blow["rank"]]
        if struck.exit_code != -9 or not all(_raised(end) for end in endings if end is not struck):
            raise SystemExit(f"after a kill of rank {blow['rank']}: {endings}")
        kills += 1
        target += every
        print(f"kill {kills}: rank {blow['rank']} in step {blow['step']} or soon after", flush=True)
    reached = min(steps, target)
    run_ranks(WORLD, live, str(folder), reached, None, timeout=600.0)
    return reached, kills


def _raised(ending: Ending) -> bool:
    return ending.exit_code == 1 and "CollectiveError" in str(ending.verdict)


def judge(disturbed: Path, reached: int, kills: int, calm: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """What was measured, and what of it should not be."""
    theirs = records(disturbed / "losses")
    ours = dict(records(disturbed.parent / "calm" / "losses"))
    differing = sum(loss != ours[step] for step, loss in theirs)
    missing = reached - len({step for step, _ in theirs})
    same = state(disturbed, reached) == state(disturbed.parent / "calm", reached)
    figures = [
        f"{reached:,} steps, {kills} kills and restarts, {len(theirs) - reached:,} steps done twice",
        f"{differing} of {len(theirs):,} losses differ from the undisturbed run's, the bits of the last "
        f"checkpoint {'are equal' if same else 'DIFFER'}",
    ]
    problems = []
    if differing or missing or not same:
        problems.append(f"{differing} losses differ, {missing} are missing, same state: {same}")
    for rank, seen in enumerate(calm):
        slope, ratio = seen["slope"], seen["p99"] / seen["median"]
        files = seen["files"]
        figures.append(
            f"undisturbed, rank {rank}: {slope:+.3f} MiB per 1,000 steps, {files[0]} open files, "
            f"step {1e3 * seen['median']:.1f} ms, p99 {ratio:.1f} medians"
        )
        if slope > 1.0:
            problems.append(f"rank {rank} grows by {slope:.2f} MiB per 1,000 steps")
        if len(files) > 1:
            problems.append(f"rank {rank} has had {files} open files")
        if ratio > 3.0:
            problems.append(f"rank {rank}'s p99 step took {ratio:.1f} medians")
    return figures, problems


def records(path: Path) -> list[tuple[int, float]]:
    """Step and loss of every step that was done."""
    data = path.read_bytes()
    return [RECORD.unpack_from(data, start) for start in range(0, len(data) - RECORD.size + 1, RECORD.size)]


def state(folder: Path, step: int) -> dict[str, Any]:
    """Everything in a checkpoint; of its files only how the header is written may differ."""
    path = checkpoint.verify(folder / "checkpoints" / f"step_{step:08d}").path
    found: dict[str, Any] = {"state": (path / "state.json").read_bytes()}
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        found[file.name] = json.loads(data[8:end]), data[end:]
    return found


def live(rank: int, world: int, group: Any, where: str, steps: int, blow: dict[str, Any] | None) -> dict[str, Any]:
    """One life of a rank: from the last checkpoint to the last step, or to the blow."""
    folder = Path(where)
    folder.mkdir(parents=True, exist_ok=True)
    model, optimizer = build()
    first = 0
    if (folder / "checkpoints" / "LATEST").exists():
        restored = checkpoint.load(folder / "checkpoints", model, optimizer)
        first = restored.step
        assert restored.extra == {"tokens": 64 * first}
    seconds, memory, files = [], [], set()
    with (folder / "losses" if rank == 0 else Path(os.devnull)).open("ab", buffering=0) as losses:
        for step in range(first, steps):
            if blow is not None and (step, rank) == (blow["step"], blow["rank"]):
                threading.Timer(blow["seconds"], die).start()
            begun = time.perf_counter()
            loss = train_step(model, optimizer, step, rank)
            seconds.append(time.perf_counter() - begun)
            losses.write(RECORD.pack(step, loss))
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                extra = {"tokens": 64 * (step + 1)}
                checkpoint.save(folder / "checkpoints", model, optimizer, step=step + 1, extra=extra, keep=2)
                if step - first > WARM:
                    memory.append((step / 1000, resident_mib()))
                    files.add(len(os.listdir("/proc/self/fd")))
    assert blow is None, "the blow did not fall"
    slope = statistics.linear_regression(*zip(*memory, strict=True)).slope if len(memory) > 2 else 0.0
    times = {"median": statistics.median(seconds), "p99": sorted(seconds)[int(0.99 * len(seconds))]} if seconds else {}
    return times | {"slope": slope, "files": sorted(files)}


def build() -> tuple[nn.Module, distmuon.DistMuon]:
    """A model with dropout, which needs its random numbers restored, and its optimizer."""
    torch.manual_seed(0)
    hidden = [nn.Linear(48, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 48), nn.ReLU()]
    model = nn.Sequential(nn.Embedding(64, 48), *hidden, nn.Linear(48, 64))
    ns = distmuon.NewtonSchulz(dtype="float32")
    optimizer = distmuon.DistMuon(distmuon.param_groups(model), lr=0.02, adamw_lr=2e-3, ns=ns, max_grad_norm=1.0)
    # Checkpoints keep all generators, also those that nothing here uses.
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(1 + dist.get_rank())
    return model, optimizer


def train_step(model: nn.Module, optimizer: distmuon.DistMuon, step: int, rank: int) -> float:
    """One update from the data of this step and rank; the loss."""
    for group in optimizer.param_groups:
        group["lr"] = (0.02 if group["kind"] == "muon" else 2e-3) / (1.0 + step / 1000)
    tokens = torch.randint(0, 64, (32,), generator=torch.Generator().manual_seed(WORLD * step + rank))
    loss = nn.functional.cross_entropy(model(tokens), (5 * tokens + 3) % 64)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def resident_mib() -> float:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
