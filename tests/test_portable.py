"""One process on Windows and macOS: without what only Linux has, and with loader processes that are not forked."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import miniatures
import pytest
from test_cli import RECIPE, ROOT, fill

from dino_simpool import distributed

SCRIPT = """
import multiprocessing, sys
{guard}    multiprocessing.set_start_method(sys.argv[1])
from dino_simpool.config import TrainConfig, parse
from dino_simpool.train import train
options = ["--config", "recipe.yaml", "--data.root", "data/train", "--data.workers", "1", "--run.out", "run"]
cfg = parse(TrainConfig, options)
{guard}    print("ended", train(cfg))
"""
METHODS = ["spawn", pytest.param("forkserver", marks=pytest.mark.long)]
"""Those of Windows and macOS, and of Python 3.14 on Linux."""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """data/train, data/val and recipe.yaml."""
    fill(tmp_path / "data" / "train", 4)
    fill(tmp_path / "data" / "val", 1)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def python(here: Path, *arguments: str, given: str = "", path: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in a folder. path: where programs are found, "" for the usual places."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"PATH": path} if path else {})
    return subprocess.run([sys.executable, *arguments], cwd=here, env=environment, input=given, capture_output=True, text=True)


def test_every_command_in_one_process_without_what_windows_lacks(here: Path) -> None:
    """without_posix.py takes it away, before anything of ours is imported. The images are in archives too."""
    miniatures.write_roxford5k(here)
    for name in ("train", "val"):
        with tarfile.open(here / f"{name}.tar", "w") as archive:
            archive.add(here / "data" / name, name)
    train = "train --config recipe.yaml --data.root train.tar --run.out run --run.knn_train train.tar --run.knn_val val.tar"
    given = "--checkpoint run/last.pth --workers 0 --device cpu"
    commands = [
        f"{train} --run.stop_after_steps 1",
        train,
        f"knn {given} --data data --k [1]",
        f"linear {given} --data data --epochs 1",
        f"recall {given} --data data/train",
        f"retrieval {given} --data . --dataset roxford5k",
        "synthetic set --train_per_class 1 --val_per_class 1 --size 16",
        f"masks {given} --data set",
        f"attention {given} --data data/val",
        f"extract {given} --data train.tar --out features --index --labels",
        "search --index features --query data/val/a/0.png --out found --workers 0 --device cpu",
        "bench data --data data/val --out bench --loader_seconds 0 --repetitions 1 --images 2 --workers 0 --device cpu",
        "bench knn --out bench --images 64 --products 8 --bank 64 --queries 8 --classes 4 --width 8 --k [1] --repetitions 1",
        "report run --data data --device cpu",
        "table run --out table.txt",
        "check-data data/train --workers 0 --out bad.txt",
        "resources --checkpoint run/last.pth",
        "submit --time 1h -- train --config recipe.yaml --data.root data/train --run.out run",
    ]
    done = python(here, str(ROOT / "tests" / "without_posix.py"), given="\n".join(commands), path=str(here))
    assert done.stdout.splitlines()[-1:] == [f"ended with {'0 ' * (len(commands) - 1)}1"], done.stderr
    assert done.stderr.splitlines()[-1].startswith("dino-simpool submit: error: there is no sbatch here: run submit on a login")
    assert "Traceback" not in done.stderr and not list(here.glob("**/run.lock"))


def test_several_processes_are_refused_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match=r"^several processes need Linux or macOS: start a single one, without torchrun$"):
        distributed.setup("cpu")


@pytest.mark.parametrize("method", METHODS)
def test_training_with_loader_processes_that_are_not_forked(here: Path, method: str) -> None:
    (here / "guarded.py").write_text(SCRIPT.format(guard='if __name__ == "__main__":\n'))
    done = python(here, "guarded.py", method)
    assert done.stdout == "ended run\n", done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_a_script_without_a_guard_is_told_to_have_one(here: Path, method: str) -> None:
    """Its loader process imports it again. It trains nothing, takes no lock, and says what to do."""
    (here / "bare.py").write_text(SCRIPT.format(guard="if True:\n").replace("(sys.argv[1])", "(sys.argv[1], force=True)"))
    done = python(here, "bare.py", method)
    said = "RuntimeError: a loader process imports your script, which starts its work again: put the call below `if __name__"
    assert done.returncode == 1 and said in done.stderr and "DataLoader worker" in done.stderr and done.stdout == ""


def test_a_notebook_trains_and_a_script_from_stdin_is_told(here: Path) -> None:
    """Both have no file that a loader process could import."""
    bare = SCRIPT.format(guard="if True:\n")
    cells = "import code, sys\ncode.InteractiveInterpreter().runcode(compile(sys.stdin.read(), '<cell>', 'exec'))"
    done = python(here, "-c", cells, "spawn", given=bare)
    assert done.stdout == "ended run\n", done.stderr
    done = python(here, "-", "spawn", given=bare.replace('"run"', '"other"'))
    said = "ValueError: Python starts loader processes here by spawn, which imports the script again, and one that is read from"
    assert done.stderr.splitlines()[-1].startswith(said)
