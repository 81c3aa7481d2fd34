"""``import distmuon`` is light: a user who only wants the optimizer pays for nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 0.3
TRIES = 5
PROBE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import distmuon
seconds = time.process_time() - start
new = sorted(set(sys.modules) - before)
print(json.dumps({"new": new, "seconds": seconds, "cuda": torch.cuda.is_initialized()}))
"""


def probe() -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.fault("F26")
def test_import_brings_in_neither_triton_nor_deepspeed_nor_cuda(figure: Callable[[str], None]) -> None:
    result = probe()
    heavy = {"apex", "datasets", "deepspeed", "matplotlib", "transformers", "triton", "tyro"}
    assert "distmuon" in result["new"]
    assert {name.split(".")[0] for name in result["new"]} & heavy == set()
    assert not result["cuda"]
    figure(f"import distmuon loads {len(result['new'])} modules beside torch's, none of {', '.join(sorted(heavy))}")


@pytest.mark.fault("F26")
def test_import_adds_little_time(figure: Callable[[str], None]) -> None:
    # Processor time of the best of several runs: other work on the machine must not fail this.
    seconds: list[float] = []
    while len(seconds) < TRIES and min(seconds, default=LIMIT_S + 1) > LIMIT_S:
        seconds.append(probe()["seconds"])
    figure(f"import distmuon takes {min(seconds):.3f} s of CPU time beside torch's own")
    assert min(seconds) <= LIMIT_S, f"import distmuon took {min(seconds):.2f} s of CPU time over torch"
