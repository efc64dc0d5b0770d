"""The command line: bad input is one clear line on stderr and a non-zero status, and nothing is written over."""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_simpool import __version__, cli

ROOT = Path(cli.__file__).parents[1]
RECIPE = """\
model: {arch: resnet18, stem: small, width: 8, depth: [1, 1], image_size: 16, gamma: 2}
head: {out_dim: 16, hidden_dim: 16, bottleneck_dim: 8}
crops: {global_size: 16, local_size: 8, num_local: 1}
data: {workers: 0}
run: {batch_size: 4, epochs: 1, device: cpu, save_every_steps: 1}
"""

Fails = Callable[..., str]


def fill(folder: Path, count: int) -> Path:
    """Class folders a and b with `count` images each."""
    noise = np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/train, data/val, recipe.yaml, and run/, which has been trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    fill(folder / "data" / "train", 5)
    fill(folder / "data" / "val", 1)
    (folder / "recipe.yaml").write_text(RECIPE)
    assert cli.main(arguments(folder)) == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "here")


def arguments(here: Path, *more: str, out: str = "run") -> list[str]:
    """A training command that works."""
    return [
        "train",
        "--config",
        f"{here}/recipe.yaml",
        "--data.root",
        f"{here}/data/train",
        "--run.out",
        f"{here}/{out}",
        *more,
    ]


def knn(here: Path, *more: str) -> list[str]:
    """An evaluation that works."""
    return ["knn", "--checkpoint", f"{here}/run/last.pth", "--data", f"{here}/data", "--workers", "0", "--device", "cpu", *more]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below with its time and its bytes, and every folder (whose time tells of the lock that a run held)."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Fails:
    """Run a command that must fail, with one line and without touching anything; returns the line."""

    def run(command: list[str], status: int = 1) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        assert cli.main(command) == status
        out, err = capsys.readouterr()
        assert (
            out == "" and err.startswith(f"dino-simpool {command[0]}: error: ") and err.endswith("\n") and err.count("\n") == 1
        )
        assert contents(tmp_path) == before
        return err.partition(": error: ")[2].strip()

    return run


# -- the control: without these, the failures below might come from anything


