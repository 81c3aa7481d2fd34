"""A model on one number of ranks: every layout planned and compared, one of them chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distmuon.machine import Machine, Workload
from distmuon.ns_settings import NewtonSchulz
from distmuon.owners import LEVEL
from distmuon.plan import Policy
from distmuon.planner import TransportChoice, choose
from distmuon.planning.compare import Row, compare, place
from distmuon.planning.holdings import Holdings, holdings
from distmuon.planning.layouts import CHOICES, LayoutName, adamw, layout
from distmuon.planning.parameters import PlannedParam
from distmuon.predict import Placed


@dataclass(frozen=True)
class Request:
    """What is to be planned for one number of ranks."""

    model: str
    params: Sequence[PlannedParam]
    world: int
    ep: int
    bucket_mb: float
    policy: Policy
    transport: TransportChoice
    machine: Machine
    workload: Workload
    ns: NewtonSchulz

    @property
    def bucket_numel(self) -> int:
        """Elements of a bucket."""
        return max(1, int(self.bucket_mb * 1e6) // self.workload.reduce_itemsize)


@dataclass(frozen=True)
class Outcome:
    """The comparison, and the chosen layout rank by rank."""

    request: Request
    rows: Sequence[Row]
    chosen: LayoutName
    held: Holdings
    """Of the chosen layout."""

    @property
    def row(self) -> Row:
        """The chosen layout's row."""
        return next(row for row in self.rows if row.layout == self.chosen)


def plan_world(request: Request) -> Outcome:
    """Plan and compare every layout.

    Args:
        request: the model, the ranks and the machine.

    Returns:
        The comparison, with what DistMuon would choose.
    """
    found = {name: _Planned(request, name) for name in ("flat", "scatter", "owner")}
    rows = {name: planned.row for name, planned in found.items()}
    plans, held = adamw(found["flat"].plans, found["flat"].held)
    rows["adamw"] = compare(CHOICES["adamw"], plans, held, request.machine, request.workload)
    rows["padded"] = _Planned(request, "padded").row
    if all(plan.busiest_over_mean <= LEVEL for plan, _ in found["owner"].plans):
        # Teams cut nothing then.
        found["team"] = found["owner"]
        rows["team"] = replace(rows["owner"], layout="team", what=CHOICES["team"].what)
    else:
        found["team"] = _Planned(request, "team")
        rows["team"] = found["team"].row
    chosen: LayoutName = "scatter" if request.transport == "scatter" else "owner"
    if request.policy != "balanced":
        chosen = request.policy
    elif request.transport == "auto":
        pairs = zip(found["scatter"].plans, found["owner"].plans, strict=True)
        plans = [transported(scattered, owned) for scattered, owned in pairs]
        transports = {plan.transport for plan, _ in plans}
        chosen = transports.pop() if len(transports) == 1 else "mixed"
        if chosen == "mixed":
            found["mixed"] = _Planned(request, "mixed", plans)
            rows["mixed"] = found["mixed"].row
    return Outcome(request, [rows[name] for name in CHOICES if name in rows], chosen, found[chosen].held)


def ranks(count: int) -> str:
    """Say how many ranks there are.

    Args:
        count: the number.
    """
    return f"{count} rank{'s' if count > 1 else ''}"


def transported(scattered: Placed, owned: Placed) -> Placed:
    """Choose the transport of one group as ``make_plan`` does with transport = "auto".

    Args:
        scattered: the group's plan over equal shards.
        owned: its plan over shards of any length.

    Returns:
        One of them.
    """
    return scattered if choose(scattered.plan, owned.plan) is scattered.plan else owned


class _Planned:
    """A layout, planned."""

    def __init__(self, request: Request, name: LayoutName, plans: list[Placed] | None = None) -> None:
        if plans is None:
            how = layout(name, request.ns)
            plans = place(request.params, how, request.world, request.ep, request.bucket_numel)
        self.plans = plans
        self.held = holdings(plans, request.params)
        self.row = compare(CHOICES[name], plans, self.held, request.machine, request.workload)
