"""Settings of other people: numbers that are none, files in recipes, names of other tools, paths that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Tool
from PIL import Image


@pytest.mark.parametrize(
    "options",
    [
        "knn --temperature .inf",
        "knn --temperature 1e30",
        "knn --k [0]",
        "linear --held_out .nan",
        "masks --max_images 0",
        "masks --max_images -1",
        "report --num_images 0",
        "synthetic --size -1",
        "synthetic --train_per_class 0",
        "bench@data --loader_seconds .inf",
        "bench@knn --noise .nan",
        "extract --batch_size 1" + 30 * "0",
        "train --teacher.temperature 1e30",
        "train --optim.min_lr .inf",
        "train --optim.momentum .nan",
        "train --run.save_minutes .nan",
        "train --run.log_every 1" + 30 * "0",
        "train --run.epochs 1e30",
        "train --data.workers 100000",
        "train --crops.shrink_margin .inf",
        "train --model.mean [.nan,0.5,0.5]",
        "train --model.gamma 1e30",
    ],
)
def test_a_number_that_can_only_be_a_mistake_is_refused_by_name_and_range(tool: Tool, options: str) -> None:
    """0.1 took each of these, and said something about the missing folder or checkpoint, or began to work."""
    command, name, value = options.split(" ")
    ended = tool(*command.split("@"), name, value, *(["--run.out", "none"] if command == "train" else []))
    assert ended.status == 2 and ended.out == ""
    assert f"error: {name[2:]} is " in ended.err and "allowed is " in ended.err and ended.err.count("\n") == 1


def test_gamma_beyond_float32_names_the_largest(tool: Tool) -> None:
    """0.1 built the model, whose values overflow."""
    ended = tool("resources", "--model.arch", "vit_tiny", "--model.gamma", "40")
    assert ended.status == 1 and "give at most 26.4" in ended.err and ended.err.count("\n") == 1
    assert tool("resources", "--model.arch", "vit_tiny", "--model.gamma", "26.4").status == 0


@pytest.mark.parametrize("text", ["config: {file}\n", "<<: {{config: {file}}}\n"])
def test_no_recipe_reads_another_file(tool: Tool, tmp_path: Path, text: str) -> None:
    """0.1 read the file that `config:` names, and printed its content."""
    secret, recipe, harmless = (tmp_path / name for name in ("passwd", "recipe.yaml", "harmless.yaml"))
    secret.write_text("root:x:0:0\n")
    harmless.write_text("run: {seed: 1}\n")
    recipe.write_text(text.format(file=secret))
    for recipes in (
        ["--config", recipe],
        ["--config", harmless, "--config", recipe],
        ["--config", recipe, f"--config={harmless}"],
    ):
        ended = tool("train", *recipes, "--run.out", tmp_path / "out")
        assert ended.status == 2 and "root:x" not in ended.text and ended.err.count("\n") == 1
        assert "config" in ended.err or "group of options" in ended.err


SMALL = ["--model.arch", "resnet18", "--model.stem", "small", "--model.width", "8", "--model.depth", "[1,1]",
         "--model.image_size", "16", "--head.out_dim", "16", "--head.hidden_dim", "16", "--head.bottleneck_dim", "8",
         "--crops.num_local", "0", "--data.workers", "0", "--run.device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of 16 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        Image.effect_noise((16, 16), 50 + number).convert("RGB").save(folder / f"{number}.png")
    return folder


def test_settings_that_cannot_train_are_warned_of_before_the_first_step(tool: Tool, pictures: Path, tmp_path: Path) -> None:
    """0.1 trained without a word: a teacher as soft as its student, a rate of 50, images enlarged fourfold."""
    options = ["--teacher.temperature", "0.1", "--optim.lr", "50", "--crops.global_size", "64", "--run.epochs", "1it"]
    ended = tool("train", *SMALL, "--data.root", pictures, "--run.out", tmp_path / "out", "--run.batch_size", 8, *options)
    assert ended.status in (0, 1)  # whether such a run survives its step is left open
    said = ended.err.partition("step 1")[0]
    assert "warning: teacher.temperature 0.1 is not below loss.student_temperature 0.1" in said
    assert "warning: optim.lr 50 * batch 8 / 256 gives a peak learning rate of 1.6" in said
    assert "have a shorter side of at most 16 pixels, and crops.global_size is 64" in said


def test_a_longer_run_that_goes_on_with_another_rate_is_warned_of(tool: Tool, pictures: Path, tmp_path: Path) -> None:
    """0.1 said that run.epochs differs, and not what this does to the learning rate."""
    command = ["train", *SMALL, "--data.root", pictures, "--run.out", tmp_path / "out", "--run.batch_size", 8,
               "--crops.global_size", 16, "--optim.warmup", 0, "--optim.min_lr", 0]  # fmt: skip
    assert tool(*command, "--run.epochs", "6it").status == 0
    ended = tool(*command, "--run.epochs", "12it")
    assert ended.status == 0 and "warning: the learning rate jumps from " in ended.err
    assert "(6 steps before, 12 now)" in ended.err


@pytest.mark.parametrize(
    ("word", "answer"),
    [("resume", "there is none, a run is resumed by the same command"), ("pretrained", "run.init"),
     ("devices", "torchrun"), ("in_chans", "three channels"), ("wandb", "log.jsonl"), ("img_size", "crops.global_size")],
)  # fmt: skip
def test_options_of_other_tools_are_understood(tool: Tool, word: str, answer: str) -> None:
    """0.1 named a distant option, such as run.precision for pretrained."""
    ended = tool("train", f"--{word}", "1")
    assert ended.status == 2 and f"unknown option {word}: " in ended.err and answer in ended.err