def test_the_commands_below_work_when_nothing_is_wrong(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = torch.load(here / "run" / "last.pth", weights_only=True)["teacher"]
    assert cli.main(arguments(here)) == 0, "the finished run is resumed and has nothing to do"
    assert "resuming after step 2 of 2" in capsys.readouterr().err
    again = torch.load(here / "run" / "last.pth", weights_only=True)["teacher"]
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
    assert cli.main(knn(here, "--k", "[1]")) == 0
    assert (here / "run" / "results" / "knn.json").is_file()


# -- data


def test_missing_folder(here: Path, fails: Fails) -> None:
    said = fails(arguments(here, "--data.root", f"{here}/nowhere", out="new"))
    assert said == f"{here}/nowhere does not exist: give a folder of images"


def test_folder_without_images(here: Path, fails: Fails) -> None:
    (here / "empty" / "deep").mkdir(parents=True)
    (here / "empty" / "deep" / "notes.txt").write_text("no image\n")
    assert fails(arguments(here, "--data.root", f"{here}/empty", out="new")).startswith(
        f"no images in {here}/empty (left out: 1 .txt): give a folder"
    )


def test_no_data_and_no_place(here: Path, fails: Fails) -> None:
    assert "set data.root" in fails(arguments(here, "--data.root", "", out="new"))
    assert fails(arguments(here, "--run.out", "")) == "run.out is empty: give the folder of this run"


def test_batch_larger_than_the_data(here: Path, fails: Fails) -> None:
    said = fails(arguments(here, "--run.batch_size", "11", out="new"))
    assert "run.batch_size is 11, but there are only 10 images" in said


def test_batch_that_cannot_be_split(here: Path, fails: Fails) -> None:
    said = fails(arguments(here, "--run.accumulate", "3", out="new"))
    assert said.startswith("run.batch_size 4 cannot be split over 1 process(es) x 3 accumulation step(s): use 3 or 6")


def test_missing_class_folder_for_knn(here: Path, fails: Fails) -> None:
    said = fails(arguments(here, "--run.knn_train", f"{here}/nowhere", "--run.knn_val", f"{here}/data/val", out="new"))
    assert f"{here}/nowhere" in said


@pytest.mark.parametrize("workers", ["0", "1"])
def test_too_large_a_share_of_broken_images_is_named(here: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    broken = here / "data" / "train" / "a" / "0.png"
    broken.write_text("not an image")
    for path in sorted((here / "data" / "train").rglob("*.png"))[4:]:
        path.unlink()  # the four that are left are all in the first step
    assert cli.main(arguments(here, "--data.workers", workers, out="new")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "dino-simpool train: error: 1 of 4 images cannot be read, such as a/0.png (it is not an image of a known"
    )
    assert f"{here}/new/bad_files.txt" in last and len(last) < len(str(broken)) + 300
    assert not (here / "new" / "last.pth").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_ends_an_evaluation_and_is_named(here: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    broken = here / "data" / "val" / "a" / "0.png"
    broken.write_text("not an image")
    assert cli.main(knn(here, "--workers", workers, "--k", "[1]")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    reason = "it is not an image of a known format"
    assert last == f"dino-simpool knn: error: {broken} cannot be read as an image ({reason}): repair or remove it"
    assert not (here / "run" / "results" / "knn.json").exists()


# -- options


def test_wrong_key_in_a_recipe(here: Path, fails: Fails) -> None:
    (here / "recipe.yaml").write_text(RECIPE.replace("gamma", "gama"))
    assert fails(arguments(here, out="new"), 2) == "unknown option model.gama: did you mean model.gamma?"
    assert fails(arguments(here), 2) == "unknown option model.gama: did you mean model.gamma?"


def test_crop_size_not_divisible_by_the_patch(here: Path, fails: Fails) -> None:
    command = [
        "--model.arch",
        "vit_tiny",
        "--model.stem",
        "standard",
        "--model.depth",
        "2",
        "--crops.local_size",
        "96",
        "--model.image_size",
        "224",
    ]
    said = fails(arguments(here, *command, "--crops.global_size", "225", out="new"), 2)
    assert said == "crops.global_size 225 is not divisible by model.patch_size 16: use 224 or 240, or another patch_size"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--model.arch", "resnet19", "did you mean resnet18?"),
        ("--model.num_heads", "5", "num_heads=5"),
        ("--teacher.drop_path", "0.1", "set model.drop_path too"),
        ("--data.subset_per_class", "6", "has 5 images"),
    ],
)
def test_options_that_only_the_model_or_the_data_can_refuse(
    here: Path, fails: Fails, option: str, value: str, words: str
) -> None:
    said = fails(arguments(here, option, value))
    assert words in said


def test_impossible_options_of_an_evaluator(here: Path, fails: Fails) -> None:
    assert "image_size is -1: allowed is 1 to" in fails(knn(here, "--image_size", "-1"), 2)
    assert fails(knn(here, "--which", "best"), 2) == "which is best: allowed is one of teacher, student, untrained"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian", "--run.out", "x"]) == 2
    said = capsys.readouterr()
    assert (
        said.out == "" and said.err == f"dino-simpool: error: there is no command trian; commands: {', '.join(cli.COMMANDS)}\n"
    )


# -- what is in OUT already


@pytest.mark.parametrize(
    "option",
    [
        ("--model.width", "16"),
        ("--model.pool", "gap"),
        ("--model.arch", "resnet34"),
        ("--head.out_dim", "32"),
        ("--optim.name", "sgd"),
    ],
)
def test_run_of_another_model_in_out(here: Path, fails: Fails, option: tuple[str, str]) -> None:
    said = fails(arguments(here, *option))
    name = option[0].removeprefix("--")
    assert (
        said.startswith(f"{here}/run holds a run of another model ({name} ")
        and f" -> {option[1]}): give another run.out" in said
    )


def test_run_on_other_images_in_out(here: Path, fails: Fails) -> None:
    (here / "data" / "train" / "a" / "0.png").unlink()
    assert "was trained on 10 images, now there are 9, not the same: give another run.out" in fails(arguments(here))


def test_truncated_checkpoints(here: Path, fails: Fails) -> None:
    last, prev = here / "run" / "last.pth", here / "run" / "prev.pth"
    for path in (last, prev):
        path.write_bytes(path.read_bytes()[:1000])
    said = fails(arguments(here))
    assert f"{last} cannot be read (truncated" in said and f"{prev} cannot be read" in said and "nothing to resume from" in said
    assert fails(knn(here)).startswith(f"{last} cannot be read (truncated")


# -- no write permission


@contextlib.contextmanager
def without_privileges(folder: Path) -> Iterator[None]:
    """As nobody if the tests run as root, which may write anywhere."""
    user = os.geteuid()
    if user == 0:
        try:
            os.seteuid(65534)
        except OSError:
            pytest.skip("this root cannot become another user")
    try:
        if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            pytest.skip("temporary folders are closed to other users here")
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def open_to_all(trained: Path) -> Iterator[Path]:
    """A copy of the trained folder that any user may read; pytest's own folders are private."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        copy = shutil.copytree(trained, folder / "here")
        copy.chmod(0o755)  # copied with the modes of pytest's
        yield copy
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)


@pytest.mark.parametrize("out", ["run", "fresh", "fresh/deeper"])
def test_training_without_write_permission(open_to_all: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    fresh = open_to_all / "fresh"
    fresh.mkdir()
    for folder in (open_to_all / "run", fresh):
        folder.chmod(0o555)
    before = contents(open_to_all)
    with without_privileges(open_to_all):
        assert cli.main(arguments(open_to_all, out=out)) == 1
    assert capsys.readouterr().err == (
        f"dino-simpool train: error: cannot write to {open_to_all}/{out} (Permission denied): give another run.out\n"
    )
    assert contents(open_to_all) == before


def test_evaluation_without_write_permission(open_to_all: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (open_to_all / "run").chmod(0o555)
    with without_privileges(open_to_all):
        assert cli.main(knn(open_to_all)) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and f"{open_to_all}/run/results" in said.err and "Permission denied" in said.err


def test_images_without_read_permission(open_to_all: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (open_to_all / "data" / "train" / "a").chmod(0o000)
    with without_privileges(open_to_all):
        assert cli.main(arguments(open_to_all, out="new")) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and f"{open_to_all}/data/train/a" in said.err and "cannot be read" in said.err


@pytest.mark.parametrize("out", ["recipe.yaml", "recipe.yaml/deeper"])
def test_file_in_place_of_a_folder(here: Path, fails: Fails, out: str) -> None:
    """No user may write there."""
    assert fails(arguments(here, out=out)).startswith(f"cannot write to {here}/{out} (")
    assert f"{here}/{out}" in fails(knn(here, "--out", f"{here}/{out}"))


# -- evaluators and the other commands


def test_missing_checkpoint(here: Path, fails: Fails) -> None:
    assert fails(knn(here, "--checkpoint", f"{here}/run/best.pth")).startswith(
        f"no checkpoint {here}/run/best.pth: give last.pth"
    )
    assert fails(["knn", "--data", f"{here}/data"]).startswith("no checkpoint is given: give --checkpoint")
    assert fails(["linear", "--data", f"{here}/data"]).startswith("no checkpoint is given: give --checkpoint")


@pytest.mark.parametrize("name", ["text.pth", "foreign.pth", "empty.pth"])
def test_file_that_is_no_checkpoint(here: Path, fails: Fails, name: str) -> None:
    torch.save({"state_dict": {}}, here / "foreign.pth")
    (here / "text.pth").write_text("hello")
    (here / "empty.pth").touch()
    assert fails(knn(here, "--checkpoint", f"{here}/{name}")).startswith(f"{here}/{name} ")


@pytest.mark.parametrize("command", [["report"], ["synthetic", "{here}/recipe.yaml"], ["report", "{here}/nowhere"]])
def test_other_commands_fail_in_one_line_too(here: Path, fails: Fails, command: list[str]) -> None:
    fails([part.format(here=here) for part in command])


# -- how a line is said


@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
@pytest.mark.parametrize(
    ("command", "left"),
    [
        (["knn"], "no result was written"),
        (["linear", "--epochs", "1"], "no result was written"),
        (["extract"], "what is done is kept, run the same command again to go on"),
        (["attention"], "the pictures made so far are kept"),
    ],
)
def test_a_signal_ends_every_long_command_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], left: str, kind: str
) -> None:
    """While a batch is computed, and with a loader process. The same command then works."""
    number, real = getattr(signal, kind), torch.nn.Conv2d.forward
    options = ["--checkpoint", f"{here}/run/last.pth", "--data", f"{here}/data", "--workers", "1", "--device", "cpu"]
    options += ["--out", f"{here}/out"]
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "forward", lambda *a, **k: (os.kill(os.getpid(), number), real(*a, **k))[1])
        assert cli.main([*command, *options]) == 128 + number
    assert signal.getsignal(number) == before
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"dino-simpool {command[0]}: stopped by {kind}: {left}"
    assert not any("Traceback" in line for line in said)
    assert not list(here.glob("out/*.json"))
    shutil.rmtree(f"{here}/out") if command == ["attention"] else None
    assert cli.main([*command, *options]) == 0


def test_a_signal_that_an_import_loses_is_raised_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As happens in modules written in C. Before, the command went on as if nothing had been."""
    real = importlib.import_module

    def losing(name: str, *package: str) -> Any:
        with contextlib.suppress(BaseException):
            if name == "dino_simpool.bench.knn":
                os.kill(os.getpid(), signal.SIGTERM)
        return real(name, *package)

    monkeypatch.setattr("dino_simpool.bench.knn.main", lambda cfg: pytest.fail("it went on"))
    monkeypatch.setattr(importlib, "import_module", losing)
    assert cli.main(["bench", "knn"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "dino-simpool bench knn: stopped by SIGTERM: no result was written\n"
    monkeypatch.setattr(importlib, "import_module", real)
    monkeypatch.setattr("dino_simpool.bench.knn.main", lambda cfg: None)
    assert cli.main(["bench", "knn"]) == 0  # the next command of the process is another one


def test_line_names_the_process_and_never_breaks(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["train", "--model.arh", "x"]) == 2
    assert (
        capsys.readouterr().err == "dino-simpool train [process 3]: error: unknown option model.arh: did you mean model.arch?\n"
    )


def test_a_message_of_several_lines_is_said_in_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cfg: object) -> None:
        raise OSError("one\n  and  two")

    monkeypatch.setattr("dino_simpool.bench.knn.main", fail)
    assert cli.main(["bench", "knn"]) == 1
    assert capsys.readouterr().err == "dino-simpool bench knn: error: one and two\n"


def test_a_dead_loader_process_is_told_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the system ends one for want of memory, in an evaluation and in a training."""
    for dataset, command in (("TransformedImages", knn(here, "--k", "[1]", "--workers", "1")),
                             ("AugmentedImages", arguments(here, "--data.workers", "1", out="new"))):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(f"dino_simpool.data.loaders.{dataset}.__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            assert cli.main(command) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"dino-simpool {command[0]}: error: a loader process died; out of memory, or too little")


def test_traceback_on_request(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_SIMPOOL_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"run\.out is empty"):
        cli.main(arguments(here, "--run.out", ""))


def test_a_mistake_of_ours_is_not_made_a_line_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cfg: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("dino_simpool.bench.knn.main", fail)
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["bench", "knn"])


# -- the ways in


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_leads_somewhere(name: str) -> None:
    module, function = cli.COMMANDS[name][1].split(":")
    assert callable(getattr(importlib.import_module(f"dino_simpool.{module}"), function))


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("script", "shown"),
    [("dino_simpool/__main__.py", "commands:"), ("eval/eval_knn.py", "--temperature"), ("eval/eval_linear.py", "--protocol"),
     ("eval/eval_masks.py", "--max_images"), ("eval/eval_recall.py", "--map_at_r"), ("eval/eval_retrieval.py", "--preset"),
     ("eval/eval_resources.py", "--recipe"), ("eval/extract_features.py", "--level"), ("eval/search_images.py", "--index"),
     ("eval/visualize_attention.py", "--mass"), ("eval/make_tables.py", "--results"), ("eval/check_data.py", "--layout")],
)  # fmt: skip
def test_scripts_are_the_same_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, shown: str
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert left.value.code == 0 and shown in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("check-data", ["A", "--out", "x"], ["--data", "A", "--out", "x"]),
        ("check-data", ["A", "B", "--out", "x"], ['--data=["A", "B"]', "--out", "x"]),
        ("table", ["A"], ['--results=["A"]']),
        ("report", ["A"], ["--out", "A"]),
        ("knn", ["A"], ["A"]),
        ("table", ["--out", "x"], ["--out", "x"]),
    ],
)
def test_first_arguments_without_a_name(command: str, given: list[str], meant: list[str]) -> None:
    assert cli.with_named_arguments(command, given) == meant
