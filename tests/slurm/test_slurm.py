"""Jobs of `submit` on a real SLURM of one node: two processes that are stopped in every way, and end as if nothing had been.

Without the programs of SLURM, or without root, these tests are skipped: `tests/slurm/one_node.sh install` installs them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from submitit import SlurmJob
from test_distributed import group, run_processes, values
from test_train import assert_same_run, changed, config, log_of, write_images

from dino_simpool import cli
from dino_simpool.checkpoint import read_state
from dino_simpool.config import TrainConfig, dump
from dino_simpool.train import train

SCRIPT, ROOT = Path(__file__).parent / "one_node.sh", Path(__file__).parents[2]
MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: tests/slurm/one_node.sh install"),
    pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="the daemons of SLURM need root"),
    pytest.mark.filterwarnings("ignore"),
]
EPOCHS, STEPS = 2, 17
"""Of the run: 34 images in batches of two."""


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A running SLURM, of which sbatch and the others know by SLURM_CONF."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPT, "start", folder], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
        ask("scancel", "--user=root")
    subprocess.run([SCRIPT, "stop", folder], check=True)


def ask(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The run of two processes that nothing interrupted, without SLURM."""
    root = tmp_path_factory.mktemp("reference")
    run = {"epochs": EPOCHS, "batch_size": 2, "accumulate": 1, "log_every": 1, "save_every_steps": 5}
    cfg = config(write_images(root / "images"), root / "out", **run)
    values(run_processes(train, cfg, environments=group()))
    return cfg


