"""Runs pytest on demand, each time in a fork of a process that has torch already; starts in a copy of the repository.

A line of JSON comes in, {"files": [...], "seconds": limit, "log": file}, and {"code": ..., "seconds": ...} goes
out: pytest's exit status, or -9 for a run that was ended because it took longer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import hypothesis
import numpy
import pytest
import safetensors
import torch

# They are what makes a start slow; nothing of distmuon or its tests may be imported here.
PRELOADED = (hypothesis, numpy, safetensors, torch)
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--no-header"]


def main() -> None:
    """Serve until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        start = time.monotonic()
        code = run(request["files"], request["seconds"], request["log"])
        print(json.dumps({"code": code, "seconds": time.monotonic() - start}), flush=True)


def run(files: list[str], limit: float, log: str) -> int:
    """Run pytest in a process of its own, with all that it starts in one group that ends with it."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with open(log, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            os.close(0)
            os._exit(int(pytest.main([*OPTIONS, *files])))
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _end_group(child)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    _end_group(child)
    os.waitpid(child, 0)
    return -9


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main()
