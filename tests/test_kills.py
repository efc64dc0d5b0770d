"""A run that is killed at any moment, and started again by the same command, ends as if nothing had been.

In CI five kills spread evenly over a run, and one inside a save; `make test-long` has a hundred, and counts
them by phase.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_distributed import SERVER
from test_train import assert_same_run, changed, config, write_images

from dino_simpool import logs, train
from dino_simpool.config import TrainConfig
from dino_simpool.dino.learner import DinoLearner

PHASES = {"save": (train, "_save"), "k-NN": (train, "knn_accuracy"), "export": (train, "export_encoder"),
    "log": (logs.RunLog, "write"), "step": (DinoLearner, "step")}  # fmt: skip
"""What a run does, and the function that does it. Between these it waits for images, or begins and ends."""


def _marked(cfg: TrainConfig, file: Path) -> None:
    """train(cfg) in a process of its own. The file has one byte, the phase: its place in PHASES, or a space."""
    phase = os.open(file, os.O_CREAT | os.O_RDWR)
    os.pwrite(phase, b" ", 0)

    def marked(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            before = os.pread(phase, 1, 0)
            os.pwrite(phase, b"%d" % number, 0)
            try:
                return real(*arguments, **options)
            finally:
                os.pwrite(phase, before, 0)

        return call

    for number, (owner, function) in enumerate(PHASES.values()):
        setattr(owner, function, marked(number, getattr(owner, function)))
    train.train(cfg)


def phase_of(file: Path) -> str:
    """Where a process is, or was when it was killed."""
    phase = file.read_text().strip() if file.exists() else ""
    return [*PHASES][int(phase)] if phase else "between"


def run(cfg: TrainConfig, file: Path, *, kill_after: float | None = None, kill_in: str = "") -> tuple[str, float]:
    """Train, and kill the process so many seconds after its first step began, or in a phase; where it was, and its seconds."""
    file.unlink(missing_ok=True)
    process = SERVER.Process(target=_marked, args=(cfg, file))
    process.start()
    while not (file.exists() and file.read_bytes().strip()) and process.is_alive():
        time.sleep(0.001)
    started = time.monotonic()
    while process.is_alive():
        if (kill_after is not None and time.monotonic() - started >= kill_after) or (kill_in and phase_of(file) == kill_in):
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0 if kill_in else 0.0005)
    process.join()
    return phase_of(file), time.monotonic() - started


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, float]:
    """A run of three epochs that nothing interrupted, with k-NN and saves within the epochs; its seconds."""
    root = tmp_path_factory.mktemp("whole")
    cfg = config(write_images(root / "images"), root / "out", epochs=3, save_every_steps=2, log_every=1)
    _, seconds = run(cfg, root / "phase")
    return cfg, seconds


def killed_and_resumed(whole: tuple[TrainConfig, float], folder: Path, **kill: Any) -> str:
    """Kill a run and start it again: its result is that of the whole run. Where it was killed."""
    reference, _ = whole
    cfg = changed(reference, out=folder / "out")
    phase, _ = run(cfg, folder / "phase", **kill)
    run(cfg, folder / "phase")
    out = Path(cfg.run.out)
    assert_same_run(out, Path(reference.run.out))
    assert {path.name for path in out.iterdir()} == {path.name for path in Path(reference.run.out).iterdir()}
    return phase


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_killed_at_any_moment(whole: tuple[TrainConfig, float], tmp_path: Path, share: float) -> None:
    killed_and_resumed(whole, tmp_path, kill_after=share * whole[1])


def test_killed_inside_a_save(whole: tuple[TrainConfig, float], tmp_path: Path) -> None:
    assert killed_and_resumed(whole, tmp_path, kill_in="save") == "save"


@pytest.mark.long
def test_killed_a_hundred_times(whole: tuple[TrainConfig, float], tmp_path: Path) -> None:
    """Spread evenly over the run."""
    found: Counter[str] = Counter()
    for number in range(100):
        (tmp_path / str(number)).mkdir()
        found[killed_and_resumed(whole, tmp_path / str(number), kill_after=(number + 0.5) / 100 * whole[1])] += 1
    print(dict(found))
    assert set(found) >= {"step", "save", "k-NN"} and found.total() == 100
