"""SIGTERM as a request to save and stop, which is how schedulers announce that a job's time is up."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Remembers whether SIGTERM arrived while the block ran.

    The previous handler is restored afterwards; if the signal came, the process is about to end, and further ones, with
    which launchers repeat themselves, are ignored.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.received else self._before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
