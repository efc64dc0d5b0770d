"""`submit`: what it writes for SLURM, what it refuses before anything is submitted, and what happens in a job.

Without SLURM: scripts from --dry-run, a made-up sbatch, and jobs under submitit's local executor are in test_launchers.py; jobs
under a real SLURM of one node in slurm/test_slurm.py.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from submitit.core.utils import DelayedSubmission

from dino_simpool import cli, config
from dino_simpool.config import SubmitConfig, minutes_of
from dino_simpool.submit import MOST_STARTS, Job, ResumableJob, extra_options, values_of

TRAIN = ("train", "--config", "quickstart", "--data.root", "data", "--run.out", "out")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    """What is said about a submission that must be refused: one line."""
    capsys.readouterr()
    assert cli.main(["submit", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dino-simpool submit: error: ") and err.count("\n") == 1
    return err.partition(": error: ")[2]


def script(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines of the script that --dry-run prints."""
    capsys.readouterr()
    assert cli.main(["submit", "--dry-run", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("#!/bin/bash\n")
    return out.splitlines()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -- options


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("1", 1), ("4320", 4320), ("72h", 4320), ("30m", 30), ("3d", 4320), ("72:00:00", 4320), ("0:00:01", 1),
        ("00:10:30", 11), ("1-12:00:00", 2160), ("1-12", 2160), ("1-12:30", 2190), ("0-00:30", 30), ("365d", 525_600),
    ],
)  # fmt: skip
def test_time_in_every_way_of_writing(time: str, minutes: int) -> None:
    assert minutes_of(time) == minutes


@pytest.mark.parametrize("time", ["", "0", "0h", "00:00:00", "72:00", "-5", "72 h", "1.5h", "h", "366d", "1:2:3:4", "infinite"])
def test_a_time_that_is_none_or_may_mean_two_things_is_refused(time: str) -> None:
    with pytest.raises(ValueError, match=r"^time is .*(give|allowed)"):
        minutes_of(time)


def test_a_time_with_colons_is_no_number_of_base_sixty(tmp_path: Path) -> None:
    """YAML 1.1 reads 72:00:00 as 259200."""
    assert config.parse(SubmitConfig, ["--time", "72:00:00"]).time == "72:00:00"
    for unquoted in ("72:00:00", "4320"):
        (tmp_path / "cluster.yaml").write_text(f"time: {unquoted}\n")
        with pytest.raises(config.ConfigError, match=r"^time is .*: allowed is text$"):
            config.parse(SubmitConfig, ["--config", "cluster.yaml"])
    (tmp_path / "cluster.yaml").write_text("time: '72:00:00'\npartition: long\nsetup: |\n  module load a\n  module load b\n")
    cfg = config.parse(SubmitConfig, ["--config", "cluster.yaml"])
    assert (minutes_of(cfg.time), cfg.partition, cfg.setup) == (4320, "long", "module load a\nmodule load b\n")


def test_values_of_an_array() -> None:
    assert values_of("0..4") == (["0", "1", "2", "3", "4"], 256)
    assert values_of("7..7%2") == (["7"], 2)
    assert values_of("vit_small_simpool,resnet50_gap%1") == (["vit_small_simpool", "resnet50_gap"], 1)
    for wrong in ("4..0", "a,,b", "a,a", "0..5000", "0..3%0", "0..3%", ",", "%3"):
        with pytest.raises(ValueError, match=r"^array is"):
            values_of(wrong)


def test_more_options_of_sbatch() -> None:
    assert extra_options("--exclude=n1,n2 --mail-type END --exclusive") == {
        "exclude": "n1,n2", "mail-type": "END", "exclusive": True,
    }  # fmt: skip
    assert extra_options("--comment 'two words'") == {"comment": "two words"}
    for text, said in (
        ("--time=3", "give --time"),
        ("--mem 3G", "give --memory"),
        ("--no-requeue", "by submit"),
        ("x", "no opt"),
    ):
        with pytest.raises(ValueError, match=said):
            extra_options(text)


# -- the script


def test_the_script_says_what_was_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = script(
        capsys, "--nodes", "2", "--gpus", "8", "--time", "72h", "--partition", "P", "--account", "A", "--qos", "Q", "--memory",
        "400G", "--constraint", "a100", "--sbatch", "--exclude=n7", "--srun", "--container-image=file.sqsh", "--setup",
        "module load cuda", "--cpus", "10", "--", *TRAIN,
    )  # fmt: skip
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    log = f"{tmp_path}/out/submit/%j_%t_log.out"
    assert options == {
        "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=10", "mem=400G", "time=4320", "partition=P",
        "account=A", "qos=Q", "constraint=a100", "exclude=n7", "requeue", "open-mode=append", "signal=USR2@120",
        "job-name=dino-simpool-train", f"output={log.replace('%t', '0')}",
    }  # fmt: skip
    (srun,) = (line for line in lines if line.startswith("srun "))
    for part in ("--container-image=file.sqsh", "--cpus-per-task=10", f"--output {log}", f"{sys.executable} -u -m submitit"):
        assert part in srun
    assert lines.index("set -e") + 1 == lines.index("module load cuda") < lines.index("set +e") < lines.index(srun)
    assert subprocess.run(["bash", "-n"], input="\n".join(lines), text=True).returncode == 0
    assert list(tmp_path.iterdir()) == []  # and it leaves nothing


