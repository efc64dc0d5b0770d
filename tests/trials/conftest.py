"""What other people's files and settings do to the tool, through its command line only.

These tests run on version 0.1 as well (commit 93b63a8), where each fails for the reason that its docstring names: check out
that commit as OLD, and call, from here,

    PYTHONPATH=OLD .venv/bin/pytest --confcutdir tests/trials tests/trials

`images/` holds one photograph in many guises (`ref.png` and `ref_grey.png` are what the others show), `folders.py` makes class
folders, lists and archives of it. `model` was written by 0.1, so that both versions read it.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import Ended, Features, Tool

from dino_simpool.cli import main

HERE = Path(__file__).resolve().parent


@pytest.fixture
def tool(capfd: pytest.CaptureFixture[str]) -> Tool:
    """Run a command line, given as separate arguments: tool("knn", "--data", folder)."""

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Ended(status, *capfd.readouterr())

    return run


@pytest.fixture
def process() -> Tool:
    """The same in a process of its own, which takes seconds: for what a terminal, a signal or a whole process changes."""

    def run(*arguments: object, env: dict[str, str] | None = None, timeout: float = 120) -> Ended:
        command = [sys.executable, "-m", "dino_simpool", *map(str, arguments)]
        # Elsewhere than here, where -m would find this version before the one in PYTHONPATH.
        ended = subprocess.run(command, capture_output=True, env=os.environ | (env or {}), timeout=timeout, cwd=HERE)
        out, err = (text.decode("utf-8", "surrogateescape") for text in (ended.stdout, ended.stderr))
        return Ended(ended.returncode, out, err)

    return run


@pytest.fixture
def images() -> Path:
    """The photograph in many guises; not to be written to."""
    return HERE / "images"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What folders.py makes; not to be written to, as all tests share it."""
    folder = tmp_path_factory.mktemp("folders")
    subprocess.run([sys.executable, str(HERE / "folders.py"), str(folder)], check=True)
    return folder


@pytest.fixture
def model() -> Path:
    """The weights of a tiny ViT, trained for three epochs on the embedded data set."""
    return HERE.parent / "release_0_1" / "run" / "backbone.safetensors"


@pytest.fixture
def features(images: Path, model: Path, tmp_path: Path, tool: Tool) -> Features:
    """features("a.tif", "b.png"): one normalized feature of each file of `images`, in that order, by `extract`."""

    def extract(*names: str, options: tuple[object, ...] = ()) -> np.ndarray:
        folder, out = tmp_path / "images", tmp_path / "features"
        for place in (folder, out):
            shutil.rmtree(place, ignore_errors=True)
        folder.mkdir()
        for number, name in enumerate(names):
            shutil.copy(images / name, folder / f"{number}_{name}")
        ended = tool("extract", "--checkpoint", model, "--data", folder, "--out", out, "--workers", 0, *options)
        assert ended.status == 0, ended.text
        rows = np.load(out / "features.npy").astype(np.float64)
        assert len(rows) == len(names)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return extract
