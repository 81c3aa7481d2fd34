"""Files whose hashes are right and whose content is not that of a checkpoint: refused by name, nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distmuon import checkpoint
from tests.checkpoint.disk import MANIFEST, STATE, body, header, reseal, shards, write_header
from tests.checkpoint.scene import Figure
from tests.checkpoint.victim import Victim

Change = Callable[[dict[str, Any]], object]


def chunks(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Chunks of a tensor that lies in several files."""
    found: list[dict[str, Any]] = max((t["chunks"] for t in content["tensors"].values()), key=len)
    assert len(found) > 1
    return found


def renamed_file(new: str) -> Change:
    """A shard under another name, everywhere in the manifest."""

    def change(content: dict[str, Any]) -> None:
        old = next(name for name in content["files"] if name.endswith(".safetensors"))
        content["files"][new] = content["files"].pop(old)
        for tensor in content["tensors"].values():
            for chunk in tensor["chunks"]:
                chunk["file"] = new if chunk["file"] == old else chunk["file"]

    return change


CHANGES: dict[str, Change] = {
    "a chunk twice": lambda c: chunks(c).append(dict(chunks(c)[0])),
    "a chunk missing": lambda c: chunks(c).pop(),
    "all chunks missing": lambda c: chunks(c).clear(),
    "chunks that overlap": lambda c: chunks(c)[1]["offsets"].__setitem__(0, chunks(c)[1]["offsets"][0] - 1),
    "a negative offset": lambda c: chunks(c)[0]["offsets"].__setitem__(0, -1),
    "a negative size": lambda c: chunks(c)[0]["sizes"].__setitem__(0, -1),
    "a size of 0": lambda c: chunks(c)[0]["sizes"].__setitem__(0, 0),
    "an offset too many": lambda c: chunks(c)[0]["offsets"].append(0),
    "offsets that are text": lambda c: chunks(c)[0].__setitem__("offsets", "00"),
    "a size that is true": lambda c: chunks(c)[0]["sizes"].__setitem__(0, True),
    "a fractional size": lambda c: chunks(c)[0]["sizes"].__setitem__(0, 1.5),
    "a file that is not listed": lambda c: chunks(c)[0].__setitem__("file", "other.safetensors"),
    "a parent directory": renamed_file("../secret.safetensors"),
    "an absolute path": renamed_file("/etc/hostname"),
    "a subdirectory": renamed_file("a/b.safetensors"),
    "a zero byte": renamed_file("shard\0.safetensors"),
    "no name": renamed_file(""),
    "the directory itself": renamed_file("."),
    "the manifest as a shard": renamed_file(MANIFEST),
    "the state as a shard": renamed_file(STATE),
    "a negative step": lambda c: c.__setitem__("step", -1),
    "another step": lambda c: c.__setitem__("step", 3),
    "no step": lambda c: c.pop("step"),
    "a step that is text": lambda c: c.__setitem__("step", "2"),
    "a world of none": lambda c: c.__setitem__("world_size", 0),
    "no tensors": lambda c: c.__setitem__("tensors", []),
    "an unknown key": lambda c: c.__setitem__("hook", "os.system"),
    "an unknown dtype": lambda c: next(iter(c["tensors"].values())).__setitem__("dtype", "object"),
    "a dtype that is an attribute": lambda c: next(iter(c["tensors"].values())).__setitem__("dtype", "load"),
    "a fractional schema": lambda c: c.__setitem__("schema_number", 1.0),
    "a schema that is true": lambda c: c.__setitem__("schema_number", True),
    "no state": lambda c: c["files"].pop(STATE),
}


@pytest.mark.fault("F6")
@pytest.mark.parametrize("change", CHANGES)
def test_a_consistent_manifest_that_lies(step: Path, change: str, figure: Figure) -> None:
    """Its hash of itself is right, but it does not describe a checkpoint."""
    reseal(step, CHANGES[change])
    messages = Victim().refuses(step)
    assert all(any(n in m for n in (MANIFEST, STATE, "shard-", "step_00000002")) for m in messages), messages
    figure(f"a manifest with {change} refused by name")


def test_a_manifest_sealed_anew_is_fine(step: Path) -> None:
    """What the tests above change is what is refused."""
    reseal(step)
    assert checkpoint.verify(step).step == 2
    assert body(step)["step"] == 2


def reshaped(table: dict[str, Any]) -> None:
    key = next(key for key in table if key.startswith("weight/") and table[key]["shape"])
    table[key]["shape"] = [*table[key]["shape"][::-1], 1]


HEADERS: dict[str, Change] = {
    "another shape": reshaped,
    "another dtype": lambda t: next(v for k, v in t.items() if k.startswith("weight/")).__setitem__("dtype", "F16"),
    "another name": lambda t: t.__setitem__("weight/other", t.pop(next(k for k in t if k.startswith("weight/")))),
    "a tensor less": lambda t: t.pop(next(k for k in t if k.startswith("weight/"))),
}


@pytest.mark.fault("F6")
@pytest.mark.parametrize("change", HEADERS)
def test_a_shard_that_is_not_what_a_consistent_manifest_says(step: Path, change: str, figure: Figure) -> None:
    shard = next(file for file in shards(step) if any(key.startswith("weight/") for key in header(file)[0]))
    table, data = header(shard)
    HEADERS[change](table)
    write_header(shard, table, data)
    reseal(step)
    messages = Victim().refuses(step)
    assert all(shard.name in message for message in messages), messages
    figure(f"a shard with {change} than its manifest says refused by name")


STATES: dict[str, Change] = {
    "another step": lambda s: s.__setitem__("step", 7),
    "a negative number of updates": lambda s: corrupt_updates(s, -1),
    "updates that are text": lambda s: corrupt_updates(s, "2"),
    "an unknown key": lambda s: s.__setitem__("hook", 1),
    "no groups": lambda s: s.__setitem__("groups", {}),
    "no extra": lambda s: s.pop("extra"),
}


def corrupt_updates(state: dict[str, Any], value: Any) -> None:
    for entry in next(v for k, v in state.items() if k in ("parameters", "updates")).values():
        entry["updates"] = value


@pytest.mark.fault("F6")
@pytest.mark.parametrize("change", STATES)
def test_a_state_that_lies(step: Path, change: str, figure: Figure) -> None:
    state = json.loads((step / STATE).read_bytes())
    STATES[change](state)
    (step / STATE).write_text(json.dumps(state))
    reseal(step)
    assert all(STATE in message for message in Victim().refuses(step))
    figure(f"a state with {change} refused by name")
