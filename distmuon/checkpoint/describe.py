"""What is in a checkpoint, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from distmuon.checkpoint.verify import Contents
from distmuon.config import printable

_LONGEST_VALUE = 60
_LONGEST_LINE = 500


def describe(contents: Contents) -> Iterator[str]:
    """Describe a checkpoint for a person; what somebody else wrote into it cannot move a terminal's cursor.

    Args:
        contents: what ``verify`` returned.

    Returns:
        Lines of text: the checkpoint, its kinds of tensors, its param groups, what else it keeps, every parameter.
    """
    return (printable(line, _LONGEST_LINE) for line in _lines(contents))


def _lines(contents: Contents) -> Iterator[str]:
    manifest, state = contents.manifest, contents.state
    size = sum(file.bytes for file in manifest.files.values())
    yield f"{contents.path} is whole: {len(manifest.files)} files, {size:,} bytes"
    yield f"step {contents.step}, ranks that saved it: {contents.world_size}, schema {manifest.schema_number}"
    yield ""
    yield f"{'section':14} {'tensors':>8} {'elements':>16} {'bytes':>16}"
    sections: dict[str, list[tuple[int, int]]] = {}
    for key, (dtype, shape) in contents.tensors.items():
        numel = math.prod(shape)
        sections.setdefault(key.partition("/")[0], []).append((numel, numel * getattr(torch, dtype).itemsize))
    for section, sizes in sorted(sections.items()):
        yield f"{section:14} {len(sizes):8,} {sum(n for n, _ in sizes):16,} {sum(b for _, b in sizes):16,}"
    for number, settings in enumerate(state.groups):
        names = [name for name, parameter in state.parameters.items() if parameter.group == number]
        updates = max((state.parameters[name].updates for name in names), default=0)
        yield ""
        yield f"param group {number}: parameters: {len(names)}, updates: {updates}"
        yield "  " + ", ".join(f"{key} = {value}" for key, value in sorted(settings.items()))
    if state.extra:
        yield ""
        yield "extra: " + ", ".join(f"{key} = {_short(value)}" for key, value in sorted(state.extra.items()))
    yield ""
    shown = {key: value for key, value in contents.tensors.items() if key.startswith(("weight/", "buffer/"))}
    width = max((len(key.partition("/")[2]) for key in shown), default=0)
    for key, (dtype, shape) in sorted(shown.items()):
        yield f"{key.partition('/')[2]:{width}} {dtype:9} {list(shape)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
