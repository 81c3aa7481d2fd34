"""Runs that are killed, preempted or continued on other ranks, started as users start them."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from distmuon.checkpoint import verify
from tests.train.launched import REPO, UPDATES, Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Figure = Callable[[str], None]

# Read by every Python that a launcher starts: what happens in the seventh update of a rank.
FAULTS = """
import os, signal, time
from pathlib import Path
from wrapt import register_post_import_hook

def patch(module):
    original = module.Trainer._update
    def update(self, *args):
        mark = Path(os.environ["MARK"])
        if self.done == 6 and self.rank == 1 and not mark.exists():
            mark.write_text(repr(time.time()))
            if os.environ["FAULT"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            # The parent of torchrun, which is a child of the launch script.
            os.kill(int(Path(f"/proc/{os.getppid()}/stat").read_text().split()[3]), signal.SIGTERM)
            time.sleep(2)
        return original(self, *args)
    module.Trainer._update = update

if os.environ.get("FAULT"):
    register_post_import_hook(patch, "distmuon.train.loop")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("restarts")
    (folder / "sitecustomize.py").write_text(FAULTS)
    return Site(folder)


def launch(
    site: Site, name: str, flags: str = "", fault: str = "", script: str = "local.sh", **environment: str
) -> None:
    """Run a launch script to its good end."""
    settings = {"FAULT": fault, "MARK": str(site.path / name), "PYTHONPATH": f"{site.path}:{REPO}", **environment}
    flags = f"--checkpoint.every 2 --resume auto {flags}"
    done = site.train(name, [str(REPO / "launch" / script)], flags, **settings)
    assert done.returncode == 0, done.err


def losses(site: Site, name: str) -> list[float]:
    return [record.loss for record in site.metrics(name).steps.values()]


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> list[float]:
    launch(site, "undisturbed")
    found = losses(site, "undisturbed")
    assert len(found) == UPDATES
    return found


@pytest.mark.fault("F2")
def test_a_killed_rank_restarts_all_and_no_loss_differs(site: Site, undisturbed: list[float], figure: Figure) -> None:
    """torchrun starts both ranks again; the run goes on from its last whole checkpoint."""
    launch(site, "killed", "", "kill", "elastic.sh", MAX_RESTARTS="1", RDZV_ENDPOINT="localhost:0")
    assert losses(site, "killed") == undisturbed
    metrics = site.metrics("killed")
    assert metrics.starts == 2
    assert metrics.final is not None
    assert metrics.run is not None
    killed = float((site.path / "killed").read_text())
    seconds = datetime.fromisoformat(metrics.run.started).timestamp() - killed
    figure(
        f"SIGKILL in update 7: training again after {max(0.0, seconds):.0f} s, {UPDATES} of {UPDATES} losses bit-equal"
    )


@pytest.mark.fault("F22")
def test_sigterm_to_the_launcher_saves_and_exits_with_zero(
    site: Site, undisturbed: list[float], figure: Figure
) -> None:
    """The script's own status says that all is well, and the rest of the run is what it would have been."""
    launch(site, "preempted", "", "stop")
    seconds = time.time() - float((site.path / "preempted").read_text())
    stopped = verify(site.path / "runs" / "preempted" / "checkpoints")
    assert 7 <= stopped.step < UPDATES
    assert list(site.metrics("preempted").steps) == list(range(1, stopped.step + 1))
    assert seconds <= 30
    launch(site, "preempted", " ", "stop")
    assert losses(site, "preempted") == undisturbed
    figure(f"SIGTERM in update 7: saved after update {stopped.step}, status 0 after {seconds:.1f} s; losses bit-equal")


@pytest.mark.fault("F8", "F9")
def test_a_run_goes_on_with_another_number_of_ranks(site: Site, undisturbed: list[float], figure: Figure) -> None:
    """Two ranks begin, one goes on; the sums of gradients differ in their order, and nothing else."""
    launch(site, "shrunk", "", "stop")
    launch(site, "shrunk", "--optimizer.policy flat", "stop", NPROC="1")
    found = losses(site, "shrunk")
    assert found[:7] == undisturbed[:7]
    worst = max(abs(one - two) for one, two in zip(found, undisturbed, strict=True))
    assert worst < 2e-3
    figure(f"2 ranks balanced, then 1 rank flat: losses of the last 5 updates differ by at most {worst:.1e}")


def test_every_checkpoint_of_a_run_is_whole(site: Site, undisturbed: list[float]) -> None:
    folder: Path = site.path / "runs" / "undisturbed" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step_00000010", "step_00000012"]
    contents = verify(folder)
    assert (contents.step, contents.world_size) == (UPDATES, 2)
    assert {name.partition("/")[0] for name in contents.tensors} >= {"weight", "first_moment", "second_moment", "rng"}