def test_an_array_is_one_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = script(capsys, "--time", "1h", "--array", "0..4%2", "--", *TRAIN[:-1], "out{}", "--run.seed", "{}")
    assert "#SBATCH --array=0-4%2" in lines
    assert f"#SBATCH --output={tmp_path}/runs/submit/%A_%a_0_log.out" in lines


def test_gpus_that_the_cluster_wants_to_be_asked_for_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    lines = script(capsys, "--time", "1h", "--gpus", "4", "--sbatch=--gres=gpu:a100:4", "--", *TRAIN)
    assert {"#SBATCH --gres=gpu:a100:4", "#SBATCH --ntasks-per-node=4"} < set(lines)
    assert not any(line.startswith("#SBATCH --gpus") for line in lines)
    assert not any(line.startswith("#SBATCH --gpus") for line in script(capsys, "--time", "1h", "--gpus", "0", "--", *TRAIN))


def test_without_torch_and_without_submitit_for_help(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from dino_simpool import cli\n"
        "for command in (['--help'], *([name, '--help'] for name in cli.COMMANDS)):\n"
        "    try:\n"
        "        cli.main(command)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "assert not {'submitit', 'cloudpickle'} & set(sys.modules)\n"
        "print('-- dry run')\n"
        f"raise SystemExit(cli.main(['submit', '--time', '3h', '--dry_run', '--', *{TRAIN}]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "#SBATCH --time=180\n" in done.stdout.partition("-- dry run\n")[2]


# -- refused before anything is submitted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--time", "1h"), "there is no command: write it after --"),
        (("--time", "1h", "--"), "there is no command: write it after --"),
        (("--time", "1h", "--", "trian"), "there is no command trian; commands: train, knn"),
        (("--time", "1h", "--", "submit", "--time", "1h", "--", "train"), "submit cannot submit itself"),
        (("--time", "1h", "--", "train", "--model.arh", "x"), "train: unknown option model.arh: did you mean model.arch?"),
        (("--time", "1h", "--", "train", "--config", "quikstart"), "train: no recipe quikstart: did you mean quickstart?"),
        (("--time", "1h", "--", *TRAIN[:-2]), "train has no folder: give --run.out OUT"),
        (("--", *TRAIN), "there is no time limit: give --time, such as 72h"),
        (("--time", "3", "--", *TRAIN), "time is 3, and the job is told to stop 120 seconds (perhaps 60 more) before"),
        (("--time", "1h", "--array", "0..4", "--", *TRAIN), "there is array, but no {} in the command"),
        (("--time", "1h", "--", *TRAIN[:-1], "out{}"), "there is {} in the command, but no --array 0..4"),
        (("--time", "1h", "--array", "0..1", "--", *TRAIN, "--run.seed", "{}"), "all 2 jobs would train in out: put {} into"),
        (("--time", "1h", "--array", "8,x", "--", *TRAIN[:-1], "{}", "--run.seed", "{}"), "train: run.seed is x: allowed"),
        (("--time", "1h", "--gpus", "2", "--", "table", "runs"), "table runs in one process, not 2: give --nodes 1 --tasks 1"),
        (("--time", "1h", "--gpus", "2", "--tasks", "4", "--", *TRAIN), "4 processes cannot share 2 GPU(s)"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_submission(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert refusal(capsys, "--dry-run", *arguments).startswith(said)
    assert refusal(capsys, *arguments).startswith(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--time", "0"), "time is '0', 0 minutes"),
        (("--time", "72:00"), "time is '72:00', which may mean hours or minutes: give 72h, 72:00:00 or whole minutes"),
        (("--memory", "much"), "memory is much: give a whole number with K, M, G or T"),
        (("--gpus", "-1"), "gpus is -1: allowed is 0 to 64"),
        (("--srun", "--comment='a"), """srun is "--comment='a": no closing quotation"""),
        (("--dryrun",), "unknown option dryrun: did you mean dry_run?"),
    ],
)
def test_wrong_options_of_its_own(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, *arguments, "--", *TRAIN, status=2).startswith(said)


def test_no_sbatch_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(capsys, "--time", "1h", "--", *TRAIN).startswith("there is no sbatch here: run submit on a login node")
    assert list(tmp_path.iterdir()) == []


# -- submitted to a made-up sbatch


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up sbatch, which can be rewritten; also a made-up srun."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", "echo Submitted batch job 71"), ("srun", "")):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder / "sbatch"


def submitted(folder: Path, job: str) -> Any:
    with open(folder / f"{job}_submitted.pkl", "rb") as file:
        return pickle.load(file)


