"""Runs that a launcher starts again: submitit's local executor after a signal, torchrun after a killed process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from submitit import LocalExecutor
from test_distributed import free_port, group, run_processes, values
from test_train import assert_same_run, changed, config, log_of, write_images

from dino_simpool.checkpoint import read_state
from dino_simpool.config import TrainConfig, dump
from dino_simpool.submit import ResumableJob
from dino_simpool.train import train

pytestmark = pytest.mark.filterwarnings("ignore:k = 200 is more")
STEPS = 34


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The run of two processes that nothing interrupted."""
    root = tmp_path_factory.mktemp("reference")
    run = {"epochs": 2, "batch_size": 2, "accumulate": 1, "log_every": 1, "save_every_steps": 5}
    cfg = config(write_images(root / "images"), root / "out", **run)
    values(run_processes(train, cfg, environments=group()))
    return cfg


def first_process_at_step(out: Path, step: int, alive: Callable[[], bool]) -> int:
    """Wait until a step is logged; the number of the process that writes."""
    end, log = time.monotonic() + 120, out / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= step):
        assert alive() and time.monotonic() < end
        time.sleep(0.02)
    return int(json.loads((out / "run.lock").read_text())["process"])


def resumed_from(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"resuming after step (\d+)", log)]


def test_a_signal_under_submitits_local_executor(reference: TrainConfig, tmp_path: Path) -> None:
    """One process is told; both save the same step, and submitit starts both again."""
    cfg = changed(reference, out=tmp_path / "out")
    executor = LocalExecutor(tmp_path / "logs")
    executor.update_parameters(tasks_per_node=2, timeout_min=30)
    job = executor.submit(ResumableJob("train", cfg))
    os.kill(first_process_at_step(tmp_path / "out", 7, lambda: not job.done()), signal.SIGUSR2)
    assert job.results() == [tmp_path / "out"] * 2
    log = "".join(path.read_text() for path in (tmp_path / "logs").glob("*.err"))
    (step,) = resumed_from(log)
    assert 7 <= step < STEPS and f"stopped by SIGUSR2 after step {step} of {STEPS}" in log
    assert_same_run(tmp_path / "out", Path(reference.run.out))


def test_a_killed_process_under_torchrun(reference: TrainConfig, tmp_path: Path) -> None:
    """torchrun ends the other one and starts both again; they go on from the last checkpoint."""
    cfg = changed(reference, out=tmp_path / "out")
    (tmp_path / "run.yaml").write_text(dump(cfg))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    with open(tmp_path / "said", "w+") as said:
        command = [*launcher, "-m", "dino_simpool", "train", "--config", str(tmp_path / "run.yaml")]
        process = subprocess.Popen(command, stderr=said, stdout=said)
        try:
            os.kill(first_process_at_step(tmp_path / "out", 7, lambda: process.poll() is None), signal.SIGKILL)
            status = process.wait(120)
        finally:
            process.kill()
        log = (tmp_path / "said").read_text()
    assert status == 0, log
    assert len(resumed_from(log)) == 1 and 5 <= resumed_from(log)[0] < STEPS
    assert_same_run(tmp_path / "out", Path(reference.run.out))


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_machine_that_leaves_under_torchrun(reference: TrainConfig, tmp_path: Path, how: signal.Signals) -> None:
    """Two launchers, here on one machine, of which one is told to leave or is gone: the other one goes on with all images."""
    cfg = changed(reference, out=tmp_path / "out")
    (tmp_path / "run.yaml").write_text(dump(cfg))
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "x"]
    soon = ["--rdzv_conf", "last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", *meeting, *soon, "--max-restarts", "2"]
    command = [*launcher, "-m", "dino_simpool", "train", "--config", str(tmp_path / "run.yaml")]
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(open(tmp_path / name, "w+")) for name in ("stays", "leaves")]
        launchers = []
        for file in said:
            launchers.append(stack.enter_context(subprocess.Popen(command, stderr=file, stdout=file)))
            stack.callback(launchers[-1].kill)
            time.sleep(2)  # the first one holds the store by which they meet
        stays, leaves = launchers
        first_process_at_step(tmp_path / "out", 7, lambda: stays.poll() is None)
        workers = Path(f"/proc/{leaves.pid}/task/{leaves.pid}/children").read_text().split()
        for number in [leaves.pid, *(map(int, workers) if how == signal.SIGKILL else ())]:
            os.kill(number, how)
        status = stays.wait(120)
        log = (tmp_path / "stays").read_text()
    assert status == 0, log
    assert "number of processes: 2 -> 1" in log and "1 process(es) x 2 images" in log
    assert [line["step"] for line in log_of(tmp_path / "out") if line["kind"] == "step"] == list(range(1, STEPS + 1))
    state = read_state(tmp_path / "out" / "last.pth")
    assert (state["step"], state["world_size"]) == (STEPS, 1)
