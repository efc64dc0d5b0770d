"""Runs that a launcher starts again: submitit's local executor after a signal, torchrun after a killed process."""

from __future__ import annotations

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
from test_distributed import group, run_processes, values
from test_train import assert_same_run, changed, config, write_images

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
