"""Numbers of a training or a model that were not what the options or the messages said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from harness import Tool
from PIL import Image


def test_published_positions_are_not_resampled_at_their_native_grid(
    tool: Tool, model: Path, images: Path, tmp_path: Path
) -> None:
    """An image of 35 x 32 pixels has the 4 x 4 patches of the model, whose positions stay as they are. 0.1 resampled them by
    4.1 / 4, where the GPUs that made the published weights copied."""
    Image.open(images / "ref.png").convert("RGB").resize((35, 32)).save(tmp_path / "image.png")
    maps = {}
    for name in ("size", "dino"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(model, folder)
        options = json.loads((model.parent / "model.json").read_text()) | {"pos_interp": name}
        (folder / "model.json").write_text(json.dumps(options))
        out = tmp_path / f"maps_{name}"
        ended = tool(
            "attention", "--checkpoint", folder / model.name, "--data", tmp_path / "image.png", "--fit", "native", "--out", out
        )
        assert ended.status == 0, ended.text
        (file,) = out.glob("**/*.npy")
        maps[name] = np.load(file)
    assert np.array_equal(maps["size"], maps["dino"])


def train(tool: Tool, folders: Path, out: Path, *options: object) -> tuple[str, list[dict[str, Any]]]:
    """Train a tiny ViT for one epoch of 15 steps on 60 images: what was printed, and the log's lines of steps, one each."""
    given = {
        "data.root": folders / "test" / "train", "data.workers": 0, "run.out": out, "run.device": "cpu", "run.threads": 1,
        "run.epochs": 1, "run.batch_size": 4, "run.log_every": 1, "run.knn_every": 0,
        "model.arch": "vit_tiny", "model.width": 8, "model.depth": 1, "model.heads": 1, "model.patch_size": 8,
        "model.image_size": 32,
        "head.out_dim": 32, "head.hidden_dim": 16, "head.bottleneck_dim": 8,
        "crops.global_size": 32, "crops.local_size": 16, "crops.num_local": 1,
    }  # fmt: skip
    arguments = [word for name, value in given.items() for word in (f"--{name}", value)]
    ended = tool("train", *arguments, *options)
    assert ended.status == 0, ended.text
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return ended.text, [record for record in records if record["kind"] == "step"]


def test_a_temperature_warmup_shorter_than_an_epoch_is_not_lost(tool: Tool, folders: Path, tmp_path: Path) -> None:
    """30 epochs in a run of one are scaled to 30 % of its 15 steps. 0.1 said so too, and began with the final temperature."""
    said, steps = train(tool, folders, tmp_path)
    assert "scaled to 4 steps, 30% of the run" in said
    temperatures = [record["teacher_temperature"] for record in steps]
    np.testing.assert_allclose(temperatures, [0.04, 0.05, 0.06, *[0.07] * 12], rtol=1e-12)


def test_accumulated_passes_with_batch_norm_are_another_training_and_it_says_so(
    tool: Tool, folders: Path, tmp_path: Path
) -> None:
    """A ResNet in passes of 2 images: its BatchNorm never sees the batch of 4. 0.1 said nothing before step 1."""
    resnet = ("--model.arch", "resnet18", "--model.heads", "null", "--model.depth", "[1,1]", "--model.stem", "small")
    said, _ = train(tool, folders, tmp_path, *resnet, "--run.accumulate", 2, "--run.epochs", "1it")
    (line,) = (line for line in said.splitlines() if line.startswith("warning") and "run.accumulate" in line)
    assert "BatchNorm" in line and "2 images" in line


def test_gradient_norms_in_float16_are_numbers_and_skipped_steps_are_counted(tool: Tool, folders: Path, tmp_path: Path) -> None:
    """The scale of the loss starts too high, as it should, and the first steps overflow: they have no norm. 0.1 lost the mean
    over them and the others."""
    options = ("--run.precision", "fp16", "--run.epochs", 2, "--run.log_every", 30)
    said, steps = train(tool, folders, tmp_path, *options)
    (last,) = (record for record in steps if record["step"] == 30)
    assert last["grad_norm"] is not None and last["grad_norm"] > 0
    assert 0 < last["skipped_steps"] < 29
    assert f"{last['skipped_steps']} of 29 steps were skipped" in said
