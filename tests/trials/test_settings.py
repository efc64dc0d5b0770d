"""Settings of other people: numbers that are none, files in recipes, names of other tools, paths that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Tool


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
