"""Writes a golden checkpoint: ``python -m tests.golden.make`` from the repository's root, once for every schema number.

What it holds is a function of this file, so that a test can compute it anew on any later version.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from distmuon import checkpoint
from tests.checkpoint.scene import Model, Shapes, Spec, Way, build
from tests.ranks import run_threads

HERE = Path(__file__).parent
STEP, WORLD = 100, 2
SHAPES: Shapes = {
    "embed": ((12, 4), "adamw"),
    "tall": ((10, 6), "muon"),
    "experts": ((3, 4, 5), "muon"),
    "norm": ((7,), "adamw"),
    "gain": ((), "adamw"),
}
SPEC = Spec(SHAPES, dtype="bfloat16", dtypes={"tall": "float32", "norm": "float16"}, apart=("norm",))
EXTRA = {"epoch": 3, "position": [17, 0.1], "text": "\u00e9"}


def exact(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values that every machine computes alike: small multiples of 1/64."""
    start = sum(name.encode())
    numel = torch.Size(shape).numel()
    return (((torch.arange(numel) * 37 + start * 11) % 97 - 48) / 64).reshape(shape)


def values(key: str, like: torch.Tensor) -> torch.Tensor:
    """What the checkpoint has under a name."""
    if like.is_floating_point():
        return exact(key, tuple(like.shape)).abs().to(like.dtype)
    return (exact(key, tuple(like.shape)) * 64).to(like.dtype)


def fill(model: Model) -> None:
    """Give weights and buffers their values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(f"weight/{name}", parameter))
        for name in ("running", "counts", "even", "rough"):
            buffer = model.get_buffer(name)
            buffer.copy_(values(f"buffer/{name}", buffer))


def write(rank: int, world: int, folder: Path) -> None:
    """Fill this rank's shards by name and place, and save."""
    model, opt = build(SPEC, Way(world, "flat"))
    fill(model)
    names = {id(p): name for name, p in model.named_parameters()}
    for reduction in opt.reductions:
        bucket, second = reduction.bucket, 0
        for piece in bucket.plan.pieces[bucket.rank]:
            param = bucket.params[piece.param]
            for section, shard in bucket.state().items():
                if section == "second_moment" and param.kind != "adamw":
                    continue
                offset = second if section == "second_moment" else piece.offset
                key = f"{section}/{names[id(param.tensor)]}"
                whole = values(key, torch.empty(param.tensor.shape)).flatten()
                shard[offset : offset + piece.length] = whole[piece.start : piece.start + piece.length]
            second += piece.length if param.kind == "adamw" else 0
        bucket.updates = dict.fromkeys(bucket.updates, STEP - 1)
    for number, group in enumerate(opt.param_groups):
        group["lr"] = 0.25 / (number + 1)
    checkpoint.save(folder, model, opt, step=STEP, extra=EXTRA)


def main() -> None:
    """Write the checkpoint of this version's schema beside this file."""
    folder = HERE / "new"
    shutil.rmtree(folder, ignore_errors=True)
    run_threads(WORLD, write, folder)
    content = json.loads((folder / f"step_{STEP:08d}" / "manifest.json").read_bytes())["body"]
    target = HERE / f"schema_{content['schema_number']}"
    assert not target.exists(), f"{target} is there: a golden checkpoint is never written anew"
    folder.rename(target)


if __name__ == "__main__":
    main()
