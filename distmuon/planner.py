"""From shapes to a plan: who holds what, and who computes what.

Pure Python; no tensors, no process groups. ``make_plan`` is the one entry point.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from distmuon.bricks import Matrix, ParamSpec, split_matrices
from distmuon.config import ONLY_TRANSPORT
from distmuon.errors import ConfigError
from distmuon.iteration import Schedule
from distmuon.ns_settings import NewtonSchulz
from distmuon.owners import LEVEL, place_owners, team_runs, whole
from distmuon.placement import Piece, Run, Shards, place_balanced, place_flat
from distmuon.plan import BucketPlan, Plan, Policy, Transport
from distmuon.predict import Machine, Placed, Workload, predict
from distmuon.schedule import Fraction, flops, make_schedule

TransportChoice = Literal["auto", "scatter", "owner"]


def all_of_it(rows: int, inner: int) -> float:
    """A device that computes every element of a symmetric product, as plain torch does.

    Args:
        rows: rows of the product.
        inner: length of the sums.

    Returns:
        1.
    """
    return 1.0


class Work:
    """What Newton-Schulz costs, by shape.

    Args:
        ns: Newton-Schulz settings.
        fraction: part of a symmetric product that the device computes.
    """

    def __init__(self, ns: NewtonSchulz, fraction: Fraction) -> None:
        self._fraction = fraction
        self._ns = ns
        # A model has few shapes, and settings are dear to resolve.
        self._schedules: dict[tuple[int, int], Schedule] = {}

    def schedule(self, short: int, long: int) -> Schedule:
        """Steps for a shape.

        Args:
            short: the shorter side.
            long: the longer side, or a team's longest slice of it.

        Returns:
            The schedule.
        """
        if (short, long) not in self._schedules:
            self._schedules[short, long] = make_schedule(self._ns, short, long, self._fraction)
        return self._schedules[short, long]

    def of_shape(self, rows: int, cols: int) -> float:
        """FLOPs of orthogonalizing a matrix on one rank.

        Args:
            rows: number of its rows.
            cols: number of its columns.
        """
        short, long = sorted((rows, cols))
        return flops(short, long, self.schedule(short, long).segments, self._fraction)

    def of_slice(self, matrix: Matrix, ranks: int) -> float:
        """FLOPs of the largest of a team's slices.

        Args:
            matrix: what the team orthogonalizes.
            ranks: size of the team.
        """
        longest = -(-matrix.long // ranks)
        return flops(matrix.short, longest, self.schedule(matrix.short, longest).segments, self._fraction)

    def held(self, matrix: Matrix, pieces: dict[int, Piece], team: bool) -> Matrix:
        """Note who holds a matrix, and what each of them computes.

        Args:
            matrix: with its cost.
            pieces: a piece of it by rank.
            team: whether each rank computes its piece only.

        Returns:
            The matrix as a bucket lists it.
        """
        holders = tuple(pieces)
        if not team or len(holders) == 1:
            return replace(matrix, holders=holders, work=(matrix.cost,) * len(holders))
        slices = tuple(piece.length // matrix.short for piece in pieces.values())
        segments = self.schedule(matrix.short, max(slices)).segments
        work = tuple(flops(matrix.short, long, segments, self._fraction) for long in slices)
        return replace(matrix, holders=holders, slices=slices, work=work, rounds=len(segments))


def make_plan(
    params: Sequence[ParamSpec],
    world: int,
    policy: Policy = "balanced",
    bucket_numel: int | None = None,
    transport: TransportChoice = "auto",
    ns: NewtonSchulz | None = None,
    fraction: Fraction = all_of_it,
    loads: Sequence[float] = (),
) -> Plan:
    """Place parameters on ranks.

    Args:
        params: parameters in the order of the forward pass; buckets are formed from its end.
        world: number of ranks d, at least 1.
        policy: "flat" cuts the concatenated parameters into d equal shards; "balanced" keeps matrices whole and spreads
            their Newton-Schulz cost; "team" also divides matrices that would keep one rank busy for longer than others.
            The last two fill up with elementwise parameters until all ranks hold equally much.
        bucket_numel: elements after which a bucket is closed; None means ``default_bucket_numel``.
        transport: "scatter" makes the shards of every bucket equally long, for which buckets may have to grow, and
            cuts a matrix if even one bucket of everything has no equal shards of whole ones; "owner" lets shards of a
            bucket differ in length; "auto" takes what adds less to a step by the cost model of ``distmuon.predict``.
        ns: Newton-Schulz settings, which decide what a shape costs; None means ``NewtonSchulz()``.
        fraction: part of a symmetric product that the device computes.
        loads: FLOPs that each rank spends on other plans' matrices, to be levelled with; () for none.

    Returns:
        The plan. Padding is less than d elements per bucket, and none with "owner".

    Raises:
        ConfigError: unknown policy or transport, two that do not go together, or no ranks.
    """
    _check(world, policy, transport)
    bucket_numel = default_bucket_numel(world) if bucket_numel is None else bucket_numel
    _check_params(params, bucket_numel)
    loads = loads or [0.0] * world
    work = Work(ns or NewtonSchulz(), fraction)
    matrices = {index: split_matrices(index, spec, work.of_shape) for index, spec in enumerate(params)}
    runs = [_runs(index, spec, matrices[index]) for index, spec in enumerate(params)][::-1]

    def plan(shards: list[Shards], transport: Transport) -> Plan:
        buckets = tuple(_bucket(one, matrices, work, transport == "owner") for one in shards)
        return Plan(policy, transport, world, bucket_numel, tuple(params), buckets)

    if policy == "flat":
        return plan(place_flat(runs, world, bucket_numel), "scatter")
    if policy == "team":
        cut = team_runs([m for found in matrices.values() for m in found], loads, work.of_slice)
        runs = [[slice_ for m in found for slice_ in cut[m]] for found in matrices.values()]
        runs = [of_one or _runs(index, params[index], []) for index, of_one in enumerate(runs)][::-1]
        return plan(place_owners(runs, loads, bucket_numel), "owner")
    if transport == "owner":
        return plan(place_owners(runs, loads, bucket_numel), "owner")
    scattered = plan(place_balanced(runs, loads, bucket_numel), "scatter")
    if transport == "scatter":
        return scattered
    return choose(scattered, plan(place_owners(runs, loads, bucket_numel), "owner"))


def choose(scattered: Plan, owned: Plan) -> Plan:
    """Decide between the transports as ``transport = "auto"`` does.

    Args:
        scattered: a plan with equal shards.
        owned: the plan of the same parameters with shards of any length.

    Returns:
        The one whose optimizer adds less to a step on the default machine, unless the first has to cut matrices or
        keeps a rank busy for longer.
    """
    if any(matrix.cut for matrix in scattered.matrices):
        return owned
    if scattered.busiest_over_mean > max(LEVEL, owned.busiest_over_mean):
        return owned
    machine, workload = Machine(), Workload()
    seconds = [predict([Placed(plan)], machine, workload).optimizer for plan in (scattered, owned)]
    return scattered if seconds[0] <= seconds[1] else owned


def default_bucket_numel(world: int, itemsize: int = 4) -> int:
    """Elements of a bucket where nobody says otherwise.

    Args:
        world: number of ranks.
        itemsize: bytes per element of the reduction.

    Returns:
        25 MB, or a million elements a rank if that is more: with less, the latency of a long ring takes longer than
        its bytes.

    Source: PyTorch DistributedDataParallel (25 MB), Megatron-LM (10^6 elements a rank).
    """
    return max(25_000_000 // itemsize, 1_000_000 * world)


def _check(world: int, policy: Policy, transport: TransportChoice) -> None:
    if world < 1:
        raise ConfigError(f"world = {world} is not legal: a plan needs at least 1 rank.")
    if policy not in get_args(Policy):
        raise ConfigError(f'policy = {policy!r} is not legal: use "balanced", "flat" or "team".')
    if transport not in get_args(TransportChoice):
        raise ConfigError(f'transport = {transport!r} is not legal: use "auto", "scatter" or "owner".')
    only = ONLY_TRANSPORT.get(policy, transport)
    if transport not in ("auto", only):
        raise ConfigError(f'transport = "{transport}" does not go with policy = "{policy}": use "auto" or "{only}".')


def _check_params(params: Sequence[ParamSpec], bucket_numel: int) -> None:
    if bucket_numel < 1:
        raise ConfigError(f"bucket_numel = {bucket_numel} is not legal: a bucket has at least 1 element.")
    for spec in params:
        if spec.kind == "muon" and (len(spec.shape) < 2 or sum(spec.split or spec.shape[-2:-1]) != spec.shape[-2]):
            raise ConfigError(
                f'"{spec.name}" of shape {spec.shape}, split into {spec.split or "one block"}, is not legal with kind '
                '"muon": it takes [..., A, B] and blocks of rows that add up to A.'
            )


def _runs(index: int, spec: ParamSpec, matrices: Sequence[Matrix]) -> list[Run]:
    if matrices:
        return [whole(matrix) for matrix in matrices]
    return [Run(index, 0, spec.numel, 0)] if spec.numel else []


def _bucket(shards: Shards, matrices: dict[int, list[Matrix]], work: Work, teams: bool) -> BucketPlan:
    """Find out which ranks have a piece of each matrix."""
    touched = {piece.param for shard in shards.pieces for piece in shard}
    begins = {param: [matrix.start for matrix in matrices[param]] for param in touched}
    # (parameter, number of its matrix) -> a piece of it by rank.
    found: dict[tuple[int, int], dict[int, Piece]] = {}
    for rank, shard in enumerate(shards.pieces):
        for piece in shard:
            starts = begins[piece.param]
            end = piece.start + 1 if piece.width else piece.end
            place = bisect_right(starts, piece.start) - 1
            while 0 <= place < len(starts) and starts[place] < end:
                found.setdefault((piece.param, place), {}).setdefault(rank, piece)
                place += 1
    held = tuple(work.held(matrices[param][place], pieces, teams) for (param, place), pieces in sorted(found.items()))
    return BucketPlan(tuple(shards.lengths), tuple(tuple(shard) for shard in shards.pieces), held)
