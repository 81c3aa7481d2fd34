"""What a process does to the files of a folder, in order, and its death at a chosen point of that."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distmuon.comm import Group

_NAMED = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "open": 0}
"""Audit events, and which of their arguments says what is changed."""


@dataclass
class Tracer:
    """Records events below a folder; before event number ``die_at`` the process kills itself."""

    folder: str
    die_at: int = -1
    events: list[tuple[str, str]] = field(default_factory=list)
    active: bool = True

    def note(self, event: str, path: str) -> None:
        """Record one event, named relative to the folder."""
        if not self.active or not path.startswith(self.folder):
            return
        if len(self.events) == self.die_at:
            die()
        self.events.append((event, path[len(self.folder) :].strip("/") or "."))

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Hook for the interpreter's own reports of what it does to files."""
        position = _NAMED.get(event)
        if position is None or not isinstance(args[position], str | bytes | os.PathLike):
            return
        writing = event != "open" or bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        # Where a directory is removed, names are relative to it.
        relative = event in ("os.remove", "os.rmdir") and args[-1] >= 0
        base = os.readlink(f"/proc/self/fd/{args[-1]}") if relative else os.getcwd()
        self.note(event if writing else "read", os.path.join(base, os.fsdecode(args[position])))


def die() -> None:
    """Leave without a trace, as for lack of memory or of power."""
    os.kill(os.getpid(), signal.SIGKILL)


def trace(folder: Path, die_at: int = -1) -> Tracer:
    """Watch this process from here on; it cannot be undone, so the process is one of ``forked``."""
    tracer = Tracer(str(folder), die_at)
    sys.addaudithook(tracer.audit)
    really: Callable[[int], None] = os.fsync

    def fsync(descriptor: int) -> None:
        tracer.note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        really(descriptor)
        tracer.note("fsync done", os.readlink(f"/proc/self/fd/{descriptor}"))

    os.fsync = fsync  # type: ignore[assignment]
    gather = Group.all_gather_text

    def vote(self: Group, text: str) -> list[str]:
        tracer.note("vote", tracer.folder)
        return gather(self, text)

    Group.all_gather_text = vote  # type: ignore[method-assign]
    return tracer
