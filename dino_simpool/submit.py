"""Runs any command as a SLURM job, through submitit: submit OPTIONS -- COMMAND OPTIONS.

The options of the command are read before anything is submitted, and travel in the job: later edits
of a recipe change nothing. Every process of the job calls `Job`.

When SLURM asks the job to stop (before the time limit, or for a job of higher rank), train saves at
the end of its step and then calls the signal handler of submitit, which requeues the job under the
same number: it resumes there. submitit asks for a hook named `checkpoint`, or, in newer versions,
`__submitit_checkpoint__`; that one has nothing left to save.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError

from dino_simpool import cli
from dino_simpool.config import ConfigError, SubmitConfig, from_dict, minutes_of, parse_shard, to_dict
from dino_simpool.files import make_writable
from dino_simpool.signals import Stopped

SEVERAL = ("train", "knn", "linear", "retrieval", "recall", "masks", "extract")
"""Commands that share their work among processes."""
PROGRESS = {"train": "last.pth", "extract": "*"}
"""Commands that go on where they were stopped, and the files of OUT that change as they do."""
MOST_STARTS = 4
"""Starts of a job in a row without progress; after these it is not tried again."""
OURS = {
    "nodes": "--nodes", "ntasks": "--tasks", "ntasks-per-node": "--tasks", "cpus-per-task": "--cpus", "mem": "--memory",
    "time": "--time", "partition": "--partition", "account": "--account", "qos": "--qos", "constraint": "--constraint",
    "array": "--array", "signal": "--warn_seconds", "output": "--folder", "error": "--folder", "open-mode": "", "requeue": "",
    "no-requeue": "",
}  # fmt: skip
"""Options of sbatch that submit writes, and those of its own that set them."""


class Job:
    """A command with its options, as submitit stores it and calls it in each process of the job.

    The options are plain values, read again when the job starts: code that was changed since then
    takes them all or refuses them.
    """

    def __init__(self, name: str, cfg: Any, *, gpus: int = 0) -> None:
        """gpus: how many each node must have."""
        self.name, self.options, self.gpus = name, to_dict(cfg), gpus

    def __call__(self) -> Any:
        """Run the command; returns what it returns, such as the folder of a run.

        SystemExit with 128 + number if a signal stopped it and it is not requeued.
        """
        here = submitit.JobEnvironment()
        if here.cluster == "local":
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        cfg: Any = from_dict(cli.COMMANDS[self.name][0], self.options)
        if here.global_rank == 0:
            self._check_progress(cfg, here.paths.folder / f"{here.job_id}_starts.txt")
        if self.gpus:
            _check_gpus(self.gpus)
        try:
            return cli.call(self.name, cfg)
        except Stopped as stop:
            if here.cluster == "slurm" and here.global_rank and stop.number == here._usr_sig():
                # The first process is requeuing the job, which ends this one. Some clusters end the
                # whole job if one process ends.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(60)
            print(f"{stop}: the run is unfinished, submit the same command again to resume", file=sys.stderr, flush=True)
            raise SystemExit(128 + stop.number) from None
        finally:
            if "dino_simpool.distributed" in sys.modules:
                sys.modules["dino_simpool.distributed"].cleanup()

    def _check_progress(self, cfg: Any, starts: Path) -> None:
        """Note this start of the job. RuntimeError if the last ones all began at the same place.

        starts: a file with a line for each start, also for those that no signal came before.
        """
        if self.name not in PROGRESS:
            return
        out = _out_of(cfg)
        if getattr(cfg, "shard", ""):  # other jobs write the other shards
            from dino_simpool.features.folder import Shard  # imports torch: only in jobs

            out /= Shard(*parse_shard(cfg.shard)).folder
        changed = max((file.stat().st_mtime_ns for file in out.glob(PROGRESS[self.name]) if file.is_file()), default=0)
        with open(starts, "a+") as file:
            file.write(f"{changed}\n")
            file.seek(0)
            last = file.read().split()[-MOST_STARTS:]
        if len(last) == MOST_STARTS and len(set(last)) == 1:
            raise RuntimeError(
                f"this job was started {MOST_STARTS} times without any progress in {out}, and is not tried again: see the log "
                "above for what ends it. A time limit that is too short for one save, perhaps? Then submit it with more --time"
            )


class ResumableJob(Job):
    """A job that SLURM requeues at its time limit too, since it goes on where it stopped."""

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after the requeue. The state is in files already."""
        return DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint


