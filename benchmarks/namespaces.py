"""A small network of its own for every run: one namespace a rank, joined by rate-limited links to a bridge.

The bridge has a namespace too, so that the host's own network is left as it is. Needs iproute2 and root.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

INTERFACE = "eth0"
# Kernels hand packets of up to 64 KiB to a link; a smaller bucket would cut each of them up.
_LEAST_BURST = 128 * 1024
# Long enough for the timers that refill a token bucket, short enough to give nothing away after a pause.
_BURST_SECONDS = 1e-3
# More than all sockets of a rank may have under way, so that nothing is dropped.
_QUEUE_BYTES = 256 * 2**20
_TRIAL_BITS = 1e9
_SYSTEM_PATHS = "/usr/sbin:/sbin:/usr/bin:/bin"


class NotPermittedError(RuntimeError):
    """This machine does not let us make namespaces, links or rate limits."""


@dataclass(frozen=True)
class Network:
    """Names and addresses of a network.

    Args:
        prefix: what all its namespaces begin with, new for every network.
        ranks: number of ranks.
    """

    prefix: str
    ranks: int

    @property
    def hub(self) -> str:
        """Namespace of the bridge."""
        return f"{self.prefix}-hub"

    def namespace(self, rank: int) -> str:
        """Namespace of a rank."""
        return f"{self.prefix}-{rank}"

    def namespaces(self) -> list[str]:
        """All namespaces."""
        return [self.hub, *(self.namespace(rank) for rank in range(self.ranks))]

    def address(self, rank: int) -> str:
        """IPv4 address of a rank; other networks may use the same one."""
        return f"10.0.{rank // 250}.{rank % 250 + 1}"

    def inside(self, rank: int, command: Sequence[str]) -> list[str]:
        """Say a command so that it runs in a rank's namespace."""
        return ["ip", "netns", "exec", self.namespace(rank), *command]

    def set_rate(self, bits: float | None) -> None:
        """Limit every link in both directions.

        Args:
            bits: bits per second, counted with headers; None lifts the limit.

        Raises:
            NotPermittedError: tc refuses.
        """
        for command in rate_commands(self, bits):
            _run(command)


def make_commands(network: Network) -> list[list[str]]:
    """Say how a network is made.

    Args:
        network: the network.

    Returns:
        Commands, in order.
    """
    hub = network.hub
    commands = [["ip", "netns", "add", name] for name in network.namespaces()]
    commands.append(["ip", "-n", hub, "link", "add", "bridge", "type", "bridge"])
    commands.append(["ip", "-n", hub, "link", "set", "bridge", "up"])
    for rank in range(network.ranks):
        own, port = network.namespace(rank), f"port{rank}"
        commands += [
            ["ip", "-n", own, "link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", hub],
            ["ip", "-n", own, "address", "add", f"{network.address(rank)}/16", "dev", INTERFACE],
            ["ip", "-n", own, "link", "set", "lo", "up"],
            ["ip", "-n", own, "link", "set", INTERFACE, "up"],
            ["ip", "-n", hub, "link", "set", port, "master", "bridge", "up"],
            # Without losses Reno fills the link and stays there; others probe for a limit that never moves.
            ["ip", "-n", own, "route", "replace", "10.0.0.0/16", "dev", INTERFACE, "congctl", "reno"],
        ]
    return commands


def rate_commands(network: Network, bits: float | None) -> list[list[str]]:
    """Say how all links are limited.

    Args:
        network: the network.
        bits: bits per second; None lifts the limit.

    Returns:
        Commands, one for either end of every link.
    """
    ends = [(network.namespace(rank), INTERFACE) for rank in range(network.ranks)]
    ends += [(network.hub, f"port{rank}") for rank in range(network.ranks)]
    if bits is None:
        # Replacing works where there is nothing to delete.
        qdisc = ["noqueue"]
    else:
        burst = max(_LEAST_BURST, round(bits / 8 * _BURST_SECONDS))
        qdisc = ["tbf", "rate", f"{round(bits)}bit", "burst", str(burst), "limit", str(_QUEUE_BYTES)]
    return [["tc", "-n", name, "qdisc", "replace", "dev", device, "root", *qdisc] for name, device in ends]


@contextlib.contextmanager
def isolated(ranks: int) -> Iterator[Network]:
    """Make a network, and remove it whatever happens, a SIGTERM or Ctrl-C included.

    Args:
        ranks: number of ranks.

    Yields:
        The network, unlimited.

    Raises:
        NotPermittedError: this machine does not let us; nothing is left behind.
    """
    for program in ("ip", "tc"):
        if shutil.which(program, path=_SYSTEM_PATHS) is None:
            raise NotPermittedError(f'"{program}" is not installed; it comes with iproute2')
    network = Network(f"links-{secrets.token_hex(4)}", ranks)
    with _terminated_like_interrupted():
        try:
            for command in make_commands(network):
                _run(command)
            # Kernels without tbf shall say so now.
            network.set_rate(_TRIAL_BITS)
            network.set_rate(None)
            yield network
        finally:
            _remove(network)


def _remove(network: Network) -> None:
    """Remove a network's own namespaces, those that exist; their links go with them."""
    with _ignored(signal.SIGINT, signal.SIGTERM):
        for name in network.namespaces():
            with contextlib.suppress(NotPermittedError):
                _run(["ip", "netns", "delete", name])


def _run(command: Sequence[str]) -> None:
    # A session of its own, or a Ctrl-C would end a command halfway.
    done = subprocess.run(  # noqa: S603
        command, env={"PATH": _SYSTEM_PATHS}, capture_output=True, text=True, start_new_session=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise NotPermittedError(f'"{" ".join(command)}" says "{said[-1]}"')


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _ignored(*numbers: signal.Signals) -> Iterator[None]:
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
