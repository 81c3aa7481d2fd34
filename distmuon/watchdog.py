"""Where every thread of a rank is when its steps stop coming."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from distmuon.errors import ConfigError

# Enough for a median that one slow step does not move.
_REMEMBERED = 20
# About eleven days; longer waits overflow what the C library counts in.
_LONGEST = 1e6
# Every header has this length, so that it can be written over.
_HEADER_BYTES = 120


class Watchdog:
    """Writes the stacks of all threads of this process to a file if no step ends for too long; the process goes on.

    ``faulthandler`` watches from a thread in C, which also runs while Python code holds the interpreter. A process has
    one such watch: whoever else starts one in the meantime ends this one.

    Args:
        directory: where ``stacks-rank{rank}.txt`` goes; made if missing. The file is there while the watch lasts, and
            stays if stacks were written.
        rank: this rank.
        least_seconds: shortest time without a step that counts as too long, above 0.
        factor: the time is this many medians of the last 20 step times, if that is longer; above 1.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, directory: Path, rank: int, least_seconds: float = 60.0, factor: float = 2.0) -> None:
        for name, value, least in (("least_seconds", least_seconds, 0), ("factor", factor, 1)):
            if not least < value <= _LONGEST:
                raise ConfigError(f"{name} = {value} is not legal: it must be above {least} and at most {_LONGEST:g}.")
        self.path = directory / f"stacks-rank{rank}.txt"
        self._least, self._factor = least_seconds, factor
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._last_beat: float | None = None
        self._descriptor: int | None = None
        self._header_at = 0

    def __enter__(self) -> Watchdog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._header_at = 0
        self._start("before the first step")
        return self

    def __exit__(self, *_: object) -> None:
        descriptor, self._descriptor = self._descriptor, None
        assert descriptor is not None
        faulthandler.cancel_dump_traceback_later()
        written = os.fstat(descriptor).st_size > _HEADER_BYTES
        os.close(descriptor)
        if not written:
            self.path.unlink(missing_ok=True)

    def beat(self, step: int) -> None:
        """Say that a step has ended; the time until the next one runs from now.

        Args:
            step: its number.
        """
        now = time.monotonic()
        if self._last_beat is not None:
            self._steps.append(now - self._last_beat)
        self._last_beat = now
        self._start(f"after step {step}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch during the block, which is no part of a step: an evaluation, a save."""
        begun = time.monotonic()
        if self._descriptor is not None:
            faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            if self._last_beat is not None:
                self._last_beat += time.monotonic() - begun
            self._start("after a pause")

    @property
    def limit(self) -> float:
        """Seconds without a step that count as too long now."""
        slow = self._factor * statistics.median(self._steps) if self._steps else 0.0
        return min(max(self._least, slow), _LONGEST)

    def _start(self, where: str) -> None:
        """Watch from now on; the header says what from, and stacks will follow it if they are written."""
        if self._descriptor is None:
            return
        # Waits for stacks that are being written, which the header must not tear.
        faulthandler.cancel_dump_traceback_later()
        limit = self.limit
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        header = f"process {os.getpid()}: no step ended for {limit:.1f} s {where}, counted from {now} UTC"
        # Stacks that were written before stay, and this header goes behind them.
        size = os.fstat(self._descriptor).st_size
        if size > self._header_at + _HEADER_BYTES:
            self._header_at = size
        os.lseek(self._descriptor, self._header_at, os.SEEK_SET)
        os.write(self._descriptor, header[: _HEADER_BYTES - 1].ljust(_HEADER_BYTES - 1).encode() + b"\n")
        faulthandler.dump_traceback_later(limit, file=self._descriptor)
