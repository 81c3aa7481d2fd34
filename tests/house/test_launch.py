"""The launch files say exactly what they would run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LAUNCH = REPO / "launch"
SCRIPTS = ["deepspeed.sh", "elastic.sh", "local.sh", "slurm.sbatch"]
TRAIN = ["train", "configs/runs/a run.toml", "--name", "it's"]


def dry_run(script: str, **environment: str) -> list[str]:
    settings = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **environment}
    done = subprocess.run(
        [LAUNCH / script, *TRAIN], env=settings, capture_output=True, text=True, check=True, timeout=30
    )
    return shlex.split(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_are_executable(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True, timeout=30)
    assert os.access(LAUNCH / script, os.X_OK)
    assert "set -euo pipefail" in (LAUNCH / script).read_text()


def test_readme_describes_every_file() -> None:
    text = (LAUNCH / "README.md").read_text()
    assert [path.name for path in LAUNCH.iterdir() if path.name != "README.md" and f"`{path.name}`" not in text] == []


def test_local() -> None:
    assert dry_run("local.sh") == ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "distmuon", *TRAIN]
    assert "--nproc-per-node=8" in dry_run("local.sh", NPROC="8")


def test_local_runs_with_one_thread_per_rank_unless_told(tmp_path: Path) -> None:
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $*"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for given, expected in (({}, "1"), ({"OMP_NUM_THREADS": "4"}, "4")):
        done = subprocess.run(
            [LAUNCH / "local.sh", "plan"],
            env=environment | given,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        assert done.stdout == f"{expected} --standalone --nproc-per-node=2 -m distmuon plan\n"


def test_elastic() -> None:
    settings = {
        "NNODES": "2:4",
        "NPROC": "8",
        "MAX_RESTARTS": "5",
        "RDZV_ENDPOINT": "node-1:29500",
        "RDZV_ID": "7",
    }
    assert dry_run("elastic.sh", **settings) == [
        *("torchrun", "--nnodes=2:4", "--nproc-per-node=8", "--max-restarts=5", "--rdzv-backend=c10d"),
        *("--rdzv-endpoint=node-1:29500", "--rdzv-id=7", "-m", "distmuon", *TRAIN),
    ]
    assert {"--nnodes=1", "--nproc-per-node=2", "--max-restarts=3"} <= set(dry_run("elastic.sh"))


def test_deepspeed(tmp_path: Path) -> None:
    rest = ["--no_local_rank", "--module", "distmuon", *TRAIN]
    assert dry_run("deepspeed.sh", NPROC="4") == ["deepspeed", "--num_gpus", "4", *rest]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    assert dry_run("deepspeed.sh", HOSTFILE=str(hostfile)) == [
        "deepspeed",
        "--hostfile",
        str(hostfile),
        *rest,
    ]


def test_deepspeed_refuses_a_missing_hostfile() -> None:
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "HOSTFILE": "/nowhere/hostfile"}
    done = subprocess.run([LAUNCH / "deepspeed.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "HOSTFILE=/nowhere/hostfile is not a file" in done.stderr


def test_torchrun_and_deepspeed_accept_these_options() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    from torch.distributed.run import parse_args

    command = dry_run("elastic.sh", NNODES="2:4")
    parsed = parse_args(command[1:])
    assert (parsed.nnodes, parsed.max_restarts, parsed.module) == ("2:4", 3, True)
    assert [parsed.training_script, *parsed.training_script_args] == ["distmuon", *TRAIN]
    parsed = parse_args(dry_run("local.sh")[1:])
    assert (parsed.standalone, parsed.nproc_per_node, parsed.module) == (True, "2", True)
    parsed = runner.parse_args(dry_run("deepspeed.sh")[1:])
    assert (parsed.num_gpus, parsed.no_local_rank, parsed.module) == (2, True, True)
    assert [parsed.user_script, *parsed.user_args] == ["distmuon", *TRAIN]


def test_hostfile_example_is_one_for_deepspeed() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert dict(runner.fetch_hostfile(str(LAUNCH / "hostfile.example"))) == {"node-1": 8, "node-2": 8}


class Slurm:
    """Stand-ins for Slurm's programs that record their calls; a step ends when ``status`` appears."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.program("scontrol", '[[ "$1" != show ]] || printf "node-07\\nnode-08\\nnode-09\\n"')
        self.program("scancel", f'echo 0 >"{root}/status.new"; mv "{root}/status.new" "{root}/status"')
        self.program("srun", f'until [[ -f "{root}/status" ]]; do sleep 0.02; done; exit "$(cat "{root}/status")"')

    def program(self, name: str, body: str) -> None:
        path = self.root / name
        record = f'{{ printf "%q " {name} "$@"; echo; }} >>"{self.root}/log"'
        path.write_text(f"#!/usr/bin/env bash\n{record}\n{body}\n")
        path.chmod(0o755)

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        settings = {
            "PATH": f"{self.root}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node-[07-09]",
            "SLURM_GPUS_ON_NODE": "4",
            **environment,
        }
        process = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", *TRAIN], env=settings)
        deadline = time.monotonic() + 20
        while not any(call[0] == "srun" for call in self.calls()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return process

    def calls(self) -> list[list[str]]:
        log = self.root / "log"
        return [shlex.split(line) for line in log.read_text().splitlines()] if log.is_file() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_starts_one_agent_a_node_and_passes_the_status_on(slurm: Slurm, status: int) -> None:
    (slurm.root / "status").write_text(str(status))
    assert slurm.start(SLURM_RESTART_COUNT="2").wait(timeout=20) == status
    assert slurm.calls() == [
        ["scontrol", "show", "hostnames", "node-[07-09]"],
        [
            *(
                "srun",
                "--kill-on-bad-exit=1",
                "torchrun",
                "--nnodes=3",
                "--nproc-per-node=4",
                "--rdzv-backend=c10d",
            ),
            *("--rdzv-endpoint=node-07:23456", "--rdzv-id=123456-2", "-m", "distmuon", *TRAIN),
        ],
    ]


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_forwards_the_end_of_its_time_to_the_ranks(slurm: Slurm, sent: int, requeued: bool) -> None:
    process = slurm.start()
    process.send_signal(sent)
    assert process.wait(timeout=20) == 0
    expected = [["scancel", "--signal=TERM", "123456.0"]]
    if requeued:
        expected.append(["scontrol", "requeue", "123456"])
    assert slurm.calls()[2:] == expected


def test_slurm_asks_for_the_signal_it_traps_before_the_time_limit() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=B:USR1@300" in text
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --ntasks-per-node=1" in text
    # Slurm stops reading options at the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo pipefail")


def test_every_slurm_setting_has_its_reason_above_it_and_can_be_overridden() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    exports = [number for number, line in enumerate(lines) if line.startswith("export ")]
    assert len(exports) >= 5
    for number in exports:
        name = lines[number].removeprefix("export ").split("=")[0]
        assert f'"${{{name}:-' in lines[number]
        assert lines[number - 1].startswith(("# ", "export TORCH_FR_"))