class Running:
    """A job, and what SLURM says about it."""

    def __init__(self, number: int, out: Path, logs: Path) -> None:
        """out: of the run.   logs: folder of the job's output, in files whose names begin with its number."""
        self.number, self.out, self.folder, self.hurried = number, out, logs, "0"

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{self.number}_*.out")))

    def asked(self) -> dict[str, str]:
        """What SLURM knows of the job."""
        return dict(re.findall(r"(\w+)=(\S*)", ask("scontrol", "--oneliner", "show", "job", self.number)))

    def signal(self, *names: str) -> None:
        for name in names:
            subprocess.run(["scancel", f"--signal={name}", str(self.number)], check=True)

    def wait(self, until: Callable[[], object], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, f"{self.asked()}\n{self.log}"
            asked = self.asked()
            # SLURM holds back what it requeued for two minutes. Three seconds will do, but not none: to the second, the
            # credentials of before are revoked, and a job that starts within that second fails.
            if asked["JobState"] == "PENDING" and asked["Restarts"] != self.hurried:
                self.hurried = asked["Restarts"]
                ask("scontrol", "update", f"JobId={self.number}", "StartTime=now+3")
            time.sleep(0.05)

    def starts(self, number: int) -> None:
        """Wait until the job has started for this time."""
        path = self.folder / f"{self.number}_starts.txt"
        self.wait(lambda: path.exists() and path.read_bytes().count(b"\n") >= number)

    def reaches(self, step: int) -> None:
        """Wait until a step is logged."""
        path = self.out / "log.jsonl"
        self.wait(lambda: path.exists() and path.read_bytes().count(b"\n") >= step)

    def ends(self, seconds: float = 120) -> str:
        """Wait until the job is over: its last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.asked()["JobState"] in over, seconds)
        return self.asked()["JobState"]


class Submitted(Running):
    """A job of two processes."""

    def __init__(self, cfg: TrainConfig, *options: str, time: str = "1h") -> None:
        out = Path(cfg.run.out)
        recipe = out.parent / "recipe.yaml"
        recipe.write_text(dump(cfg))
        command = ["submit", "--gpus", "0", "--tasks", "2", "--cpus", "1", "--time", time, *options, "--", "train"]
        assert cli.main([*command, "--config", str(recipe)]) == 0
        recipe.write_text("run: {seed: 9}\n")  # the job has its options already
        logs = out / "submit"
        super().__init__(max(int(path.name.split("_")[0]) for path in logs.glob("*_submitted.pkl")), out, logs)


@pytest.fixture
def run(reference: TrainConfig, tmp_path: Path) -> TrainConfig:
    return changed(reference, out=tmp_path / "out")


@pytest.fixture(scope="module")
def limited(reference: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """A job of two minutes that has spent one when training begins; submitted before all others, as it mostly waits."""
    out = tmp_path_factory.mktemp("limited") / "out"
    wait = '[ -n "${SLURM_RESTART_COUNT:-}" ] || sleep 60'
    return Submitted(changed(reference, out=out), "--warn_seconds", "50", "--setup", wait, time="2")


def same(job: Running, reference: TrainConfig) -> None:
    """The result of a job is that of the run that nothing interrupted, bit for bit."""
    assert_same_run(job.out, Path(reference.run.out))


def steps_resumed_from(job: Running) -> list[int]:
    return [int(step) for step in re.findall(r"resuming after step (\d+)", job.log)]


def test_a_job_trains_evaluates_and_returns_its_result(run: TrainConfig, reference: TrainConfig, limited: Submitted) -> None:
    job = Submitted(run)
    assert job.ends() == "COMPLETED", job.log
    results = SlurmJob(folder=job.folder, job_id=str(job.number), tasks=[0, 1]).results()
    assert results == [job.out, job.out] and read_state(job.out / "last.pth")["world_size"] == 2
    assert [len(line["k-NN"]) for line in log_of(job.out) if "k-NN" in line] == [4, 4]
    assert "2 process(es) x 1 images" in job.log and job.asked()["Restarts"] == "0"
    same(job, reference)


def test_an_evaluation_is_a_job_too(reference: TrainConfig, tmp_path: Path) -> None:
    """As an array of two jobs."""
    data = Path(reference.data.root).parent
    checkpoint, folder = Path(reference.run.out) / "last.pth", tmp_path / "logs"
    command = ["knn", "--checkpoint", str(checkpoint), "--data", str(data), "--out", str(tmp_path / "{}"), "--device", "cpu"]
    options = ["--gpus", "0", "--tasks", "2", "--cpus", "1", "--time", "1h", "--array", "a,b", "--folder", str(folder)]
    assert cli.main(["submit", *options, "--", *command, "--workers", "0"]) == 0
    end = time.monotonic() + 120
    while len(found := sorted(tmp_path.glob("?/**/knn*.json"))) < 2:
        assert time.monotonic() < end, [path.read_text() for path in folder.glob("*.out")]
        time.sleep(0.1)
    one, other = (json.loads(path.read_text()) for path in found)
    assert one["processes"] == 2 and one["metrics"] == other["metrics"]


def test_a_job_that_is_requeued_goes_on_by_itself(run: TrainConfig, reference: TrainConfig) -> None:
    """USR2 before training has begun, USR2 within an epoch, and a requeue without any signal, as if the node had failed."""
    job = Submitted(run)
    job.starts(1)
    job.signal("USR2")
    job.starts(2)
    assert steps_resumed_from(job) == []
    job.reaches(5)
    job.signal("USR2")
    job.starts(3)
    job.reaches(20)
    ask("scontrol", "requeue", job.number)
    assert job.ends() == "COMPLETED", job.log
    assert job.asked()["Restarts"] == "3"
    first, second = steps_resumed_from(job)
    assert 5 <= first < STEPS and first % STEPS and first < second < EPOCHS * STEPS
    same(job, reference)


@pytest.mark.long
def test_a_job_that_is_preempted_goes_on_by_itself(run: TrainConfig, reference: TrainConfig) -> None:
    """TERM comes first, as from a scheduler that wants the node for another job."""
    job = Submitted(run)
    job.reaches(5)
    job.signal("TERM", "USR2")
    assert job.ends() == "COMPLETED", job.log
    assert job.asked()["Restarts"] == "1" and len(steps_resumed_from(job)) == 1
    same(job, reference)


def test_the_same_command_goes_on_after_a_kill(run: TrainConfig, reference: TrainConfig) -> None:
    """TERM and KILL at once leave no time to save; scancel leaves five seconds (KillWait of this SLURM)."""
    last = Path(run.run.out) / "last.pth"
    job = Submitted(run)
    job.reaches(7)
    job.signal("TERM", "KILL")
    assert job.ends() == "CANCELLED", job.log
    killed = read_state(last)["step"]
    assert killed >= 5  # run.save_every_steps

    again = Submitted(run)
    again.reaches(20)
    ask("scancel", again.number)
    assert again.ends() == "CANCELLED", again.log
    saved = read_state(last)["step"]
    assert killed < saved < EPOCHS * STEPS and steps_resumed_from(again) == [killed]
    assert f"stopped by SIGTERM after step {saved} of {EPOCHS * STEPS}" in again.log

    last_job = Submitted(run)
    assert len({job.number, again.number, last_job.number}) == 3
    assert last_job.ends() == "COMPLETED" and steps_resumed_from(last_job) == [saved], last_job.log
    same(last_job, reference)


def test_the_script_for_sbatch_requeues_itself(
    run: TrainConfig, reference: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """launch/train.sbatch: USR1, as SLURM sends it before the time limit."""
    (tmp_path / "recipe.yaml").write_text(dump(run))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    options = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/%j_log.out"]
    said = ask("sbatch", *options, ROOT / "launch" / "train.sbatch", "--config", tmp_path / "recipe.yaml")
    job = Running(int(said.split()[-1]), Path(run.run.out), tmp_path)
    job.reaches(5)
    job.signal("USR1")
    assert job.ends() == "COMPLETED", job.log
    assert f"requeuing job {job.number}" in job.log and len(steps_resumed_from(job)) == 1
    same(job, reference)


def test_at_its_time_limit_a_job_goes_on(limited: Submitted, reference: TrainConfig) -> None:
    """The signal came when no process could receive it, but train looks at the clock."""
    assert limited.ends(240) == "COMPLETED", limited.log
    assert limited.asked()["Restarts"] == "1" and steps_resumed_from(limited) == [1]
    same(limited, reference)


@pytest.mark.long
def test_a_longer_job_goes_on_at_its_time_limit(reference: TrainConfig, tmp_path: Path) -> None:
    """SLURM sends USR2 ten to seventy seconds after the start of these two minutes."""
    cfg = changed(reference, out=tmp_path / "reference", epochs=150, knn_every=50)
    values(run_processes(train, cfg, environments=group()))
    job = Submitted(changed(cfg, out=tmp_path / "out"), "--warn_seconds", "50", time="2")
    assert job.ends(900) == "COMPLETED", job.log
    assert int(job.asked()["Restarts"]) >= 1 and steps_resumed_from(job)
    same(job, cfg)
