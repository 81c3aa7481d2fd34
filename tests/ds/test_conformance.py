"""What torch promises of an optimizer, where the optimizer is an engine's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

from tests.ds.engines import advance, build, config
from tests.ranks import RankPool


def hooked_and_copied(rank: int, world: int, group: Any) -> tuple[list[str], list[str]]:
    """Step hooks that ran in two steps, and what copying and pickling say."""
    engine = build(config(), 1)
    seen: list[str] = []
    engine.optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    engine.optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    advance(engine, 0, 2)
    said = []
    for attempt in (copy.deepcopy, pickle.dumps):
        try:
            attempt(engine.optimizer)
        except TypeError as error:
            said.append(str(error))
    return seen, said


def test_step_hooks_run_and_copies_are_refused(ds2: RankPool) -> None:
    for seen, said in ds2.run(2, hooked_and_copied):
        assert seen == ["pre", "post"] * 2
        assert ["cannot be copied" in said[0], "cannot be pickled" in said[1]] == [True, True]