class _Executor(submitit.SlurmExecutor):
    """That of submitit; it also writes scripts where SLURM is not installed."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _out_of(cfg: Any) -> Path:
    return Path(cfg.run.out if hasattr(cfg, "run") else cfg.out)


def _check_gpus(asked: int) -> None:
    """ValueError if this node has fewer GPUs than the job asked for."""
    import torch  # only in jobs: the submitting machine need not have it

    visible = torch.cuda.device_count()
    # SLURM may show each process one GPU only, its own.
    bound = visible == 1 and int(os.environ.get("SLURM_GPUS_ON_NODE", "0")) >= asked
    if visible < asked and not bound:
        raise ValueError(
            f"this job asked for {asked} GPU(s) on each node, but {visible} are visible on {socket.gethostname()}: ask for a "
            "partition or constraint whose nodes have them, or for fewer --gpus"
        )


def values_of(array: str) -> tuple[list[str], int]:
    """The values of `--array`, and how many of these jobs may run at a time.

    array: `0..4` (both ends included), or `A,B,C`; then `%4` or nothing, which is 256.
    """
    text, percent, most = array.partition("%")
    if percent and not re.fullmatch(r"[1-9]\d{0,3}", most):
        raise ConfigError(f"array is {array}: after % comes the number of jobs that may run at a time")
    if span := re.fullmatch(r"(\d{1,6})\.\.(\d{1,6})", text):
        values = [str(number) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        values = text.split(",")
    if not values or not all(values) or len(set(values)) < len(values) or len(values) > 1000:
        raise ConfigError(f"array is {array}: give 2 to 1000 different values, as 0..4 or A,B,C")
    return values, int(most or 256)


def jobs_of(cfg: SubmitConfig) -> list[tuple[str, Any]]:
    """Command and configuration of each job. ConfigError for any mistake in them."""
    if not cfg.command:
        raise ConfigError("there is no command: write it after --, as in submit --time 72h -- train --config RECIPE")
    held = any("{}" in word for word in cfg.command)
    if held != bool(cfg.array):
        given, lacks = ("array", "{} in the command") if cfg.array else ("{} in the command", "--array 0..4 or --array A,B")
        raise ConfigError(f"there is {given}, but no {lacks}: each value of the array takes the place of {{}}")
    jobs = []
    for value in values_of(cfg.array)[0] if cfg.array else [""]:
        name, options = cli.split([word.replace("{}", value) for word in cfg.command])
        if name == "submit":
            raise ConfigError("submit cannot submit itself: write the command to run after --")
        try:
            jobs.append((name, cli.read(name, options)))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    if jobs[0][0] in PROGRESS:
        outs = [str(_out_of(one)) for _, one in jobs]
        if not all(outs) or "." in outs:
            raise ConfigError(f"{jobs[0][0]} has no folder: give --{'run.' if jobs[0][0] == 'train' else ''}out OUT")
        if jobs[0][0] == "train" and len(set(outs)) < len(outs):
            raise ConfigError(f"all {len(jobs)} jobs would train in {outs[0]}: put {{}} into --run.out too")
    return jobs


def extra_options(text: str) -> dict[str, str | bool]:
    """Options of sbatch, `--name=value`, `--name value` or `--name`, by name."""
    found: dict[str, str | bool] = {}
    last = ""
    for word in shlex.split(text):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            if name in OURS:
                raise ConfigError(f"sbatch: --{name} is written by submit" + (f": give {OURS[name]}" if OURS[name] else ""))
            found[name], last = (value if equals else True), "" if equals else name
        elif last:
            found[last], last = word, ""
        else:
            raise ConfigError(f"sbatch: {word} is no option: write --name=value")
    return found


def _executor(cfg: SubmitConfig, name: str, folder: Path, tasks: int, num_jobs: int) -> _Executor:
    """An executor of submitit with all options of the job."""
    if 60 * minutes_of(cfg.time) <= cfg.warn_seconds + 60:
        raise ConfigError(
            f"time is {cfg.time}, and the job is told to stop {cfg.warn_seconds} seconds (perhaps 60 more) before: give more "
            "--time, or fewer --warn_seconds"
        )
    usr = f"{submitit.JobEnvironment.USR_SIG}"
    # Until submitit has installed its handler, the signal would kill Python.
    quiet = f'sh -c \'trap "" {usr}; exec "$0" "$@"\' {shlex.quote(cfg.python or sys.executable)}'
    extra = extra_options(cfg.sbatch)
    # Every requeue must have made progress, so there is no need to limit their number.
    executor = _Executor(folder, max_num_timeout=100_000, python=quiet)
    setup = [
        f"# `dino-simpool {name}`; its options are in the .pkl file that submit writes beside this script",
        "# What an interactive shell or torchrun left in the environment is not about this job.",
        "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT ${!SLURM_PTY_@}",
        "# Newer SLURM says when the job ends; train looks at it, in case that no signal comes.",
        f"export SLURM_JOB_END_TIME=${{SLURM_JOB_END_TIME:-$(($(date +%s) + {60 * minutes_of(cfg.time)}))}}",
    ]
    parameters = {
        "job_name": f"dino-simpool-{name.replace(' ', '-')}",
        "nodes": cfg.nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": cfg.cpus,
        "gpus_per_node": cfg.gpus
        if cfg.gpus and not extra.keys() & {"gres", "gpus", "gpus-per-node", "gpus-per-task"}
        else None,
        "mem": cfg.memory or None,
        "time": minutes_of(cfg.time),
        "partition": cfg.partition or None,
        "account": cfg.account or None,
        "qos": cfg.qos or None,
        "constraint": cfg.constraint or None,
        "signal_delay_s": cfg.warn_seconds,
        "setup": [*setup, *(["set -e", *cfg.setup.splitlines(), "set +e"] if cfg.setup else [])],
        # srun does not take the cores of each task from sbatch. One failed process ends all.
        "srun_args": [f"--cpus-per-task={cfg.cpus}", "--kill-on-bad-exit=1", *shlex.split(cfg.srun)],
        "stderr_to_stdout": True,
        "wckey": None,
        "array_parallelism": values_of(cfg.array)[1] if cfg.array else None,
        "additional_parameters": {"requeue": True, **extra},
    }
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None or key == "wckey"})
    if num_jobs > 1 and cfg.dry_run:
        executor.parameters["map_count"] = num_jobs
    return executor


def main(cfg: SubmitConfig) -> None:
    """The command `dino-simpool submit`."""
    jobs = jobs_of(cfg)
    name, first = jobs[0]
    if not cfg.time:
        raise ConfigError("there is no time limit: give --time, such as 72h")
    tasks = cfg.tasks or max(1, cfg.gpus)
    if cfg.nodes * tasks > 1 and name not in SEVERAL:
        raise ConfigError(f"{name} runs in one process, not {cfg.nodes * tasks}: give --nodes 1 --tasks 1")
    if cfg.gpus and tasks > cfg.gpus:
        raise ConfigError(f"{tasks} processes cannot share {cfg.gpus} GPU(s): give --tasks {cfg.gpus}, or --gpus 0")
    default = _out_of(first) / "submit" if name == "train" and len(jobs) == 1 else Path("runs/submit")
    folder = Path(cfg.folder) if cfg.folder else default
    executor = _executor(cfg, name, folder, tasks, len(jobs))
    if cfg.dry_run:
        print(executor._make_submission_file_text(executor._submitit_command_str, ""), end="")
        return
    if not shutil.which("sbatch") or not shutil.which("srun"):
        raise ConfigError(
            "there is no sbatch here: run submit on a login node of a SLURM cluster, or on a machine with GPUs launch/train.sh"
        )
    for _, one in jobs if name in PROGRESS else []:
        make_writable(_out_of(one), "run.out" if name == "train" else "out")
    make_writable(folder, "folder")
    kind = ResumableJob if name in PROGRESS else Job
    try:
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # submitit prints the error that it raises
            submitted = [executor.submit(kind(name, one, gpus=cfg.gpus)) for _, one in jobs]
    except FailedJobError as error:
        raise ConfigError(f"sbatch refused the job: {str(error).strip()}") from None
    number = submitted[0].job_id.partition("_")[0]
    log = submitted[0].paths.stdout
    print(
        f"submitted job {number}: {name} on {cfg.nodes} node(s) x {tasks} process(es), at most {minutes_of(cfg.time)} minutes"
        + (f", {len(jobs)} times" if len(jobs) > 1 else "")
        + f"\nlog:     {log}   (one file for each process)"
        f"\nwatch:   squeue --jobs {number}; tail -F {shlex.quote(str(log))}"
        "\nresume:  "
        + ("at the time limit and after a preemption by itself; otherwise " if kind is ResumableJob else "")
        + f"run the same command again\ncancel:  scancel {number}"
    )
