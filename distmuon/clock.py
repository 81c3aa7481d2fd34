"""Where the time of a step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class PhaseClock:
    """Adds up host seconds per phase until cleared; on an accelerator that is the time to enqueue the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the duration of the block to a phase.

        Args:
            phase: name of the phase.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def clear(self) -> dict[str, float]:
        """Return the seconds so far and start from zero."""
        seconds, self.seconds = self.seconds, {}
        return seconds
