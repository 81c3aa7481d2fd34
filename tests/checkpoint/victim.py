"""A checkpoint to damage, and a model in the middle of training that must not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distmuon import checkpoint
from distmuon.checkpoint.verify import Check
from distmuon.errors import CheckpointError
from tests.checkpoint.scene import Spec, Way, bits_differing, build, train, whole

SPEC = Spec(
    {"tall": ((12, 5), "muon"), "stack": ((4, 3, 3), "muon"), "table": ((9, 3), "adamw"), "gain": ((), "adamw")},
    dtype="bfloat16",
)
ALONE = Way(alone=True)


def write(rank: int, world: int, folder: Path) -> None:
    model, opt = build(SPEC, Way(world, "flat"))
    for step in range(2):
        train(model, opt, SPEC, step, step + 1, rank, world)
        checkpoint.save(folder, model, opt, step=step + 1, extra={"epoch": step})


class Victim:
    """A model and its optimizer in the middle of training, which no refused checkpoint may change."""

    def __init__(self) -> None:
        self.model, self.opt = build(SPEC, ALONE, seed=8)
        train(self.model, self.opt, SPEC, 5, 7)
        self.before = whole(self.model, self.opt)
        self.groups = self.settings()

    def settings(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k != "params"} for group in self.opt.param_groups]

    def refuses(self, path: Path, check: Check = "full") -> tuple[str, str]:
        """What ``load`` and ``verify`` say."""
        with pytest.raises(CheckpointError) as loading:
            checkpoint.load(path.parent, self.model, self.opt, check=check)
        assert bits_differing(whole(self.model, self.opt), self.before) == 0
        assert self.settings() == self.groups
        with pytest.raises(CheckpointError) as verifying:
            checkpoint.verify(path, check=check)
        return str(loading.value), str(verifying.value)
