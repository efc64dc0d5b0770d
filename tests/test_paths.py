"""Missing files and folders: found by looking, before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_simpool import cli
from dino_simpool.config import ExtractConfig, TrainConfig, parse
from dino_simpool.paths import check_paths

ROOT = Path(cli.__file__).parents[1]
MISTAKES = {
    "train --data.root none --run.out out": "none does not exist: give a folder of images",
    "train --data.root notes --run.out out": "no images in notes (left out: 1 .txt): give a folder",
    "train --data.root [images,none] --run.out out": "none does not exist: give a folder of images",
    "train --data.root images": "run.out is empty: give the folder of this run",
    "train --data.root images --run.out weights.pth": "cannot write to weights.pth (Not a directory): give another run.out",
    "train --data.root images --run.out out --run.knn_train none --run.knn_val images": "none does not exist, only images",
    "train --data.root images --run.out out --run.init none.pth": "no checkpoint none.pth: give last.pth",
    "train --config none": "no recipe none",
    "knn --data images": "no checkpoint is given: give --checkpoint",
    "knn --checkpoint none.pth --data images": "no checkpoint none.pth: give last.pth",
    "knn --checkpoint images --data images": "no checkpoint images: it is a folder, give a file in it, such as last.pth",
    "knn --checkpoint timm:resnet18 --weights none --data images --out out": "no weights none: give a file, or random",
    "knn --features pixels": "no data is given: give --data DIR",
    "knn --features none": "none does not exist: give features encoder, or a folder",
    "knn --features images --data none": "none does not exist: give data a folder",
    "knn --features images --checkpoint none.pth": "no checkpoint none.pth: give last.pth",
    "linear --protocol grid --features weights.pth": "weights.pth is no folder: give features encoder, or a folder",
    "recall --features images --layout sop": "no data is given: give --data DIR",
    "linear --checkpoint weights.pth --data none": "none does not exist: give data a folder",
    "linear --checkpoint weights.pth --data images": "images/val does not exist, only class",
    "retrieval --checkpoint weights.pth --data none": "none does not exist: give data a folder",
    "retrieval --checkpoint weights.pth --data images --distractors none": "none does not exist: correct distractors",
    "recall --checkpoint weights.pth": "no data is given: give --data DIR",
    "masks --checkpoint weights.pth --data images": "images/val does not exist, only class",
    "attention --checkpoint weights.pth --data notes": "no images in notes (left out: 1 .txt)",
    "resources --checkpoint none": "no checkpoint none",
    "table": "no results are given",
    "table none": "none does not exist: correct results",
    "extract --checkpoint weights.pth --data notes --out out": "no images in notes (left out: 1 .txt)",
    "search --index none --query images --out out": "none does not exist: give index a folder",
    "check-data notes": "no images in notes (left out: 1 .txt)",
    "convert --checkpoint none.pth --to onnx --out out": "no checkpoint none.pth: give last.pth",
    "convert --checkpoint weights.pth --to onnx": "no folder is given: give --out DIR",
    "report notes": "notes holds no run",
    "bench data none": "none does not exist: give a folder of images",
    "bench knn --out weights.pth": "cannot write to weights.pth (Not a directory): give another --out",
    "bench step --out weights.pth": "cannot write to weights.pth (Not a directory): give another --out",
    "synthetic weights.pth": "cannot write to weights.pth (Not a directory): give another --out",
}
"""Of every command: its arguments, and how the line begins that it ends with."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: images/class/0.png, notes/a.txt and a checkpoint of nothing."""
    for name in ("images/class/0.png", "notes/a.txt", "weights.pth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_finds_mistakes_without_torch(here: Path) -> None:
    """All in one process, in which nothing heavy may be imported by the end."""
    program = (
        "import sys, json\n"
        "from dino_simpool import cli\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    print(cli.main(line.split()), 'torch' in sys.modules, 'numpy' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, json.dumps(list(MISTAKES))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    errors = done.stderr.splitlines()
    assert len(errors) == len(MISTAKES)
    for line, error, ended in zip(MISTAKES, errors, done.stdout.splitlines(), strict=True):
        assert error.partition(": error: ")[2].startswith(MISTAKES[line]), (line, error)
        assert ended == ("2" if "--config" in line else "1") + " False False", line
    assert {" ".join(line.split()[:2]) if line.startswith("bench") else line.split()[0] for line in MISTAKES} == {
        *cli.COMMANDS
    } - {"submit"}
    assert sorted(path.name for path in here.iterdir()) == ["images", "notes", "weights.pth"], "nothing is made"


@pytest.mark.parametrize("name", ["0.png", "SHARD.TAR", "a.tar.gz", "x.HEIC"])
def test_a_folder_with_something_to_read_is_left_to_the_command(here: Path, name: str) -> None:
    (here / "notes" / "deep" / "er").mkdir(parents=True)
    (here / "notes" / "deep" / "er" / name).touch()
    check_paths(parse(TrainConfig, ["--data.root", "notes", "--run.out", "out/deep"]))


def test_what_is_no_data_is_no_image(here: Path) -> None:
    for name in ("@eaDir/0.png", "__MACOSX/0.png", ".hidden.png"):
        (here / "notes" / name).parent.mkdir(exist_ok=True)
        (here / "notes" / name).touch()
    (here / "notes" / "loop").symlink_to(here / "notes")
    with pytest.raises(ValueError, match=r"^no images in notes \(left out: 1 \.txt\)"):
        check_paths(parse(TrainConfig, ["--data.root", "notes", "--run.out", "out"]))


def test_a_link_to_a_folder_of_images_is_followed(here: Path) -> None:
    (here / "notes" / "empty").mkdir()
    (here / "notes" / "empty" / "loop").symlink_to(here / "notes" / "empty")
    with pytest.raises(ValueError, match="no images in notes"):
        check_paths(parse(ExtractConfig, ["--checkpoint", "weights.pth", "--data", "notes", "--out", "out"]))
    (here / "notes" / "link").symlink_to(here / "images")
    check_paths(parse(ExtractConfig, ["--checkpoint", "weights.pth", "--data", "notes", "--out", "out"]))


def test_other_processes_do_not_ask_whether_they_may_write(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = parse(TrainConfig, ["--data.root", "images", "--run.out", "weights.pth"])
    with pytest.raises(ValueError, match="cannot write to weights"):
        check_paths(cfg)
    monkeypatch.setenv("RANK", "1")
    check_paths(cfg)
