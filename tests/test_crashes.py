"""What goes wrong outside: a full disk, a folder that is read-only, a process that hangs.

One line says it, and what was there before stays valid. The disks are small ones in memory, mounted for a test, because the
tests may run as root, whom no permission stops.
"""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import arguments, trained  # noqa: F401 (a fixture)
from test_distributed import group, run_processes
from test_train import command_with, config, real_step, write_images

from dino_simpool import cli, distributed, signals
from dino_simpool.checkpoint import read_state
from dino_simpool.config import dump
from dino_simpool.dino.learner import DinoLearner
from dino_simpool.logs import read_log

FULL = (
    r"cannot write {file}: the disk is full \([\d,]+ bytes are free, or a quota is used up\)\. "
    r"What was there before is still valid; make room and run the same command again"
)


def mount(*words: str) -> None:
    """Run mount, or skip the test where that is not allowed."""
    if not shutil.which("mount"):
        pytest.skip("there is no mount here")
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def disk(trained: Path, tmp_path: Path) -> Iterator[Path]:  # noqa: F811
    """A file system of 8 MB, with a copy of the trained run and its data."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
    try:
        yield shutil.copytree(trained, folder, dirs_exist_ok=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no block free."""
    with open(disk / "filler", "ab", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def full_before(disk: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full as soon as a function of ours is called."""
    real: Callable[..., Any] = pkgutil.resolve_name(f"dino_simpool.{target}")

    def called(*given: Any, **options: Any) -> Any:
        fill(disk)
        if target != "logs.RunLog.image":
            return real(*given, **options)
        real(*given[:2], torch.rand(3, 99, 99), *given[3:])  # too large for the rest of a block
        time.sleep(0.3)  # until TensorBoard's thread has found out

    monkeypatch.setattr(f"dino_simpool.{target}", called)


def line_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that fails says in its last line: the only error, without a traceback."""
    capsys.readouterr()
    assert cli.main(command) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error" in line.lower() or "Traceback" in line] == lines[-1:], lines
    return lines[-1].removeprefix(f"dino-simpool {command[0]}: error: ")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, but for the one that fills the disk."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "filler")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# -- a full disk


def fails(
    command: list[str],
    folder: Path,
    filled: tuple[Path, str, pytest.MonkeyPatch],
    file: str,
    capsys: pytest.CaptureFixture[str],
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """A command whose disk fills up names the file, and leaves nothing temporary. The folder before and after."""
    disk, target, monkeypatch = filled
    before = contents(folder)
    with monkeypatch.context() as patch:
        full_before(disk, target, patch)
        said = line_of(command, capsys)
    assert re.fullmatch(FULL.format(file=re.escape(file)), said), said
    after = contents(folder)
    assert not [name for name in after if name.endswith(".tmp")]
    return before, after


@pytest.mark.parametrize(
    ("target", "file"),
    [
        ("train.locked", "run.lock"),
        ("train.write_atomically", "config.yaml"),
        ("train.RunLog", "log.jsonl"),
        ("logs.RunLog.image", "tensorboard"),
        ("train._log_step", "log.jsonl"),
        ("train.save_state", ".last.pth.new"),
        ("train.export_encoder", "backbone.safetensors"),
        ("train.keep_state", "epoch_0001.pth"),
    ],
)
def test_training_on_a_full_disk(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, file: str
) -> None:
    """A run that has saved one step is resumed. With room again it goes on to its end."""
    run, command = disk / "new", arguments(disk, "--run.log_every", "1", "--run.keep_every", "1", out="new")
    assert cli.main([*command, "--run.stop_after_steps", "1"]) == 0
    if target == "train._log_step":  # the next line shall need another block
        (run / "log.jsonl").write_text((run / "log.jsonl").read_text().rstrip().ljust(4000) + "\n")
    before, after = fails(command, run, (disk, target, monkeypatch), f"{run}/{file}", capsys)
    assert before["last.pth"] in (after["last.pth"], after.get("prev.pth")) and read_state(run / "last.pth")["step"] in (1, 2)
    assert [line["step"] for line in read_log(run / "log.jsonl")][:1] == [1]
    (disk / "filler").unlink()
    assert cli.main(command) == 0
    assert read_state(run / "last.pth")["step"] == 2 and [line["step"] for line in read_log(run / "log.jsonl")] == [1, 2, 2]
    assert not (run / "error.txt").exists() and not (run / "run.lock").exists()


LOADED = ("--checkpoint", "{disk}/run/last.pth", "--workers", "0", "--device", "cpu")
FEATURES = ("extract", *LOADED, "--data", "{disk}/data/val", "--out", "{disk}/out", "--index")
SEARCH = ("search", "--index", "{disk}/out", "--query", "{disk}/data/val/a/0.png", "--out", "{disk}/found", *LOADED[2:])
ATTENTION = ("attention", *LOADED, "--data", "{disk}/data/val", "--out", "{disk}/out")


@pytest.mark.parametrize(
    ("command", "target", "file"),
    [
        (("knn", *LOADED, "--data", "{disk}/data", "--k", "[1]"), "results.write_json", "run/results/knn.json"),
        (("linear", *LOADED, "--data", "{disk}/data", "--epochs", "1"), "results.write_json", "run/results/linear.json"),
        (FEATURES, "features.folder.write_lines", "out/ids.txt"),
        (FEATURES, "features.rows.RowFile.create", "out/features.partial.npy"),
        (FEATURES, "features.extract.build_flat", "out/index.faiss"),
        (ATTENTION, "eval.attention._take", "out/attention/made_by.json"),
        (ATTENTION, "eval.attention.write_image", "out/attention/0_0.npy"),
        (ATTENTION, "eval.attention.png_bytes", "out/attention/0_0_heat.png"),
        (ATTENTION, "eval.attention.contact_sheet", "out/attention.png"),
        (SEARCH, "features.search.write_record", "found/results.json"),
        (SEARCH, "features.search.contact_sheet", "found/contact_sheet.png"),
        (("report", "{disk}/run", "--device", "cpu"), "report.write_atomically", "run/report.html"),
        (("table", "{disk}/run", "--out", "{disk}/table.txt"), "report.table.write_atomically", "table.txt"),
        (("synthetic", "{disk}/set", "--train_per_class", "2", "--size", "16"), "synthetic._write_class", "set"),
        (("check-data", "{disk}/data", "--out", "{disk}/bad.txt", "--workers", "0"), "check_data.write_bad_files", "bad.txt"),
    ],
)
def test_other_commands_on_a_full_disk(
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    target: str,
    file: str,
) -> None:
    """With room again the same command ends as if nothing had been."""
    given = [word.format(disk=disk) for word in command]
    if command[0] == "check-data":
        (disk / "data" / "train" / "a" / "0.png").write_bytes(b"no image")
    if command[0] == "table":
        assert cli.main([word.format(disk=disk) for word in ("knn", *LOADED, "--data", "{disk}/data", "--k", "[10]")]) == 0
    if command[0] == "search":
        assert cli.main([word.format(disk=disk) for word in FEATURES]) == 0
    before, after = fails(given, disk, (disk, target, monkeypatch), f"{disk}/{file}", capsys)
    assert {name: after[name] for name in before} == before and file not in after
    (disk / "filler").unlink()
    assert cli.main(given) == (command[0] == "check-data") and (disk / file.replace(".partial", "")).exists()


def test_features_without_room_are_not_begun(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(disk)
    said = line_of([word.format(disk=disk) for word in FEATURES], capsys)
    assert said == f"the features need 0.00 GB, but {disk}/out has 0.00 GB left: free some, or give another --out"
    assert not (disk / "out").exists()


# -- a folder that is read-only


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (tuple(arguments(Path("{disk}"))), "cannot write to {disk}/run (Read-only file system): give another run.out"),
        (
            tuple(arguments(Path("{disk}"), out="new")),
            "cannot write to {disk}/new (Read-only file system): give another run.out",
        ),
        (
            ("knn", *LOADED, "--data", "{disk}/data", "--k", "[1]"),
            "cannot write to {disk}/run/results (Read-only file system): give another --out",
        ),
        (FEATURES, "cannot write to {disk}/out (Read-only file system): give another --out"),
        (ATTENTION, "cannot write to {disk}/out (Read-only file system): give another --out"),
        (("report", "{disk}/run", "--device", "cpu"), r"[Errno 30] Read-only file system: '{disk}/run/report.html'"),
        (("table", "{disk}/run", "--out", "{disk}/table.txt"), "[Errno 30] Read-only file system: '{disk}/table.txt'"),
        (("synthetic", "{disk}/set", "--size", "16"), "cannot write to {disk}/set (Read-only file system): give another --out"),
        (
            ("check-data", "{disk}/data", "--out", "{disk}/bad.txt", "--workers", "0"),
            "cannot write to {disk} (Read-only file system): give another --out",
        ),
    ],
)
def test_a_read_only_folder(disk: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], line: str) -> None:
    """Said before any work, and nothing changes."""
    if command[0] == "table":
        assert cli.main([word.format(disk=disk) for word in ("knn", *LOADED, "--data", "{disk}/data", "--k", "[10]")]) == 0
    before = contents(disk)
    mount("-o", "remount,ro", str(disk))
    assert line_of([word.format(disk=disk) for word in command], capsys) == line.format(disk=disk)
    assert contents(disk) == before


# -- a process that hangs


def stopped_step(rank: int, file: Path, learner: DinoLearner, *given: Any) -> Any:
    """DinoLearner.step, but one process is stopped in the second one, as a debugger or a frozen machine does."""
    if (learner.steps, distributed.rank()) == (1, rank):
        file.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return real_step(learner, *given)


def outlived(step: Callable[..., Any], file: Path, command: list[str]) -> tuple[int, float]:
    """Status of a training beside one that is stopped, and its seconds from then on; then the stopped one is killed."""
    status = command_with(step, command)
    seconds = time.time() - file.stat().st_mtime
    os.kill(int(file.read_text()), signal.SIGKILL)
    return status, seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped_ends_the_other(tmp_path: Path, rank: int) -> None:
    """Within DINO_SIMPOOL_TIMEOUT, with a line and error.txt. The first process also holds the store by which they met."""
    cfg = config(
        write_images(tmp_path), tmp_path / "run", batch_size=8, accumulate=1, save_every_steps=1, knn_train=None, knn_val=None
    )
    (tmp_path / "run.yaml").write_text(dump(cfg))
    step = functools.partial(stopped_step, rank, tmp_path / "stopped")
    command = ["train", "--config", str(tmp_path / "run.yaml")]
    environments = [each | {"DINO_SIMPOOL_TIMEOUT": "6"} for each in group()]
    outcomes = run_processes(outlived, step, tmp_path / "stopped", command, environments=environments)
    assert outcomes[rank].status == -signal.SIGKILL
    status, seconds = outcomes[1 - rank].value
    lines = outcomes[1 - rank].stderr.splitlines()
    speaker = "dino-simpool train" + (" [process 1]" if rank == 0 else "")
    assert status == 1 and seconds < 20
    assert lines[-1].startswith(f"{speaker}: error: another process did not answer in time: it hangs, or its machine is gone.")
    assert not any("Traceback" in line for line in lines)
    assert f'"process": {1 - rank}' in (tmp_path / "run" / "error.txt").read_text()
    assert read_state(tmp_path / "run" / "last.pth")["step"] == 1


def interrupted_twice(file: Path, step: Callable[..., Any], command: list[str]) -> int:
    """A training that Ctrl-C reaches twice, once the other process is stopped. The kernel sends it while torch waits."""
    if os.environ["RANK"] == "0":
        signals.GRACE = 0.5
        number = os.getpid()
        wait = f"while ! [ -s {file} ]; do sleep 0.1; done; sleep 1; kill -INT {number}; sleep 1; kill -INT {number}"
        subprocess.Popen(["sh", "-c", f"{wait}; sleep 5; kill -KILL $(cat {file})"])
    return command_with(step, command)


def test_a_second_ctrl_c_ends_a_process_that_waits_for_another(tmp_path: Path) -> None:
    """Python handles no signal while torch waits, here for up to five minutes."""
    cfg = config(
        write_images(tmp_path), tmp_path / "run", batch_size=8, accumulate=1, save_every_steps=1, knn_train=None, knn_val=None
    )
    (tmp_path / "run.yaml").write_text(dump(cfg))
    step = functools.partial(stopped_step, 1, tmp_path / "stopped")
    command = ["train", "--config", str(tmp_path / "run.yaml")]
    environments = [each | {"DINO_SIMPOOL_TIMEOUT": "300"} for each in group()]
    waiting, stopped = run_processes(interrupted_twice, tmp_path / "stopped", step, command, environments=environments)
    assert waiting.status == 128 + signal.SIGINT and stopped.status == -signal.SIGKILL
    assert waiting.stderr.splitlines()[-1].startswith("stopped by a second SIGINT while it waits for another process: ")
    assert read_state(tmp_path / "run" / "last.pth")["step"] == 1


def raising_step(learner: DinoLearner, *given: Any) -> Any:
    """DinoLearner.step, but the second process fails in the second one."""
    if (learner.steps, distributed.rank()) == (1, 1):
        raise ArithmeticError("made up")
    return real_step(learner, *given)


def test_a_process_that_fails_ends_the_other(tmp_path: Path) -> None:
    """At once. error.txt begins with the first failure: its process, host and traceback."""
    cfg = config(
        write_images(tmp_path), tmp_path / "run", batch_size=8, accumulate=1, save_every_steps=1, knn_train=None, knn_val=None
    )
    (tmp_path / "run.yaml").write_text(dump(cfg))
    command = ["train", "--config", str(tmp_path / "run.yaml")]
    started = time.monotonic()
    outcomes = run_processes(command_with, raising_step, command, environments=group())
    assert time.monotonic() - started < 60 and [outcome.status for outcome in outcomes] == [0, 1]
    assert outcomes[0].value == 1 and "ArithmeticError: made up" in outcomes[1].stderr
    said = "another process ended: its own error line, or error.txt in the folder of the run, says why"
    assert outcomes[0].stderr.splitlines()[-1] == f"dino-simpool train: error: {said}"
    first, *_ = (json.loads(line) for line in (tmp_path / "run" / "error.txt").read_text().splitlines())
    assert (first["error"], first["process"], first["host"]) == ("ArithmeticError: made up", 1, socket.gethostname())
    assert first["step"] == 2 and any("in raising_step" in line for line in first["traceback"])
    assert read_state(tmp_path / "run" / "last.pth")["step"] == 1


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    """By the first process, at once."""
    cfg = config(write_images(tmp_path), tmp_path / "run", batch_size=8, accumulate=1, knn_train=None, knn_val=None)
    (tmp_path / "run.yaml").write_text(dump(cfg))
    first, _ = group()
    with socket.create_server(("0.0.0.0", int(first["MASTER_PORT"]))):
        (outcome,) = run_processes(cli.main, ["train", "--config", str(tmp_path / "run.yaml")], environments=[first])
    assert outcome.value == 1
    port = first["MASTER_PORT"]
    assert outcome.stderr.splitlines()[-1] == (
        f"dino-simpool train: error: port {port} is in use, perhaps by another run: set MASTER_PORT to a free one"
    )
    assert "Traceback" not in outcome.stderr and not (tmp_path / "run").exists()