def test_the_options_travel_in_the_job(sbatch: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {seed: 41, epochs: 3}\n")
    command = ["train", "--config", "mine.yaml", "--data.root", "data", "--run.out", "out"]
    assert cli.main(["submit", "--gpus", "8", "--time", "72h", "--", *command]) == 0
    out, _ = capsys.readouterr()
    log = tmp_path / "out" / "submit" / "71_0_log.out"
    for said in ("submitted job 71: train on 1 node(s) x 8", f"tail -F {log}", "scancel 71", "squeue --jobs 71", "resume:"):
        assert said in out
    (tmp_path / "mine.yaml").write_text("run: {seed: 42}\n")
    job = submitted(log.parent, "71").function
    assert type(job) is ResumableJob and (job.name, job.gpus) == ("train", 8)
    cfg = config.from_dict(config.TrainConfig, job.options)
    assert (cfg.run.seed, cfg.run.epochs, cfg.run.out, cfg.data.root) == (41, 3, "out", "data")


def test_jobs_of_an_array_differ_in_the_value(sbatch: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["train", "--config", "{}", "--data.root", "data", "--run.out", "runs/{}"]
    assert (
        cli.main(["submit", "--time", "9h", "--array", "vit_small_simpool,resnet50_gap", "--folder", "logs", "--", *command])
        == 0
    )
    assert "submitted job 71: train on 1 node(s) x 1 process(es), at most 540 minutes, 2 times" in capsys.readouterr().out
    found = [submitted(tmp_path / "logs", f"71_{number}").function.options for number in (0, 1)]
    assert [one["model"]["arch"] for one in found] == ["vit_small", "resnet50"]
    assert [one["run"]["out"] for one in found] == ["runs/vit_small_simpool", "runs/resnet50_gap"]


def test_what_sbatch_refuses_is_one_line(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: P' >&2\nexit 1\n")
    said = refusal(capsys, "--time", "1h", "--", *TRAIN)
    assert said == "sbatch refused the job: sbatch: error: invalid partition specified: P\n"


def test_a_folder_that_cannot_be_written_is_refused(sbatch: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "give another folder" in refusal(capsys, "--time", "1h", "--folder", "file/logs", "--", *TRAIN)
    assert "give another run.out" in refusal(capsys, "--time", "1h", "--", *TRAIN[:-1], "file/out")


# -- in the job


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "submit"])
def test_every_command_can_travel(name: str) -> None:
    kind = cli.COMMANDS[name][0]
    job = pickle.loads(pickle.dumps(Job(name, kind())))
    assert config.from_dict(kind, job.options) == kind()


def test_both_names_of_the_hook_give_the_job_again() -> None:
    job = ResumableJob("train", config.TrainConfig())
    for again in (job.checkpoint(), DelayedSubmission(job)._checkpoint_function()):
        assert isinstance(again, DelayedSubmission) and again.function is job
    assert DelayedSubmission(Job("knn", config.KnnConfig()))._checkpoint_function() is None


def test_fewer_gpus_than_asked_for_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": ".", "SLURM_JOB_ID": "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "call", lambda name, cfg: "done")
    job = Job("knn", config.KnnConfig(), gpus=4)
    cases = ((4, "4", False), (8, "8", False), (1, "4", False), (0, "0", True), (3, "4", True), (1, "1", True))
    for visible, of_the_node, fails in cases:
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", of_the_node)
        if fails:
            with pytest.raises(ValueError, match=rf"asked for 4 GPU\(s\) on each node, but {visible} are visible"):
                job()
        else:
            assert job() == "done"


@pytest.mark.parametrize(
    ("name", "cfg", "file"),
    [
        ("train", config.TrainConfig(run=config.RunConfig(out="out")), "last.pth"),
        ("extract", config.ExtractConfig(out="out"), "features.progress_1.json"),
        ("extract", config.ExtractConfig(out="out", shard="3/16"), "shard_3_of_16/features.progress_0.json"),
    ],
)
def test_a_job_that_makes_no_progress_is_not_started_forever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, cfg: Any, file: str
) -> None:
    """Each start is counted, whoever asked for it; one with progress starts the count again. Other shards do not count."""
    for variable, value in {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path), "SLURM_JOB_ID": "5"}.items():
        monkeypatch.setenv(variable, value)
    out = tmp_path / "out"
    (out / Path(file).parent).mkdir(parents=True)
    saves = SimpleNamespace(times=iter([0] * (MOST_STARTS - 2) + [1] + [0] * MOST_STARTS))

    def call(name: str, cfg: Any) -> str:
        if next(saves.times):
            (out / file).write_text("state")
        (out / "shard_4_of_16").mkdir(exist_ok=True)
        (out / "shard_4_of_16" / "features.progress_0.json").write_text("state")
        return "ran"

    monkeypatch.setattr(cli, "call", call)
    job = ResumableJob(name, cfg)
    for _ in range(MOST_STARTS - 1 + MOST_STARTS - 1):
        assert job() == "ran"
    with pytest.raises(RuntimeError, match=f"was started {MOST_STARTS} times without any progress in .*out"):
        job()
