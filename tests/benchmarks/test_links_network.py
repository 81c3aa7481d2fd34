"""Networks of namespaces: the commands, what a limited link carries, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distmuon.benchmarks import links_probe, namespaces
from distmuon.benchmarks.links_ranks import environment, started
from distmuon.benchmarks.namespaces import Network, NotPermittedError, isolated, make_commands, rate_commands

NET = Network("net", 2)
MBIT = 1e6

PROBE = f"""
import sys, time
sys.path.insert(0, {str(Path(links_probe.__file__).parent)!r})
import links_probe
ring = links_probe.Ring(int(sys.argv[1]), sys.argv[2].split(","))
seconds = [ring.transfer(int(sys.argv[3])) for _ in range(3)]
print(sorted(seconds)[1])
"""
ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        with isolated(2) as made:
            yield made
    except NotPermittedError as error:
        pytest.skip(f"no network namespaces here: {error}")


def existing() -> set[str]:
    folder = Path("/run/netns")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_names_and_addresses() -> None:
    assert NET.namespaces() == ["net-hub", "net-0", "net-1"]
    assert NET.inside(1, ["true"]) == ["ip", "netns", "exec", "net-1", "true"]
    many = Network("net", 600)
    addresses = [many.address(rank) for rank in range(600)]
    assert addresses[:2] == ["10.0.0.1", "10.0.0.2"]
    assert len(set(addresses)) == 600
    assert not any(address.endswith((".0", ".255")) for address in addresses)


def test_every_rank_is_joined_to_the_bridge() -> None:
    commands = [" ".join(command) for command in make_commands(NET)]
    assert commands[:3] == ["ip netns add net-hub", "ip netns add net-0", "ip netns add net-1"]
    assert "ip -n net-1 link add eth0 type veth peer name port1 netns net-hub" in commands
    assert "ip -n net-1 address add 10.0.0.2/16 dev eth0" in commands
    assert "ip -n net-hub link set port1 master bridge up" in commands
    # Without a namespace a command would change the host.
    assert all(command.startswith(("ip -n net-", "ip netns add net-")) for command in commands)


def test_links_are_limited_in_both_directions() -> None:
    commands = rate_commands(NET, 3e8)
    assert [command[2:7] for command in commands] == [
        ["net-0", "qdisc", "replace", "dev", "eth0"],
        ["net-1", "qdisc", "replace", "dev", "eth0"],
        ["net-hub", "qdisc", "replace", "dev", "port0"],
        ["net-hub", "qdisc", "replace", "dev", "port1"],
    ]
    assert commands[0][7:13] == ["root", "tbf", "rate", "300000000bit", "burst", "131072"]
    assert rate_commands(NET, None)[0][7:] == ["root", "noqueue"]


@pytest.mark.parametrize(("bits", "burst"), [(1e6, 131072), (1e9, 131072), (10e9, 1250000)])
def test_a_burst_holds_a_packet_and_a_millisecond(bits: float, burst: int) -> None:
    command = rate_commands(NET, bits)[0]
    assert command[command.index("burst") + 1] == str(burst)


def test_a_rank_knows_its_place() -> None:
    found = environment(NET, 1)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "2", "10.0.0.1")
    assert found["GLOO_SOCKET_IFNAME"] == "eth0"


def test_without_iproute2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "_SYSTEM_PATHS", "/nowhere")
    with pytest.raises(NotPermittedError, match='"ip" is not installed; it comes with iproute2'), isolated(2):
        pass


def test_what_was_made_is_removed_when_a_later_command_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str]) -> None:
        ran.append(command)
        if "veth" in command:
            raise NotPermittedError("no veth")

    monkeypatch.setattr(namespaces, "_run", run)
    monkeypatch.setattr(namespaces.shutil, "which", lambda *_, **__: "/sbin/ip")
    with pytest.raises(NotPermittedError, match="no veth"), isolated(2):
        pass
    added = [command[3] for command in ran if command[:3] == ["ip", "netns", "add"]]
    assert len(added) == 3
    assert [command[3] for command in ran if command[:3] == ["ip", "netns", "delete"]] == added


def test_a_link_carries_its_rate_less_headers(network: Network) -> None:
    network.set_rate(50 * MBIT)
    count = 1_500_000
    addresses = ",".join(network.address(rank) for rank in range(2))
    commands = [
        network.inside(rank, [sys.executable, "-c", PROBE, str(rank), addresses, str(count)]) for rank in range(2)
    ]
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for command in commands]
    answers = [process.communicate(timeout=30)[0] for process in processes]
    for answer in answers:
        # Of 1514 bytes on the wire 1448 are data; what a burst lends is little.
        assert 8 * count / float(answer) == pytest.approx(50 * MBIT * 1448 / 1514, rel=0.1)


def test_ranks_answer_and_the_end_of_one_is_told(network: Network) -> None:
    with started(network, [sys.executable, "-c", ECHO]) as ranks:
        assert ranks.all(do="something", count=3) == [{"do": "something", "count": 3}] * 2
    failing = [sys.executable, "-c", "raise SystemExit('out of memory')"]
    with started(network, failing) as ranks, pytest.raises(RuntimeError, match="rank 0 has ended:\nout of memory"):
        ranks.all(do="something")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_exception(network: Network, error: type[BaseException]) -> None:
    made: set[str] = set()

    def fail() -> None:
        with isolated(1) as second:
            made.update(second.namespaces())
            assert made <= existing()
            raise error

    with pytest.raises(error):
        fail()
    assert len(made) == 2
    assert not made & existing()
    assert set(network.namespaces()) <= existing()


def test_nothing_is_left_after_termination(network: Network) -> None:
    code = "import time\nfrom distmuon.benchmarks.namespaces import isolated\n"
    code += "with isolated(1) as n:\n    print(n.prefix, flush=True)\n    time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    prefix = process.stdout.readline().strip()
    assert f"{prefix}-hub" in existing()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not any(name.startswith(prefix) for name in existing())
    process.stdout.close()
