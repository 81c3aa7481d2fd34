"""The flags of ``distmuon plan``, and what they lead to."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from distmuon.bricks import Kind
from distmuon.coefficients import PresetName
from distmuon.config import ONLY_TRANSPORT, parse
from distmuon.errors import ConfigError
from distmuon.machine import Machine, Workload
from distmuon.ns_settings import NewtonSchulz
from distmuon.planner import default_bucket_numel
from distmuon.planning.model_file import Model, load_model
from distmuon.planning.outcome import Request, plan_world
from distmuon.planning.report import as_json, as_text
from distmuon.train.config import read_toml

_ITEMSIZE = {"fp32": 4, "bf16": 2}
_ABOUT = """Show what a model's placement costs before it is trained: who holds and computes what, bytes, state,
padding, and a predicted step, beside AdamW with ZeRO-1 and other placements of Muon."""


def plan_text(arguments: Sequence[str]) -> str:
    """Run ``distmuon plan``.

    Args:
        arguments: its flags.

    Returns:
        What it prints.

    Raises:
        ConfigError: a file or a value is not legal.
        SystemExit: from argparse, for --help and flags that do not exist.
    """
    flags = _parser().parse_args(arguments)
    model = load_model(Path(flags.model), flags.vocab, flags.router)
    machine = parse(Machine, read_toml(Path(flags.machine)), flags.machine) if flags.machine else Machine()
    ns = parse(NewtonSchulz, {"preset": flags.ns_preset}, "--ns-preset")
    if flags.plot:
        _check_plot(Path(flags.plot))
    with _without_collector():
        outcomes = [plan_world(_request(flags, model, machine, ns, world)) for world in _worlds(flags.world)]
    if flags.plot:
        from distmuon.planning.picture import draw

        try:
            draw(outcomes[-1], Path(flags.plot))
        except OSError as error:
            raise ConfigError(f"--plot {flags.plot} cannot be written: {error}.") from None
    if flags.json:
        return json.dumps(as_json(model, outcomes, flags.table), indent=1)
    return as_text(model, outcomes, flags.table) + (f"\npicture: {flags.plot}" if flags.plot else "")


def _check_plot(path: Path) -> None:
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--plot {path} is not legal: name a .png, .pdf or .svg file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}.") from None
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError(
            "--plot draws with matplotlib, which is not installed: pip install 'distmuon[train]'."
        ) from None


@contextmanager
def _without_collector() -> Iterator[None]:
    """Plans are millions of small tuples without cycles, through which the garbage collector would go in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _request(flags: argparse.Namespace, model: Model, machine: Machine, ns: NewtonSchulz, world: int) -> Request:
    """What is asked of one number of ranks, checked."""
    ep = model.default_ep(world) if flags.ep is None else flags.ep
    if ep < 1 or world % ep:
        legal = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0 and model.experts % n == 0)
        raise ConfigError(f"--ep {ep} does not divide --world {world}; use one of {legal}.")
    if flags.nodes is not None:
        if flags.nodes < 1 or world % flags.nodes:
            raise ConfigError(f"--nodes {flags.nodes} does not divide --world {world}; use a divisor of {world}.")
        machine = machine.model_copy(update={"ranks_per_node": world // flags.nodes})
    if flags.ranks_per_node is not None:
        machine = machine.model_copy(update={"ranks_per_node": flags.ranks_per_node})
    reduce_itemsize = _ITEMSIZE[flags.reduce_dtype]
    bucket_mb = flags.bucket_mb or default_bucket_numel(world, reduce_itemsize) * reduce_itemsize / 1e6
    params = model.parameters(ep)
    workload = Workload(
        tokens_per_rank=flags.tokens_per_rank,
        flops={param.spec.name: param.flops for param in params},
        reduce_itemsize=reduce_itemsize,
        param_itemsize=_ITEMSIZE[flags.dtype],
        piece_itemsize=4 if ns.dtype == "float32" else 2,
        overlap_forward=flags.overlap_forward,
    )
    policy, transport = flags.policy, flags.transport
    only = ONLY_TRANSPORT.get(policy, transport)
    if transport not in ("auto", only):
        raise ConfigError(f'--transport {transport} does not go with --policy {policy}; use "auto" or "{only}".')
    return Request(model.name, params, world, ep, bucket_mb, policy, transport, machine, workload, ns)


def _worlds(text: str) -> list[int]:
    try:
        worlds = [int(part) for part in text.split(",")]
    except ValueError:
        worlds = []
    if not worlds or min(worlds) < 1:
        raise ConfigError(f"--world {text!r} is not legal; give numbers of ranks, e.g. --world 8,64,1024.")
    return worlds


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distmuon plan", description=_ABOUT)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="FILE",
        help="model file, e.g. configs/models/llama3_8b.toml, or a training one",
    )
    add("--world", required=True, metavar="N[,N...]", help="numbers of ranks to plan for, comma-separated")
    add("--ep", type=int, metavar="N", help="ranks that share the experts of a block (default: the model file's)")
    nodes = parser.add_mutually_exclusive_group()
    nodes.add_argument("--nodes", type=int, metavar="N", help="nodes that the ranks are on (default: the machine's)")
    nodes.add_argument("--ranks-per-node", type=_positive, metavar="N", help="ranks on a node (default: the machine's)")
    add("--machine", metavar="FILE", help="machine file, see configs/machines (default: nodes of 8 H100, InfiniBand)")
    add("--policy", choices=("balanced", "flat", "team"), default="balanced", help="DistMuon's placement of matrices")
    add("--transport", choices=("auto", "scatter", "owner"), default="auto", help="equal shards, or of any length")
    bucket = "MB of a bucket (default: 25, or 10^6 elements a rank if that is more)"
    add("--bucket-mb", type=_above_zero, metavar="MB", help=bucket)
    add("--dtype", choices=tuple(_ITEMSIZE), default="bf16", help="of the parameters, and of the all-gather")
    add("--reduce-dtype", choices=tuple(_ITEMSIZE), default="fp32", help="in which gradients are summed")
    add("--tokens-per-rank", type=_positive, default=8192, metavar="N", help="of a rank's last forward and backward")
    add("--overlap-forward", action="store_true", help="leave all-gathers under way when the next forward starts")
    presets = [name for name in get_args(PresetName) if name != "custom"]
    add("--ns-preset", choices=presets, default="papers", help="Newton-Schulz coefficients")
    add("--router", choices=get_args(Kind), default="muon", help="rule of the experts' routers")
    add("--vocab", type=_positive, metavar="N", help="rows of the embedding (default: the model file's)")
    tables = "also print: the rule of every parameter, what every rank holds, or both"
    add("--table", choices=("routing", "placement", "all"), help=tables)
    add("--json", action="store_true", help="print JSON instead of text")
    add("--plot", metavar="FILE.png", help="draw what each rank holds and computes, for the last number of ranks")
    return parser
