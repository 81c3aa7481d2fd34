"""How exact every Newton-Schulz preset is, in both forms and all precisions, beside torch's and DeepSpeed's functions.

    distmuon bench accuracy [--json benchmarks/results/ns_accuracy.json]

The matrices are those of ``distmuon.benchmarks.matrices``: 72 hard ones, 16 that one direction dominates, and Gaussian
ones.
FLOPs are counted at 1024x4096 with every product in full and divided by those of the papers' five plain steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from distmuon.benchmarks import places
from distmuon.benchmarks.matrices import DOMINATED, HARD, Accuracy, Sample, gaussian, measure, sample, samples
from distmuon.benchmarks.ns_candidates import DEEPSPEED, STOCK, Shape, deepspeed, stock
from distmuon.coefficients import PresetName
from distmuon.newton_schulz import orthogonalize
from distmuon.ns_settings import NewtonSchulz
from distmuon.schedule import flops, make_schedule

RESULTS = places.RESULTS / "ns_accuracy.json"
PRESETS = [name for name in get_args(PresetName) if name not in ("optimal", "custom")]
DTYPES = ("bfloat16", "float16", "float32")
GAUSSIAN = ((512, 512), (512, 2048), (1024, 4096))
COUNTED = (1024, 4096)


@dataclass(frozen=True)
class Method:
    """A function to judge and what its record says about it."""

    preset: str
    form: str
    dtype: str
    segments: tuple[int, ...]
    function: Callable[[Tensor], Tensor]

    @property
    def flops_ratio(self) -> float:
        """FLOPs at 1024x4096 relative to the papers' five plain steps."""
        return count(self.segments) / count((1,) * 5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge all methods, write the records and print the table."""
    parser = argparse.ArgumentParser(
        prog="distmuon bench accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="file for the records")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sets = {"set72": samples(HARD), "dominated16": samples(DOMINATED)}
    gaussians = [sample(gaussian, rows, cols, seed=0) for rows, cols in GAUSSIAN]
    records = [judge(method, sets, gaussians) for method in tqdm([*ours(), *rivals()], desc="methods")]
    places.write(options.json, json.dumps(records, indent=1, allow_nan=False) + "\n")
    print(table(records))
    return 0


def ours() -> list[Method]:
    """Every preset in every form and precision that its settings allow."""
    methods = []
    for preset in PRESETS:
        for form in ("plain", "gram"):
            for dtype in DTYPES:
                try:
                    ns = NewtonSchulz.model_validate({"preset": preset, "form": form, "dtype": dtype})
                except ValidationError:
                    continue
                segments = make_schedule(ns, *COUNTED, in_full).segments
                methods.append(Method(preset, form, dtype, segments, functools.partial(orthogonalize, ns=ns)))
    return methods


def rivals() -> list[Method]:
    """The functions of torch's and DeepSpeed's own Muon, with their defaults."""
    theirs = deepspeed(Shape(1, *COUNTED))
    return [
        Method(STOCK, "plain", "bfloat16", (1,) * 5, stock),
        *(
            Method(DEEPSPEED, form, str(one.dtype).removeprefix("torch."), one.segments or (1,) * 5, one.function)
            for form, one in zip(("plain", "gram"), theirs, strict=True)
        ),
    ]


def judge(method: Method, sets: dict[str, list[Sample]], gaussians: Sequence[Sample]) -> dict[str, Any]:
    """Run a method on all matrices."""
    record: dict[str, Any] = {
        "preset": method.preset,
        "form": method.form,
        "dtype": method.dtype,
        "steps": sum(method.segments),
        "restarts": list(accumulate(method.segments))[:-1] if method.form == "gram" else [],
        "flops_ratio": method.flops_ratio,
        "gaussian": {},
    }
    for one in gaussians:
        found = asdict(measure(one, method.function(one.x_MN)))
        shape = "x".join(map(str, one.x_MN.shape))
        record["gaussian"][shape] = {key: finite(value) for key, value in found.items()}
    for name, members in sets.items():
        record[name] = summary([(one.name, measure(one, method.function(one.x_MN))) for one in members])
    return record


def summary(found: Sequence[tuple[str, Accuracy]]) -> dict[str, Any]:
    """The worst and the mean of a set of matrices."""
    worst, accuracy = max(found, key=lambda pair: pair[1].rms_resolved)
    return {
        "worst_rms": finite(accuracy.rms_resolved),
        "worst_matrix": worst,
        "mean_rms": finite(statistics.fmean(a.rms_resolved for _, a in found)),
        "sigma_max": finite(max(a.sigma_max for _, a in found)),
        "mean_orthogonality": finite(statistics.fmean(a.orthogonality for _, a in found)),
    }


def count(segments: Sequence[int]) -> float:
    """Floating-point operations at 1024x4096."""
    return flops(*COUNTED, segments, in_full)


def in_full(rows: int, inner: int) -> float:
    """No product makes use of its symmetry."""
    return 1.0


def finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    columns = (
        "| preset | form | dtype | steps | FLOPs | worst rms | mean rms | sigma max | dominated rms | Gauss orth. |"
    )
    lines = [columns, "|---" * (columns.count("|") - 1) + "|"]
    for r in records:
        numbers = [r["set72"]["worst_rms"], r["set72"]["mean_rms"], r["set72"]["sigma_max"]]
        numbers += [r["dominated16"]["worst_rms"], r["gaussian"]["x".join(map(str, COUNTED))]["orthogonality"]]
        shown = " | ".join("infinite" if number is None else f"{number:.4f}" for number in numbers)
        lines.append(
            f"| {r['preset']} | {r['form']} | {r['dtype']} | {r['steps']} | {r['flops_ratio']:.2f} | {shown} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
