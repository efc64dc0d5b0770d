"""What version 0.1 wrote (commit 93b63a8) is read, resumed and tabulated by this one.

tests/release_0_1/ was written by that commit on the embedded data set, 4 training and 2 held-out images a class:

    stopped/    a training of a tiny ViT, stopped after step 7 of 15      run/    the same training at its end, with its results
    features/   `extract --index` of run/backbone.safetensors             table.csv    `table run --format csv`
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dino_simpool import load_encoder
from dino_simpool.cli import main
from dino_simpool.logs import TIMING_FIELDS, read_log

RELEASE = Path(__file__).parent / "release_0_1"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what 0.1 wrote, with the images it was made from, as the current folder."""
    home = tmp_path / "home"
    shutil.copytree(RELEASE, home)
    monkeypatch.chdir(home)
    command(f"synthetic --out {home}/data --train_per_class 4 --val_per_class 2")
    return home


def command(line: str) -> None:
    assert main(line.split()) == 0, line


def without_times(path: Path) -> list[dict[str, object]]:
    return [{name: v for name, v in record.items() if name not in TIMING_FIELDS} for record in read_log(path)]


def test_a_stopped_training_is_resumed_to_the_same_end(home: Path) -> None:
    options = "--run.out stopped --run.stop_after_steps null"
    command(f"train --config stopped/config.yaml {options}")
    ours, theirs = (load_file(home / name / "backbone.safetensors") for name in ("stopped", "run"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    records, expected = without_times(home / "stopped" / "log.jsonl"), without_times(home / "run" / "log.jsonl")
    assert len(records) == len(expected) == 12
    for record, other in zip(records, expected, strict=True):
        assert record.keys() == other.keys()
        for name, value in other.items():
            if name == "k-NN":  # since then with the balanced accuracy
                record[name] = {k: {each: record[name][k][each] for each in theirs} for k, theirs in value.items()}
            assert record[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_a_checkpoint_and_an_export_give_the_same_encoder(home: Path) -> None:
    checkpoint, export = load_encoder("stopped/last.pth"), load_encoder("run/backbone.safetensors")
    assert checkpoint.config == export.config and export.config.gamma == 1.25
    assert (checkpoint.epochs, export.epochs) == (7 / 5, 3)
    assert (checkpoint.num_images, export.num_images, export.images) == (40, None, None)  # exports did not say
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert export(images).shape == (3, 8) and not torch.equal(export(images), checkpoint(images))


def test_an_evaluation_repeats_its_figures(home: Path) -> None:
    command("knn --checkpoint run/backbone.safetensors --data data --k [5,10] --workers 0 --out again")
    new, old = (json.loads((home / folder / "knn.json").read_text()) for folder in ("again", "run/results"))
    assert new["metrics"] == new["metrics"] | old["metrics"] and new["counts"] == old["counts"]
    assert set(new["metrics"]) - set(old["metrics"]) == {"balanced_k5", "balanced_k10"}
    assert new.keys() - old.keys() == {"image_digests", "overlap", "per_class", "decoding"} and old.keys() <= new.keys()
    assert new["preprocessing"] == old["preprocessing"] and new["model"]["epochs"] == old["model"]["epochs"] == 3


def test_results_make_the_same_table(home: Path) -> None:
    command("table run --format csv --out again.csv")
    assert (home / "again.csv").read_text() == (home / "table.csv").read_text()


def test_extracted_features_are_repeated_and_searched(home: Path) -> None:
    command("extract --checkpoint run/backbone.safetensors --data data/val --out again --workers 0")
    new, old = (np.load(home / folder / "features.npy") for folder in ("again", "features"))
    np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-6)
    assert (home / "again" / "ids.txt").read_text() == (home / "features" / "ids.txt").read_text()
    query = "data/val/star/star_0001.png"
    command(f"search --index features --query {query} --data data/val --checkpoint run/backbone.safetensors --out found --k 1")
    [result] = json.loads((home / "found" / "results.json").read_text())["queries"]
    [neighbor] = result["neighbors"]
    assert (neighbor["name"], neighbor["similarity"]) == ("star/star_0001.png", pytest.approx(1, abs=1e-5))


@pytest.mark.parametrize(
    ("rule", "size", "expected"),
    [
        ("size", (32, 32), [0.0760129, 1.8115014, -0.2956842]),
        ("size", (35, 32), [0.1129965, 1.8232462, -0.3050274]),
        ("dino", (32, 32), [0.0760129, 1.8115014, -0.2956842]),
        ("dino", (16, 24), [0.0390406, 1.8186676, -0.3018688]),
        ("dino_always", (32, 32), [0.0768721, 1.8113126, -0.2979259]),
        ("dino_always", (35, 32), [0.1139056, 1.8230520, -0.3073074]),
        ("dino_legacy", (16, 24), [0.0403084, 1.8176171, -0.2992130]),
        # Not so in 0.1, at the native grid: resampled for an image that is not square, and refused or resampled by dino_legacy.
        ("dino", (35, 32), [0.1129965, 1.8232462, -0.3050274]),
        ("dino_legacy", (32, 32), [0.0760129, 1.8115014, -0.2956842]),
    ],
)
def test_models_with_any_rule_for_positions_give_their_features(
    rule: str, size: tuple[int, int], expected: list[float]
) -> None:
    """What 0.1 computed in float64. Training has square crops, so a model that it trained with `dino` is the same here."""
    encoder = load_encoder(RELEASE / "run" / "backbone.safetensors", pos_interp=rule).double()
    images = torch.linspace(-1, 1, 3 * size[0] * size[1], dtype=torch.float64).view(1, 3, *size).sin()
    np.testing.assert_allclose(encoder(images)[0, :3].detach().numpy(), expected, atol=1e-6)
