"""Whole runs of `train` on 34 small images: stopped, killed and resumed, in one and two processes, under every launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden.load import assert_close
from PIL import Image
from test_distributed import group, run_processes, slurm_group, values
from test_learner import assert_equal_states, flip_a_bit
from torch import Tensor

from dino_simpool import cli, distributed
from dino_simpool import train as train_module
from dino_simpool.checkpoint import load_encoder, read_state
from dino_simpool.config import (
    ConfigError,
    CropsConfig,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    dump,
    parse,
)
from dino_simpool.data import EvalTransform, ImageSet, evenly, find_images, labeled_sets
from dino_simpool.data.bad_files import BadFiles
from dino_simpool.data.feed import Batch, Feed, build_feed
from dino_simpool.data.loaders import TrainBatches
from dino_simpool.dino.learner import DinoLearner, build_dino
from dino_simpool.dino.model import DinoHead
from dino_simpool.dino.plan import StepValues, make_plan
from dino_simpool.eval.knn import knn_accuracy
from dino_simpool.failures import NonFiniteLoss, UnequalGradients
from dino_simpool.features.encode import Forward, preprocessing
from dino_simpool.learners import read_start
from dino_simpool.logs import TIMING_FIELDS, progress, read_log
from dino_simpool.models.encoder import build_encoder
from dino_simpool.models.weights import to_official, weights_sha256
from dino_simpool.pictures import strip
from dino_simpool.results import model_record
from dino_simpool.signals import Stopped
from dino_simpool.train import EPOCH, WINDOW, Means, train

# The bank has fewer images than the largest k, which k-NN says.
pytestmark = pytest.mark.filterwarnings("ignore:k = 200 is more")

CNN = ModelConfig(arch="resnet18", gamma=2.0, stem="small", width=8, depth=(1, 1), image_size=16, drop_path=0.3)
VIT = ModelConfig(arch="vit_tiny", gamma=1.25, patch_size=8, width=16, depth=2, heads=2, image_size=16)
NUM_IMAGES = 34


def write_images(root: Path) -> Path:
    """train/ and val/ of two classes, noise that is lighter in one of them, and flat/, the first images without classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", NUM_IMAGES), ("val", 8)):
        for number in range(count):
            pixels = rng.integers(0, 200, (20, 20, 3), dtype=np.uint8) + np.uint8(8 * (number % 2))
            path = root / split / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (root / "flat").mkdir()
    for path in sorted((root / "train").glob("a/*.png"))[:6]:
        (root / "flat" / path.name).write_bytes(path.read_bytes())
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def config(
    images: Path, out: Path, *, model: ModelConfig = CNN, optim: OptimConfig | None = None, workers: int = 0, **run: Any
) -> TrainConfig:
    """Two epochs of three steps of 10 images in two passes, k-NN after each; BatchNorm in the head."""
    knn = {"knn_train": str(images / "train"), "knn_val": str(images / "val"), "knn_every": 1}
    run = {"epochs": 2, "batch_size": 10, "accumulate": 2, "log_every": 2, "keep_every": 1, "device": "cpu"} | knn | run
    return TrainConfig(
        model=model,
        head=HeadConfig(out_dim=32, hidden_dim=16, bottleneck_dim=8, batch_norm=model is CNN),
        crops=CropsConfig(global_size=16, local_size=8, num_local=2),
        data=DataConfig(root=str(images / "train"), workers=workers),
        optim=optim or OptimConfig(lr=0.05, warmup="2it", clip=3.0),
        run=RunConfig(out=str(out), **run),
    )


def changed(cfg: TrainConfig, *, out: Path | None = None, workers: int | None = None, **run: Any) -> TrainConfig:
    """A configuration with some options replaced."""
    data = cfg.data if workers is None else dataclasses.replace(cfg.data, workers=workers)
    run = run if out is None else run | {"out": str(out)}
    return dataclasses.replace(cfg, data=data, run=dataclasses.replace(cfg.run, **run))


def log_of(out: Path) -> list[dict[str, Any]]:
    """log.jsonl without what the clock decides."""
    return [{name: value for name, value in line.items() if name not in TIMING_FIELDS} for line in read_log(out / "log.jsonl")]


def assert_same_run(ours: Path, other: Path) -> None:
    """Every checkpoint, the exported encoder and the log, bit for bit; a checkpoint's configuration may say another folder."""
    kept = {path.name for path in other.glob("*.pth")} - {"prev.pth"}
    assert {path.name for path in ours.glob("*.pth")} - {"prev.pth"} == kept
    for name in sorted(kept):
        mine, reference = ({k: v for k, v in read_state(out / name).items() if k != "config"} for out in (ours, other))
        assert_equal_states(mine, reference, name)
    for name in ("backbone.safetensors", "model.json"):
        assert (ours / name).read_bytes() == (other / name).read_bytes(), name
    assert log_of(ours) == log_of(other)
    assert not (ours / "error.txt").exists()


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that nothing interrupted."""
    cfg = config(images, tmp_path_factory.mktemp("whole"))
    assert train(cfg) == Path(cfg.run.out)
    return cfg


# -- what a run leaves


def test_files_and_log_of_a_run(whole: TrainConfig) -> None:
    out = Path(whole.run.out)
    names = {path.name for path in out.iterdir()}
    checkpoints = {"last.pth", "prev.pth", "best.pth", "epoch_0001.pth", "epoch_0002.pth"}
    assert names == checkpoints | {"backbone.safetensors", "model.json", "config.yaml", "log.jsonl", "tensorboard"}
    log = log_of(out)
    assert [(line["kind"], line["step"]) for line in log] == [
        ("step", 1), ("step", 2), ("epoch", 3), ("step", 4), ("step", 6), ("epoch", 6),
    ]  # fmt: skip
    for line in log:
        finite = [value for name, value in line.items() if isinstance(value, float)]
        assert np.isfinite(finite).all() and len(finite) > 5
    epochs = [line for line in log if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [0, 1]
    for line in epochs:
        assert set(line["k-NN"]) == {"10", "20", "100", "200"} and 0 <= line["k-NN"]["10"]["top1"] <= 100
        assert line["train_loss"] == pytest.approx(line["train_entropy"] + line["train_KL_div"])
    state = read_state(out / "last.pth")
    assert state["step"] == 6 and not state["epoch_open"] and state["best"] == max(e["k-NN"]["10"]["top1"] for e in epochs)
    learner = build_dino(whole, NUM_IMAGES, torch.device("cpu"))
    moved = [not torch.equal(p, state["student"][name]) for name, p in learner.student.named_parameters() if p.requires_grad]
    assert all(moved)


def test_the_log_means_are_those_of_the_steps(whole: TrainConfig, images: Path, tmp_path: Path) -> None:
    """Logging each step changes nothing else, and its lines average to those of longer windows and of the epochs."""
    train(changed(whole, out=tmp_path, log_every=1))
    steps = [line for line in log_of(tmp_path) if line["kind"] == "step"]
    windows = [line for line in log_of(Path(whole.run.out)) if line["kind"] == "step"]
    losses = [line["loss"] for line in steps]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in windows] == pytest.approx(
        [losses[0], losses[1], np.mean(losses[2:4]), np.mean(losses[4:])]
    )
    epochs = [line["train_loss"] for line in log_of(tmp_path) if line["kind"] == "epoch"]
    assert epochs == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])])
    mine, reference = (read_state(out / "last.pth") for out in (tmp_path, Path(whole.run.out)))
    assert_equal_states(mine["student"], reference["student"])


def test_means_are_of_the_steps_since_they_were_last_taken() -> None:
    """Of each span by itself, in float64; the names are those of the learner, in its order."""
    means = Means(("loss", "norm"), torch.device("cpu"))
    for loss, norm in ((1.0, 4.0), (2.0, 5.0)):
        means.add({"loss": torch.tensor(loss), "norm": torch.tensor(norm)})
    assert means.sums.tolist() == [[2.0, 3.0, 9.0]] * 2 and means.sums.dtype == torch.float64
    assert means.take(WINDOW) == (2, {"loss": 1.5, "norm": 4.5})
    means.add({"loss": torch.tensor(6.0), "norm": torch.tensor(0.0)})
    assert means.take(WINDOW) == (1, {"loss": 6.0, "norm": 0.0})
    assert means.take(EPOCH) == (3, {"loss": 3.0, "norm": 3.0})
    with pytest.raises(AssertionError):
        means.add({"norm": torch.tensor(1.0), "loss": torch.tensor(1.0)})


def test_the_exported_encoder_is_the_teachers(whole: TrainConfig) -> None:
    """Bit-equal features from both files; the untrained encoder is the one that the run began with."""
    out = Path(whole.run.out)
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher = load_encoder(out / "last.pth")(pictures)
        assert torch.equal(load_encoder(out / "backbone.safetensors")(pictures), teacher)
        student, untrained = (load_encoder(out / "last.pth", which=which)(pictures) for which in ("student", "untrained"))
    assert not torch.equal(teacher, student) and not torch.equal(teacher, untrained)
    own = read_state(out / "last.pth")["teacher"]
    loaded = load_encoder(out / "last.pth").state_dict()
    assert {f"encoder.{name}" for name in loaded} == {name for name in own if name.startswith("encoder.")}
    assert all(torch.equal(tensor, own[f"encoder.{name}"]) for name, tensor in loaded.items())
    start = build_dino(whole, NUM_IMAGES, torch.device("cpu")).student.encoder.state_dict()
    untouched = load_encoder(out / "last.pth", which="untrained").state_dict()
    assert_equal_states(dict(untouched), dict(start))


def test_the_saved_configuration_repeats_the_run(whole: TrainConfig, tmp_path: Path) -> None:
    again = parse(TrainConfig, ["--config", f"{whole.run.out}/config.yaml", "--run.out", str(tmp_path)])
    assert again == changed(whole, out=tmp_path)
    train(again)
    assert_same_run(tmp_path, Path(whole.run.out))


def test_an_unlabelled_flat_folder_trains(images: Path, tmp_path: Path) -> None:
    """One epoch, shorter than both warm-ups, without k-NN; half precision; a seed of ten digits."""
    cfg = config(
        images, tmp_path, model=VIT, optim=OptimConfig(warmup=10), epochs=1, batch_size=3, accumulate=1, log_every=1,
        knn_train=None, knn_val=None, precision="bf16", seed=9_876_543_210,
    )  # fmt: skip
    train(dataclasses.replace(cfg, data=DataConfig(root=str(images / "flat"), workers=0)))
    log = log_of(tmp_path)
    assert [(line["kind"], line["step"]) for line in log] == [("step", 1), ("step", 2), ("epoch", 2)]
    assert "k-NN" not in log[-1] and not (tmp_path / "best.pth").exists()
    assert read_state(tmp_path / "last.pth")["step"] == 2


def test_each_step_uses_the_schedules_of_its_own_number(images: Path, tmp_path: Path) -> None:
    """Rate, decay, momentum, temperature and frozen prototypes, each seen in what a step leaves, are those of plan.values."""
    optim = OptimConfig(lr=0.05, warmup="2it", clip=3.0, freeze_last_layer="4it")
    teacher = TeacherConfig(momentum=0.5, warmup_temperature=0.01, temperature=10.0, warmup="2ep")
    cfg = config(images, tmp_path, model=VIT, optim=optim, log_every=1, knn_train=None, knn_val=None)
    cfg = dataclasses.replace(cfg, teacher=teacher)
    planned = [make_plan(cfg, NUM_IMAGES).values(step) for step in range(6)]
    assert [v.lr for v in planned[:3]] == pytest.approx([0.0, 0.05 * 10 / 256, 0.05 * 10 / 256])
    assert [v.teacher_temperature for v in planned] == [0.01] * 3 + [10.0] * 3
    assert [v.freeze_last_layer for v in planned] == [True] * 4 + [False] * 2

    student = teacher_before = dict(build_dino(cfg, NUM_IMAGES, torch.device("cpu")).student.state_dict())
    for step, expected in enumerate(planned):
        train(changed(cfg, stop_after_steps=step + 1))
        state = read_state(tmp_path / "last.pth")
        used = state["optimizer"]["param_groups"][0]
        assert (state["step"], used["lr"], used["weight_decay"]) == (step + 1, expected.lr, expected.weight_decay)
        moved = {name for name, value in state["student"].items() if not torch.equal(value, student[name])}
        assert bool(moved) == (expected.lr > 0)
        assert any("last_layer" in name for name in moved) == (not expected.freeze_last_layer)
        for name, value in state["student"].items():
            average = expected.momentum * teacher_before[name].double() + (1 - expected.momentum) * value.double()
            assert_close(state["teacher"][name], average, 1e-6, 1e-7, f"teacher after step {step + 1}: {name}")
        student, teacher_before = state["student"], state["teacher"]
    entropies = [line["entropy_over_lnK"] for line in log_of(tmp_path) if line["kind"] == "step"]
    assert max(entropies[:3]) < 0.5 and min(entropies[3:]) > 0.999  # sharp at 0.01, and flat at 10


@pytest.mark.parametrize(
    ("keep_every", "kept", "knn_every", "evaluated"), [(2, [2, 4], 2, [0, 2, 3]), (3, [3], 3, [0, 3]), (0, [], 0, [])]
)
def test_epochs_that_are_kept_and_evaluated(
    images: Path, tmp_path: Path, keep_every: int, kept: list[int], knn_every: int, evaluated: list[int]
) -> None:
    """Of four epochs: kept after every keep_every, evaluated from the first (0) on every knn_every, and the last always."""
    train(config(images, tmp_path, model=VIT, epochs=4, batch_size=34, keep_every=keep_every, knn_every=knn_every))
    names = sorted(path.name for path in tmp_path.glob("epoch_*.pth"))
    assert names == [f"epoch_{number:04}.pth" for number in kept]
    assert [read_state(tmp_path / name)["step"] for name in names] == kept
    epochs = [line for line in log_of(tmp_path) if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [0, 1, 2, 3]
    assert [line["epoch"] for line in epochs if "k-NN" in line] == evaluated
    assert (tmp_path / "best.pth").exists() == bool(evaluated)


def test_the_best_checkpoint_is_the_first_of_equals(whole: TrainConfig, images: Path, tmp_path: Path) -> None:
    """A teacher with momentum 1 never changes, so all epochs tie; and in a run that learns it is the first with the maximum."""
    train(dataclasses.replace(config(images, tmp_path, model=VIT, epochs=3), teacher=TeacherConfig(momentum=1.0)))
    accuracies = {}
    for out in (tmp_path, Path(whole.run.out)):
        accuracies[out] = [line["k-NN"]["10"]["top1"] for line in log_of(out) if line["kind"] == "epoch"]
        best = max(accuracies[out])
        assert read_state(out / "last.pth")["best"] == best
        assert read_state(out / "best.pth")["step"] == 3 * (1 + accuracies[out].index(best))
    assert len(accuracies[tmp_path]) == 3 and len(set(accuracies[tmp_path])) == 1


def test_other_seeds_are_other_runs(whole: TrainConfig, tmp_path: Path) -> None:
    train(changed(whole, out=tmp_path, seed=1, stop_after_steps=1))
    assert log_of(tmp_path)[0]["loss"] != log_of(Path(whole.run.out))[0]["loss"]


def test_a_last_epoch_that_is_partial_is_logged_and_stays(images: Path, tmp_path: Path) -> None:
    """4 steps of 3 an epoch: a line for epoch 1 at step 4, 4/3 epochs in the export, and the same after another start."""
    cfg = config(images, tmp_path, model=VIT, epochs="4it")
    for _ in range(2):
        train(cfg)
        epochs = [(line["epoch"], line["step"], "k-NN" in line) for line in log_of(tmp_path) if line["kind"] == "epoch"]
        assert epochs == [(0, 3, True), (1, 4, True)]
    trained_on = find_images(str(images / "train"))
    for name in ("last.pth", "backbone.safetensors"):
        encoder = load_encoder(tmp_path / name)
        assert encoder.epochs == pytest.approx(4 / 3)
        assert (encoder.num_images, encoder.images) == (len(trained_on), trained_on.digest())


def test_the_pictures_in_tensorboard(whole: TrainConfig, images: Path, tmp_path: Path) -> None:
    """The crops of the first step of a start, and above attention the held-out images of the k-NN (else those of training)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown(out: Path, tag: str) -> dict[int, Tensor]:
        events = EventAccumulator(str(out / "tensorboard")).Reload().Images(tag)
        opened = {event.step: Image.open(io.BytesIO(event.encoded_image_string)) for event in events}
        return {step: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for step, image in opened.items()}

    def expected(root: str) -> Tensor:
        found = find_images([root])
        transform = EvalTransform(16, resize=None, mean=(0.0,) * 3, std=(1.0,) * 3)
        return strip([transform(found.read(i)) for i in evenly(len(found), 8).tolist()])

    train(changed(whole, out=tmp_path, stop_after_steps=2))
    train(changed(whole, out=tmp_path, knn_train=None, knn_val=None))
    for out, at, root in ((Path(whole.run.out), [1], whole.run.knn_val), (tmp_path, [1, 3], str(images / "train"))):
        crops, attention = shown(out, "crops"), shown(out, "attention")
        assert list(crops) == at and list(attention) == [3, 6]
        for picture in crops.values():
            assert 0.3 < picture.mean() < 0.6  # noise of 0 to 208 of 255; normalized it would be around 0
        for picture in attention.values():
            top = expected(root)
            assert_close(picture[:, : top.shape[1]], top, 0, 1.01 / 255, "images above the attention")


def test_changes_since_the_last_start_are_said(whole: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options with the old value first, and the number of processes."""
    train(changed(whole, out=tmp_path, stop_after_steps=1))
    state = read_state(tmp_path / "last.pth")
    torch.save(state | {"world_size": 4}, tmp_path / "last.pth")
    capsys.readouterr()
    train(changed(whole, out=tmp_path, log_every=3, stop_after_steps=2))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed since this run was saved: ")]
    told = [line.partition(": ")[2] for line in said]
    *options, processes = told
    assert options == ["run.log_every: 2 -> 3", "run.stop_after_steps: 1 -> 2"]
    assert processes == (
        "number of processes: 4 -> 1; each step has the 10 images that it would have had, but stochastic depth draws others "
        "and sums are rounded otherwise"
    )


def test_options_reach_what_they_are_for(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, the bar's images a step, decoding of all three image sets, and the resizing of the k-NN."""
    seen: dict[str, Any] = {}

    def accuracy(encoder: Any, bank: ImageSet, val: ImageSet, forward: Forward, **options: Any) -> Any:
        seen.update(bank=bank, val=val, transform=forward.transform)
        return knn_accuracy(encoder, bank, val, forward, **options)

    def bar(*args: Any, **options: Any) -> Any:
        seen.update(bar=options)
        return progress(*args, **options)

    def feed(cfg: TrainConfig, bad_files: BadFiles, **options: Any) -> Feed:
        seen.update(train=bad_files.images)
        return build_feed(cfg, bad_files, **options)

    for name, replacement in (("knn_accuracy", accuracy), ("progress", bar), ("build_feed", feed)):
        monkeypatch.setattr(f"dino_simpool.train.{name}", replacement)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: seen.setdefault("threads", count))
    cfg = config(images, tmp_path, model=dataclasses.replace(VIT, resize=18), epochs=1, threads=3)
    data = dataclasses.replace(cfg.data, max_pixels=1000, exif_orientation=True, subset_per_class=16)
    run = dataclasses.replace(cfg.run, knn_subset_per_class=15)
    train(dataclasses.replace(cfg, data=data, run=run))
    assert seen["threads"] == 3 and seen["bar"]["images_per_step"] == 10 and seen["transform"].resize == 18
    assert {seen[name].decoding for name in ("train", "bank", "val")} == {data.decoding}
    assert [len(seen[name]) for name in ("train", "bank", "val")] == [32, 30, 8]
    assert [seen["bank"].name(i) for i in (0, 14, 15, 29)] == ["a/00.png", "a/28.png", "b/01.png", "b/29.png"]


def test_copies_and_missing_sets_of_the_knn_are_said(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first before training and beside each number, the second in place of it."""
    bank = images / "train"
    train(config(images, tmp_path / "run", model=VIT, epochs=1, knn_train=f"{bank}", knn_val=f"{bank}/../train"))
    said = capsys.readouterr().err
    assert f"warning: --run.knn_train and --run.knn_val are the same images, {bank}: each will find itself" in said
    number = r"epoch 0: k-NN \(k = 10\) [\d.]+ %, balanced [\d.]+ %; warning: "
    assert re.search(f"{number}train and val are the same folder; 34 of 34 val images are also in train", said)
    with pytest.raises(FileNotFoundError, match=f"test does not exist, but there is val: give --run.knn_val {images}/val$"):
        train(config(images, tmp_path / "other", knn_val=str(images / "test")))


@pytest.mark.parametrize(("waiting", "seconds", "count"), [(50.0, 20.0, 1), (10.0, 20.0, 0), (50.0, 10.0, 0)])
def test_waiting_for_images_is_warned_of_once(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    waiting: float, seconds: float, count: int,
) -> None:  # fmt: skip
    """In a run of two epochs, if more than 10 % of more than 10 s went by."""
    timings = Feed.timings
    told = {"data_wait_percent": waiting, "seconds": seconds}
    monkeypatch.setattr(Feed, "timings", lambda self, row: timings(self, row) | told)
    train(config(images, tmp_path, model=VIT, knn_train=None, knn_val=None))
    assert capsys.readouterr().err.count(f"warning: {waiting:.0f} % of the time was spent waiting for images: ") == count


# -- stopped and resumed


def test_stopped_after_every_step_and_resumed(whole: TrainConfig, tmp_path: Path) -> None:
    """Each time with another number of workers; the log never has more than what is saved."""
    full = log_of(Path(whole.run.out))
    for stop in range(1, 6):
        train(changed(whole, out=tmp_path, workers=stop % 3, stop_after_steps=stop))
        state = read_state(tmp_path / "last.pth")
        assert state["step"] == stop
        until = [line for line in full if line["step"] < stop or (line["step"] == stop and line["kind"] == "step")]
        assert log_of(tmp_path) == until
    train(changed(whole, out=tmp_path, workers=2))
    assert_same_run(tmp_path, Path(whole.run.out))


def test_started_again_with_the_same_stop_it_goes_on_to_the_end(whole: TrainConfig, tmp_path: Path) -> None:
    cfg = changed(whole, out=tmp_path, stop_after_steps=2)
    for expected in (2, 6):
        train(cfg)
        assert read_state(tmp_path / "last.pth")["step"] == expected
    assert_same_run(tmp_path, Path(whole.run.out))


def test_saves_inside_an_epoch_come_save_minutes_apart(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 40 s by a clock that counts their lines in the log: a minute is over with each third step since a save."""
    log, replace, saves = tmp_path / "log.jsonl", os.replace, []

    def clock() -> float:
        return 40.0 * sum(line["kind"] == "step" for line in read_log(log)) if log.exists() else 0.0

    def recording(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == "last.pth":
            saves.append(read_state(target)["step"])

    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(os, "replace", recording)
    options = {"batch_size": 3, "accumulate": 1, "log_every": 1, "knn_train": None, "knn_val": None}
    train(config(images, tmp_path, model=VIT, epochs=1, save_minutes=1.0, **options))
    assert saves == [3, 6, 9, 11, 11]  # the epoch has 11 steps and is saved before and after its evaluation


def test_a_finished_run_stays_as_it_is(whole: TrainConfig, tmp_path: Path) -> None:
    train(changed(whole, out=tmp_path, stop_after_steps=100))  # never reached
    train(changed(whole, out=tmp_path))
    assert_same_run(tmp_path, Path(whole.run.out))
    train(changed(whole, out=tmp_path, epochs=3))
    assert [line["epoch"] for line in log_of(tmp_path) if line["kind"] == "epoch"] == [0, 1, 2]
    assert read_state(tmp_path / "last.pth")["step"] == 9


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "flipped"])
@pytest.mark.parametrize("stop", [4, 5])
def test_a_broken_checkpoint_falls_back_to_the_one_before(
    whole: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, stop: int
) -> None:
    """That one is from inside an epoch (4) or from its end, before the evaluation, which then copies it to other names (3)."""
    train(changed(whole, out=tmp_path, save_every_steps=1, stop_after_steps=stop))
    last = tmp_path / "last.pth"
    if damage == "missing":  # killed between the two renames of saving
        last.unlink()
    elif damage == "flipped":  # one bit of a weight
        content = bytearray(last.read_bytes())
        weight = read_state(last)["student"]["head.fc1.weight"].numpy().tobytes()
        content[content.index(weight) + 5] ^= 1
        last.write_bytes(content)
    else:
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2 if damage == "truncated" else 0])
    capsys.readouterr()
    train(changed(whole, out=tmp_path, stop_after_steps=stop))  # one step
    said = capsys.readouterr().err
    assert "last.pth" in said and "prev.pth" in said and f"resuming after step {stop - 1}" in said
    for path in tmp_path.glob("*.pth"):
        assert read_state(path)["step"] <= stop  # readable, all of them
    train(changed(whole, out=tmp_path))
    assert_same_run(tmp_path, Path(whole.run.out))


def test_nothing_is_started_over_broken_checkpoints(whole: TrainConfig, tmp_path: Path) -> None:
    for name in ("last.pth", "prev.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not one")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"last\.pth cannot be read.*prev\.pth cannot be read.*nothing to resume from"):
        train(changed(whole, out=tmp_path))
    assert contents(tmp_path) == before


def dies_before(cfg: TrainConfig, name: str) -> None:
    """Train until a file of that name is put in place, and die there as by kill -9."""
    replace = os.replace

    def last_words(source: Any, target: Any) -> None:
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = last_words
    train(cfg)


def test_killed_anywhere_in_saving_and_started_again(whole: TrainConfig, tmp_path: Path) -> None:
    """kill -9 before and between the renames of the first saves, in an epoch's end, and right after a resumed one."""
    cfg = changed(whole, out=tmp_path, save_every_steps=1)
    for name in (".last.pth.new", "prev.pth", "last.pth", "best.pth", "last.pth", "model.json", "epoch_0002.pth"):
        (outcome,) = run_processes(dies_before, cfg, name, environments=[{}])
        assert outcome.status == -signal.SIGKILL, f"not killed before {name}: {outcome.stderr}"
    train(cfg)
    assert_same_run(tmp_path, Path(whole.run.out))


def test_sigterm_saves_and_stops(images: Path, tmp_path: Path) -> None:
    """`python -m dino_simpool train` as a scheduler stops it: status 143, a checkpoint of that step, and it goes on."""
    cfg = config(images, tmp_path / "run", epochs=12, log_every=1, workers=1, knn_train=None, knn_val=None, keep_every=0)
    (tmp_path / "run.yaml").write_text(dump(cfg))
    command = [sys.executable, "-m", "dino_simpool", "train", "--config", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        log = tmp_path / "run" / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, said
    stopped = read_state(tmp_path / "run" / "last.pth")["step"]
    assert 3 <= stopped < 36 and said.splitlines()[-1] == (
        f"dino-simpool train: stopped by SIGTERM after step {stopped} of 36: "
        "the run is unfinished, run the same command again to resume"
    )
    train(cfg)
    train(changed(cfg, out=tmp_path / "reference", workers=0))
    assert_same_run(tmp_path / "run", tmp_path / "reference")


@pytest.mark.parametrize("why", ["max_minutes", "end of the job", "handler"])
def test_other_reasons_to_stop(
    whole: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    """A time limit of the user's is no failure; before the end of a SLURM job the handler that requeues is called, as after its
    signal. Afterwards the run goes on."""
    called: list[tuple[int, int]] = []
    steps = lambda: read_state(tmp_path / "last.pth")["step"]  # noqa: E731
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append((number, steps())))
    cfg = changed(whole, out=tmp_path)
    try:
        with monkeypatch.context() as patch:
            if why == "end of the job":
                patch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 30))
            if why == "handler":
                step = DinoLearner.step
                patch.setattr(DinoLearner, "step", lambda *a: (os.kill(os.getpid(), signal.SIGUSR2), step(*a))[1])
            with pytest.raises(Stopped) if why != "max_minutes" else contextlib.nullcontext() as stopped:
                train(changed(cfg, max_minutes=1e-9 if why == "max_minutes" else None))
    finally:
        signal.signal(signal.SIGUSR2, before)
    if why == "max_minutes":
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == "the run is unfinished, after step 1 of 6: run the same command again to resume"
        assert steps() == 1
    else:
        assert stopped.value.number == signal.SIGUSR2 and stopped.value.step == steps() < 6
        assert called == [(signal.SIGUSR2, steps())]
    train(cfg)
    assert_same_run(tmp_path, Path(whole.run.out))


# -- refused


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_is_gone_ends_the_run(whole: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one that another run has taken: it is found at the next save, which writes nothing. TensorBoard's thread finds it too,
    and says nothing."""
    step = DinoLearner.step
    for how in (shutil.rmtree, lambda out: (out / "run.lock").write_text("{}")):
        out = tmp_path / "run"
        monkeypatch.setattr(DinoLearner, "step", lambda learner, *a, how=how, out=out: (step(learner, *a), how(out))[0])
        with pytest.raises(BlockingIOError, match=r"run.lock is gone or names another run: this one ends"):
            train(changed(whole, out=out, save_every_steps=1))
        assert not (out / "last.pth").exists()


def test_leftovers_of_killed_processes_are_removed(whole: TrainConfig, tmp_path: Path) -> None:
    cfg = changed(whole, out=tmp_path)
    train(changed(cfg, stop_after_steps=2))
    for name in (".last.pth.new", ".last.pth.new.99.tmp", ".best.pth.99.tmp"):
        (tmp_path / name).write_bytes(b"half")
    train(cfg)
    assert not [path.name for path in tmp_path.glob(".*")]
    assert_same_run(tmp_path, Path(whole.run.out))


def test_another_option_on_one_process_is_refused(pair: TrainConfig, tmp_path: Path) -> None:
    """Another learning rate trained along, with gradients for the average of both."""
    outcomes = run_processes(train_with_own_rate, changed(pair, out=tmp_path / "run"), environments=group())
    for outcome in outcomes:
        assert outcome.status == 1 and "optim.lr is 0.05 on process 0, 1.05 on process 1" in outcome.stderr
    assert not (tmp_path / "run").exists()


def train_with_own_rate(cfg: TrainConfig) -> None:
    train(dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr=0.05 + int(os.environ["RANK"]))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": dataclasses.replace(CNN, width=16)}, r"another model \(model.width 8 -> 16\)"),
        ({"model": VIT}, r"another model \(model.arch resnet18 -> vit_tiny"),
        ({"head": HeadConfig(out_dim=64)}, "head.out_dim 32 -> 64"),
        ({"optim": OptimConfig(name="sgd")}, r"optim.name adamw -> sgd"),
        ({"run": {"batch_size": 12}}, r"another order of images \(run.batch_size 10 -> 12\)"),
        ({"run": {"seed": 5}}, r"another order of images \(run.seed 0 -> 5\)"),
        ({"run": {"epochs": 1}}, "has 6 steps, but run.epochs 1 ends at 3"),
    ],
)
def test_a_folder_of_another_run_is_refused(whole: TrainConfig, options: dict[str, Any], message: str) -> None:
    out = Path(whole.run.out)
    before = contents(out)
    with pytest.raises(ValueError, match=message):
        train(changed(whole, **options["run"]) if "run" in options else dataclasses.replace(whole, **options))
    assert contents(out) == before


def test_a_size_that_the_encoder_cannot_take_is_refused_before_anything_is_written(images: Path, tmp_path: Path) -> None:
    standard = dataclasses.replace(CNN, stem="standard", depth=(1, 1, 1))
    with pytest.raises(ValueError, match=r"2 x 2 is the least: set model\.stem small"):
        train(config(images, tmp_path / "run", model=standard))
    assert not (tmp_path / "run").exists()
    # The same size is no obstacle where there are no local crops to have it.
    cfg = config(images, tmp_path / "run", knn_train=None, knn_val=None, stop_after_steps=1)
    crops = CropsConfig(global_size=16, local_size=2, num_local=2)
    with pytest.raises(ValueError, match="2 x 2 pixels"):
        train(dataclasses.replace(cfg, crops=crops))
    train(dataclasses.replace(cfg, crops=dataclasses.replace(crops, num_local=0)))
    assert (tmp_path / "run" / "last.pth").exists()


def test_compiling_without_a_compiler_is_refused_before_anything_is_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        ConfigError, match=r"run\.compile needs a C\+\+ compiler, and none is found: install g\+\+, set CXX, or"
    ):
        train(config(images, tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()


def test_other_data_is_refused(whole: TrainConfig, images: Path) -> None:
    before = contents(Path(whole.run.out))
    cfg = dataclasses.replace(whole, data=DataConfig(root=str(images / "val"), workers=0))
    with pytest.raises(ConfigError, match="was trained on 34 images, now there are 8, not the same"):
        train(changed(cfg, batch_size=4))
    assert contents(Path(whole.run.out)) == before


# -- when it goes wrong


def spoil(views: list[Tensor]) -> list[Tensor]:
    """One pixel of one local crop is not a number."""
    views = [view.clone() for view in views]
    views[3][0, 0, 0, 0] = torch.nan
    return views


def spoiled_step(
    steps: Collection[int], ranks: Collection[int], learner: DinoLearner, batches: Iterator[Batch], values: StepValues
) -> dict[str, Tensor]:
    """DinoLearner.step, but some processes see a bad image in some steps."""
    if learner.steps + 1 in steps and distributed.rank() in ranks:
        batches = (dataclasses.replace(batch, views=spoil(batch.views)) for batch in batches)
    return real_step(learner, batches, values)


def broken_step(step: int, learner: DinoLearner, batches: Iterator[Batch], values: StepValues) -> dict[str, Tensor]:
    """DinoLearner.step, but after one step a weight is infinite, though the loss was not."""
    metrics = real_step(learner, batches, values)
    if learner.steps == step:
        learner.student.head.fc1.weight.data[0, 0] = torch.inf
    return metrics


real_step = DinoLearner.step


def command_with(step: Callable[..., Any], arguments: list[str]) -> int:
    """The exit status of the command line with another DinoLearner.step."""
    DinoLearner.step = lambda *args: step(*args)
    return cli.main(arguments)


def spoil_steps(patch: pytest.MonkeyPatch, *steps: int) -> None:
    patch.setattr(DinoLearner, "step", lambda *args: spoiled_step(steps, [0], *args))


def files_of_step(cfg: TrainConfig, step: int) -> list[str]:
    """Names of the images of a step, by the order that the loaders use."""
    found = find_images(str(cfg.data.root))
    batches = TrainBatches(
        num_images=len(found),
        seed=cfg.run.seed,
        batch_size=cfg.run.batch_size,
        total_steps=step,
        start_step=step - 1,
        world_size=1,
    )
    return [found.name(index) for _, index in next(iter(batches))]


def test_a_bad_step_is_left_out_and_said(
    whole: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN in one batch: every tensor of the checkpoint stays as it was, means are those of the other steps, the run goes on."""
    spoil_steps(monkeypatch, 2, 5)
    cfg = changed(whole, out=tmp_path, log_every=1)
    states = []
    for stop in (1, 2):
        train(changed(cfg, stop_after_steps=stop))
        states.append(read_state(tmp_path / "last.pth"))
    for part in ("student", "teacher", "loss"):
        assert_equal_states(states[1][part], states[0][part], part)
    assert_equal_states(states[1]["optimizer"]["state"], states[0]["optimizer"]["state"])
    assert (states[1]["step"], states[1]["bad_steps"]) == (2, [2])
    train(cfg)
    said = capsys.readouterr().err
    log = log_of(tmp_path)
    assert [(line["kind"], line["step"]) for line in log] == [
        ("step", 1), ("skipped", 2), ("step", 2), ("step", 3), ("epoch", 3),
        ("step", 4), ("skipped", 5), ("step", 5), ("step", 6), ("epoch", 6),
    ]  # fmt: skip
    for number in (2, 5):
        [line] = [line for line in log if line["kind"] == "skipped" and line["step"] == number]
        assert line["files"] == files_of_step(cfg, number) and line["epoch"] == number // 4
        assert f"warning: step {number} was left out, because its loss or gradients are not finite; its images: " in said
        assert ", ".join(line["files"]) in said
        [step] = [line for line in log if line["kind"] == "step" and line["step"] == number]
        assert step["loss"] is step["grad_norm"] is None
    losses = [line["loss"] for line in log if line["kind"] == "step" and line["loss"] is not None]
    epochs = [line["train_loss"] for line in log if line["kind"] == "epoch"]
    assert epochs == pytest.approx([np.mean(losses[:2]), np.mean(losses[2:])])
    assert read_state(tmp_path / "last.pth")["step"] == 6 and not (tmp_path / "before_nan.pth").exists()


def test_bad_steps_are_seen_alike_by_interrupted_runs(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before, between and after bad steps, with longer log lines: bit for bit the run that was never stopped."""
    spoil_steps(monkeypatch, 2, 3, 4, 6)
    cfg = config(images, tmp_path / "reference")
    train(cfg)
    for stop in (1, 2, 3, 4, 5):
        train(changed(cfg, out=tmp_path / "run", stop_after_steps=stop))
    train(changed(cfg, out=tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "reference")


@pytest.mark.parametrize("every", [2, 1, None], ids=["a checkpoint", "saved between", "no checkpoint"])
def test_many_bad_steps_go_back_once_and_stop_with_a_report(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], every: int | None
) -> None:
    """Three and three again; the command of the report repeats the first of them, as often as one likes."""
    spoil_steps(monkeypatch, *range(4, 99))
    out = tmp_path / "a run"
    cfg = config(
        images, out, epochs=1, batch_size=3, accumulate=1, max_bad_steps=3, save_every_steps=every, knn_train=None, knn_val=None
    )
    good = {1: 3, 2: 2, None: 0}[every]
    (tmp_path / "run.yaml").write_text(dump(cfg))
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 1
    said = capsys.readouterr().err
    assert said.count("was left out") == 6
    assert said.count(f"warning: after 3 bad step(s) in a row, 4 to 6, the run goes back to step {good}\n") == 1
    [error] = [line for line in said.splitlines() if "error:" in line]
    assert f"3 step(s) in a row from 4 on are not finite, also after going back to step {good}: {out}/nan_report.json" in error
    log = [(line["kind"], line["step"]) for line in log_of(out) if line["kind"] != "step"]
    assert log == [("restored", good), ("skipped", 4), ("skipped", 5), ("skipped", 6)]
    report = json.loads((out / "nan_report.json").read_text())
    assert json.loads((out / "error.txt").read_text()).items() >= report.items()
    assert (report["step"], report["bad_steps"], report["checkpoint_step"]) == (4, [4, 5, 6], good)
    assert [os.path.relpath(path, cfg.data.root) for path in report["files"]] == files_of_step(cfg, 4)
    assert report["schedules"] == dataclasses.asdict(make_plan(cfg, NUM_IMAGES).values(3))
    assert report["gradient_norms"]["head.fc1"] == "nan" and report["not_finite"] == []
    assert read_state(out / "before_nan.pth")["step"] == good
    copy, command = report["command"].rsplit(" && ", 1)
    program, *arguments = shlex.split(command)
    assert program == "dino-simpool"
    for _ in range(2):
        subprocess.run(copy, shell=True, check=True)
        assert cli.main(arguments) == 0
        said = capsys.readouterr().err
        assert said.count("was left out") == 1 and "warning: step 4 was left out" in said
        assert read_state(out / "nan_step" / "last.pth")["bad_steps"] == [4]
    before, after = (read_state(path) for path in (out / "before_nan.pth", out / "nan_step" / "last.pth"))
    if good == 3:
        assert_equal_states(after["student"], before["student"])
    with monkeypatch.context() as patch:  # a start later, when the numbers are good again
        patch.setattr(DinoLearner, "step", real_step)
        assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    assert not (out / "error.txt").exists() and not (out / "nan_report.json").exists()
    assert read_state(out / "last.pth")["step"] == 11


def test_a_fault_that_passes_is_repaired_by_going_back(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that turn into NaN in memory, twice and a checkpoint apart: in the end the run is that without a fault."""
    options = {"epochs": 1, "batch_size": 3, "accumulate": 1, "max_bad_steps": 2, "knn_train": None, "knn_val": None}
    cfg = config(images, tmp_path / "run", save_every_steps=3, workers=1, **options)
    faults = [4, 8]

    def faulty_step(learner: DinoLearner, batches: Iterator[Batch], values: StepValues) -> dict[str, Tensor]:
        if learner.steps + 1 in faults:
            faults.remove(learner.steps + 1)
            learner.student.head.fc1.weight.data[0, 0] = torch.nan
        return real_step(learner, batches, values)

    monkeypatch.setattr(DinoLearner, "step", faulty_step)
    train(cfg)
    said = capsys.readouterr().err
    assert [f"the run goes back to step {step}\n" in said for step in (3, 6)] == [True, True] and not faults
    train(changed(cfg, out=tmp_path / "reference"))
    states = [read_state(tmp_path / name / "last.pth") for name in ("run", "reference")]
    for part in ("student", "teacher", "loss", "optimizer", "monitor", "sums", "step"):
        assert_equal_states(states[0][part], states[1][part], part)
    lines = [line for line in log_of(tmp_path / "run") if line["kind"] != "restored"]
    assert lines == log_of(tmp_path / "reference")


def test_a_flipped_bit_ends_the_run(whole: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third step, which is computed twice; without one the run is the same as without verifying."""
    train(changed(whole, out=tmp_path / "good", verify_every=3))
    assert_same_run(tmp_path / "good", Path(whole.run.out))
    learners = []

    def flipped_step(learner: DinoLearner, *args: Any) -> dict[str, Tensor]:
        if not learners:
            learners.append(learner)
            flip_a_bit(learner, "head.fc1.weight", 7)  # of two passes a step
        return real_step(learner, *args)

    monkeypatch.setattr(DinoLearner, "step", flipped_step)
    with pytest.raises(
        UnequalGradients, match=r"gradients of step 3, computed twice .*process 0 on .*, cpu: first in head\.fc1\.weight"
    ):
        train(changed(whole, out=tmp_path / "run", verify_every=3))
    assert "UnequalGradients" in json.loads((tmp_path / "run" / "error.txt").read_text())["error"]


def test_a_checkpoint_with_a_non_finite_weight_keeps_and_names_it(whole: TrainConfig, tmp_path: Path) -> None:
    """The run ends where the next save is due, after one bad step and its repetition, and nothing is saved over."""
    cfg = changed(whole, out=tmp_path)
    train(changed(cfg, stop_after_steps=2))
    state = read_state(tmp_path / "last.pth")
    state["student"]["head.fc2.bias"][0] = torch.nan
    torch.save(state, tmp_path / "last.pth")
    before = contents(tmp_path)
    with pytest.raises(NonFiniteLoss, match=r"1 step\(s\) in a row from 3 on are not finite, also after going back to step 2"):
        train(cfg)
    after = contents(tmp_path)
    assert {name for name in after if name.endswith(".pth")} == {"last.pth", "before_nan.pth"}
    assert after["last.pth"] == after["before_nan.pth"] == before["last.pth"]
    record = json.loads(after["error.txt"])
    assert record["step"] == 3 and record["not_finite"] == ["head.fc2.bias"] and "gradient_norms" in record


@pytest.fixture(scope="module")
def pair(images: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of two processes that nothing interrupted: BatchNorm over both, stochastic depth, three passes of two images."""
    cfg = config(images, tmp_path_factory.mktemp("pair"), batch_size=12, accumulate=3)
    values(run_processes(train, cfg, environments=group()))
    return cfg


def test_two_processes_stopped_and_resumed(pair: TrainConfig, tmp_path: Path) -> None:
    """As SLURM tasks, each time with another number of workers; a signal to one process stops both after the same step."""
    stops, seeds = zip(
        *values(run_processes(train_in_stages, changed(pair, out=tmp_path), environments=slurm_group())), strict=True
    )
    assert stops == ([1, 3, 4], [1, 3, 4])
    assert_same_run(tmp_path, Path(pair.run.out))
    assert read_state(tmp_path / "last.pth")["world_size"] == 2
    assert len({*seeds[0], *seeds[1]}) == 8  # stochastic depth differs in each step of each process


def test_two_processes_in_a_group_of_before(pair: TrainConfig, tmp_path: Path) -> None:
    """As Ray and others hand one over, here without any variable of a launcher. It is there afterwards too."""
    environments = [{"OWN_RANK": "0"}, {"OWN_RANK": "1"}]
    cfg = changed(pair, out=tmp_path / "run")
    assert values(run_processes(train_in_a_group_of_before, cfg, environments=environments)) == [2, 2]
    assert_same_run(tmp_path / "run", Path(pair.run.out))


def train_in_a_group_of_before(cfg: TrainConfig) -> int:
    meeting = f"file://{Path(cfg.run.out).parent}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=int(os.environ["OWN_RANK"]), world_size=2)
    train(cfg)
    return torch.distributed.get_world_size()


def train_in_stages(cfg: TrainConfig) -> tuple[list[int], list[int]]:
    """Stop after step 1, by SIGTERM to the second process during step 2, and at the end: the steps of the stops; all seeds."""
    seeds, stops = [], []

    def watched_step(learner: DinoLearner, batches: Iterator[Batch], values: StepValues) -> dict[str, Tensor]:
        seeds.append(torch.initial_seed())
        if learner.steps == 1 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(learner, batches, values)

    DinoLearner.step = watched_step
    for workers, stop in ((1, 1), (0, None), (1, None)):
        with pytest.raises(Stopped) if stops == [1] else contextlib.nullcontext():
            train(changed(cfg, workers=workers, stop_after_steps=stop))
        stops.append(read_state(Path(cfg.run.out) / "last.pth")["step"])
        distributed.barrier()
    return stops, seeds


@pytest.mark.parametrize("model", [VIT, CNN], ids=["vit", "cnn"])
def test_a_bad_step_of_one_process_is_left_out_by_both(images: Path, tmp_path: Path, model: ModelConfig) -> None:
    """As if both had seen the bad number, without BatchNorm and with it, through which the other process sees it too."""
    cfg = config(images, tmp_path / "one", model=model, epochs=1, batch_size=8, knn_train=None, knn_val=None, log_every=1)
    (tmp_path / "one.yaml").write_text(dump(cfg))
    (tmp_path / "both.yaml").write_text(dump(changed(cfg, out=tmp_path / "both")))
    for name, ranks in (("one", [1]), ("both", [0, 1])):
        arguments = ["train", "--config", str(tmp_path / f"{name}.yaml")]
        outcomes = run_processes(command_with, functools.partial(spoiled_step, [3], ranks), arguments, environments=group())
        assert [outcome.value for outcome in outcomes] == [0, 0], outcomes
        assert [outcome.stderr.count("warning: step 3 was left out") for outcome in outcomes] == [1, 0]
    assert_same_run(tmp_path / "one", tmp_path / "both")
    [skipped] = [line for line in log_of(tmp_path / "one") if line["kind"] == "skipped"]
    assert skipped["step"] == 3 and len(set(skipped["files"])) == 8


def test_bad_steps_of_one_process_stop_both(images: Path, tmp_path: Path) -> None:
    """Status 1 and one line from each; afterwards the run goes on as if nothing had been."""
    cfg = config(
        images, tmp_path / "run", model=VIT, epochs=1, batch_size=8, save_every_steps=1, max_bad_steps=2, knn_train=None,
        knn_val=None,
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(dump(cfg))
    arguments = ["train", "--config", str(tmp_path / "run.yaml")]
    outcomes = run_processes(command_with, functools.partial(spoiled_step, [2, 3], [1]), arguments, environments=group())
    assert [outcome.value for outcome in outcomes] == [1, 1], outcomes
    errors = [[line for line in outcome.stderr.splitlines() if "error:" in line] for outcome in outcomes]
    assert [len(lines) for lines in errors] == [1, 1] and "[process 1]" in errors[1][0]
    assert all("2 step(s) in a row from 2 on are not finite" in line for (line,) in errors)
    report = json.loads((tmp_path / "run" / "nan_report.json").read_text())
    assert report["processes"] == 2 and len(set(report["files"])) == 8
    assert " && torchrun --nproc_per_node 2 -m dino_simpool train --config " in report["command"]
    again = run_processes(train, cfg, environments=group())  # with numbers that are good, from before or between
    values(again)
    assert read_state(tmp_path / "run" / "last.pth")["step"] == 4


def flipping_step(rank: int, learner: DinoLearner, batches: Iterator[Batch], values: StepValues) -> dict[str, Tensor]:
    """DinoLearner.step, but one process makes a mistake in the first computation of the second step."""
    if learner.steps == 1 and distributed.rank() == rank:
        flip_a_bit(learner, "head.fc2.bias", 1)
    return real_step(learner, batches, values)


def test_the_process_with_a_flipped_bit_is_named(images: Path, tmp_path: Path) -> None:
    """By both, and the run is otherwise that without verifying: the gradients of each are compared before their sum."""
    cfg = config(images, tmp_path / "run", epochs=1, batch_size=8, accumulate=1, knn_train=None, knn_val=None, verify_every=2)
    (tmp_path / "run.yaml").write_text(dump(cfg))
    arguments = ["train", "--config", str(tmp_path / "run.yaml")]
    outcomes = run_processes(command_with, functools.partial(flipping_step, 1), arguments, environments=group())
    assert [outcome.value for outcome in outcomes] == [1, 1], outcomes
    for outcome in outcomes:
        assert re.search(
            r"step 2, computed twice .* differ \(process 1 on \S+, cpu: first in head\.fc2\.bias\)", outcome.stderr
        )
    both = [changed(cfg, out=tmp_path / "verified"), changed(cfg, out=tmp_path / "plain", verify_every=0)]
    values(run_processes(train_each, both, environments=group()))
    assert_same_run(tmp_path / "verified", tmp_path / "plain")


def train_each(cfgs: list[TrainConfig]) -> None:
    for cfg in cfgs:
        train(cfg)


def test_the_command_that_repeats_a_step_on_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a place to meet, torchrun on each node would wait for the others on its own node."""
    monkeypatch.setattr(distributed, "world_size", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "gpu07")
    meeting = "--rdzv_backend c10d --rdzv_endpoint gpu07:29400 --rdzv_id nan_step"
    assert train_module._program() == f"torchrun --nnodes 2 {meeting} --nproc_per_node 8 -m dino_simpool"


def test_a_non_finite_weight_is_not_saved(pair: TrainConfig, tmp_path: Path) -> None:
    """Found when saving, before the loss shows it: both processes stop and the checkpoint of before stays."""
    cfg = changed(pair, out=tmp_path / "run", save_minutes=0.0)  # saves after each step
    (tmp_path / "run.yaml").write_text(dump(cfg))
    arguments = ["train", "--config", str(tmp_path / "run.yaml")]
    outcomes = run_processes(command_with, functools.partial(broken_step, 2), arguments, environments=group())
    assert [outcome.value for outcome in outcomes] == [1, 1], outcomes
    assert all("not finite after step 2" in outcome.stderr for outcome in outcomes)
    assert json.loads((tmp_path / "run" / "error.txt").read_text())["not_finite"]["parameters"] == ["head.fc1.weight"]
    assert read_state(tmp_path / "run" / "last.pth")["step"] == 1


def test_a_mistake_under_two_processes_is_said_and_ends_both(pair: TrainConfig, tmp_path: Path) -> None:
    """A batch that cannot be split: status 1 from each, and no folder is made."""
    cfg = changed(pair, out=tmp_path / "run", batch_size=14)
    (tmp_path / "run.yaml").write_text(dump(cfg))
    outcomes = run_processes(cli.main, ["train", "--config", str(tmp_path / "run.yaml")], environments=group())
    assert [outcome.value for outcome in outcomes] == [1, 1]
    assert "run.batch_size 14 cannot be split over 2 process(es) x 3 accumulation step(s): use 12 or 18" in outcomes[0].stderr
    assert not (tmp_path / "run").exists()


# -- the same run, divided otherwise


def sgd(images: Path, out: Path, accumulate: int) -> TrainConfig:
    """Five steps of 32 images without BatchNorm and stochastic depth, whose first momentum is the gradient."""
    optim = OptimConfig(
        name="sgd", lr=0.16, min_lr=0.01, warmup="0it", freeze_last_layer="0it", weight_decay=0.0, weight_decay_end=0.0
    )
    cfg = config(
        images, out, model=VIT, optim=optim, epochs=5, batch_size=32, accumulate=accumulate, keep_every=0, knn_train=None,
        knn_val=None,
    )  # fmt: skip
    # Hidden layers this narrow would leave features near 0 before they are normalised, with gradients in the thousands.
    return dataclasses.replace(cfg, head=HeadConfig(out_dim=32, hidden_dim=512, bottleneck_dim=64))


def train_one_step_then_all(cfg: TrainConfig) -> dict[str, Any]:
    """Gradients and center after the first step, and the weights after the last."""
    train(changed(cfg, stop_after_steps=1))
    first = read_state(Path(cfg.run.out) / "last.pth")
    train(cfg)
    last = read_state(Path(cfg.run.out) / "last.pth")
    assert (first["step"], last["step"]) == (1, 5)
    return {"momenta": first["optimizer"]["state"], "center": first["loss"]["center"], **last}


def test_1_x_32_is_2_x_16_is_16_twice(images: Path, tmp_path: Path) -> None:
    """Equal center, gradients, and weights of student and teacher after five steps at a rate above 0."""
    one, twice, both = (tmp_path / name for name in ("one", "twice", "both"))
    reference = train_one_step_then_all(sgd(images, one, 1))
    others = {
        "16 twice": train_one_step_then_all(sgd(images, twice, 2)),
        "2 x 16": values(run_processes(train_one_step_then_all, sgd(images, both, 1), environments=group()))[0],
    }
    largest = max(float(state["momentum_buffer"].abs().max()) for state in reference["momenta"].values())
    start = build_dino(sgd(images, one, 1), NUM_IMAGES, torch.device("cpu")).student.state_dict()
    moved = max(float((start[name] - value).abs().max()) for name, value in reference["student"].items())
    assert largest > 1e-2 and moved > 1e-2  # or the tolerances would mean nothing
    for name, other in others.items():
        assert_close(other["center"], reference["center"], 1e-4, 1e-7, f"{name}: center")
        assert other["momenta"].keys() == reference["momenta"].keys()
        for number, state in reference["momenta"].items():
            gradients = other["momenta"][number]["momentum_buffer"], state["momentum_buffer"]
            assert_close(*gradients, 1e-4, 1e-7, f"{name}: gradient {number}")
        for part in ("student", "teacher"):
            for key, value in reference[part].items():
                assert_close(other[part][key], value, 1e-5, 1e-5, f"{name}: {part} {key}")


def test_another_number_of_processes_goes_on_with_the_same_images(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps in two processes, one in one, and the others in two again: the weights of one process to rounding."""
    reference, cfg = sgd(images, tmp_path / "one", 1), sgd(images, tmp_path / "run", 1)
    train(reference)
    capsys.readouterr()
    first = run_processes(train, changed(cfg, stop_after_steps=2), environments=group())
    train(changed(cfg, stop_after_steps=3))
    said = capsys.readouterr().err
    last = run_processes(train, cfg, environments=group())
    values([*first, *last])
    for text, change in ((said, "2 -> 1"), (last[0].stderr, "1 -> 2")):
        assert f"changed since this run was saved: number of processes: {change}; each step has the 32 images" in text
    ours, expected = (read_state(Path(each.run.out) / "last.pth") for each in (cfg, reference))
    assert (ours["step"], ours["world_size"]) == (5, 2)
    for part in ("student", "teacher"):
        for key, value in expected[part].items():
            assert_close(ours[part][key], value, 1e-5, 1e-5, f"{part} {key}")


# -- launchers


def test_torchrun_of_one_process_is_the_same_run(whole: TrainConfig, tmp_path: Path) -> None:
    cfg = changed(whole, out=tmp_path / "run")
    (tmp_path / "run.yaml").write_text(dump(cfg))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    command = [*launcher, "-m", "dino_simpool", "train", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", Path(whole.run.out))


def test_a_single_slurm_task_is_the_same_run(whole: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    train(changed(whole, out=tmp_path))
    assert_same_run(tmp_path, Path(whole.run.out))


def parts(out: Path, name: str) -> list[dict[str, Tensor]]:
    """Student and teacher of a checkpoint: the encoder, with BatchNorm's statistics, or the head."""
    state = read_state(out / "last.pth")
    return [{key: x for key, x in state[who].items() if key.startswith(f"{name}.")} for who in ("student", "teacher")]


def continued(whole: TrainConfig, out: Path, *, out_dim: int = 24, frozen: str | None = "3it", **run: Any) -> TrainConfig:
    """A run from the weights of a finished one, with a head of another size."""
    cfg = changed(whole, out=out, init=str(Path(whole.run.out) / "last.pth"), **run)
    head = dataclasses.replace(cfg.head, out_dim=out_dim)
    return dataclasses.replace(cfg, head=head, optim=dataclasses.replace(cfg.optim, freeze_encoder=frozen))


@pytest.mark.parametrize("model", [VIT, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_the_encoder_of_run_init_stays_bit_for_bit_until_a_new_head_has_learned(
    images: Path, tmp_path: Path, model: ModelConfig, name: Any
) -> None:
    source = config(images, tmp_path / "source", model=model, epochs=1, optim=OptimConfig(name=name, lr=0.05, warmup="2it"))
    train(source)
    start, head = parts(tmp_path / "source", "encoder")[1], parts(tmp_path / "source", "head")[1]
    for steps, same in ((1, True), (3, True), (4, False)):
        out = tmp_path / str(steps)
        train(continued(source, out, epochs=2, stop_after_steps=steps, knn_every=0))
        for encoder in parts(out, "encoder"):
            assert all(torch.equal(encoder[key], start[key]) for key in start) == same, steps
        if steps == 3:
            student = parts(out, "head")[0]
            assert not torch.equal(student["head.fc1.weight"], head["head.fc1.weight"])
            moments = read_state(out / "last.pth")["optimizer"]["state"]
            assert 0 < len(moments) <= len(head), "only parameters of the head have moments"


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_from_weights_resumes_exactly_and_without_them(
    whole: TrainConfig, tmp_path: Path, stop: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(whole.run.out, source)
    whole = changed(whole, out=source)
    once, twice = continued(whole, tmp_path / "once"), continued(whole, tmp_path / "twice")
    train(once)
    train(changed(twice, stop_after_steps=stop))
    shutil.rmtree(source)
    capsys.readouterr()
    train(twice)
    assert f"resuming after step {stop} of 6; run.init {twice.run.init} is not read again" in capsys.readouterr().err
    assert_same_run(tmp_path / "twice", tmp_path / "once")
    with pytest.raises(ValueError, match=r"started from other weights \(run.init .*: give another run.out"):
        train(changed(twice, init=str(source / "best.pth")))


def test_the_head_of_the_file_is_used_if_it_fits(whole: TrainConfig, tmp_path: Path) -> None:
    """The teacher's, by both networks, with the center; then nothing is frozen. Momentum 1 keeps the teacher at its start."""
    cfg = continued(whole, tmp_path / "own", out_dim=whole.head.out_dim, frozen=None, stop_after_steps=1)
    train(dataclasses.replace(cfg, teacher=dataclasses.replace(cfg.teacher, momentum=1.0)))
    source = read_state(Path(whole.run.out) / "last.pth")
    state = read_state(tmp_path / "own" / "last.pth")
    for name, _ in load_encoder(Path(whole.run.out) / "last.pth").named_parameters():
        assert torch.equal(state["teacher"][f"encoder.{name}"], source["teacher"][f"encoder.{name}"])
    for name in ("head.fc1.weight", "head.last_layer.parametrizations.weight.original1"):
        assert torch.equal(state["teacher"][name], source["teacher"][name])
    assert (state["init"]["head"], state["new_head"]) == ("of the file", False)
    learner = build_dino(cfg, NUM_IMAGES, torch.device("cpu"), read_start(cfg)[0])
    assert torch.equal(learner.loss.center, source["loss"]["center"]) and not learner.plan.values(0).freeze_encoder
    assert_equal_states(learner.student.state_dict(), source["teacher"])


def test_what_a_run_started_from_is_recorded_and_a_fall_is_warned_about(
    whole: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, export = tmp_path / "out", str(Path(whole.run.out) / "backbone.safetensors")
    monkeypatch.setattr("dino_simpool.train.FALL", -101.0)
    cfg = changed(continued(whole, out, frozen=None, out_dim=whole.head.out_dim), init=export)
    train(cfg)
    said = capsys.readouterr().err
    first, *_ = log_of(out)
    source = load_encoder(export)
    knn = knn_accuracy(source, *labeled(whole), Forward(EvalTransform(**preprocessing(source.config)), 128, 0)).percent
    assert first["kind"] == "start" and first["k-NN"] == knn and first["head"] == "new", "an export has no head"
    assert f"start: k-NN (k = 10) {knn['10']['top1']:.2f} %" in said
    assert said.count("points below the") == 2, "once for each evaluation"
    for file in ("last.pth", "backbone.safetensors"):
        init = load_encoder(out / file).init
        assert init is not None and init["checkpoint"] == export and init["sha256"] == weights_sha256(source)
    assert model_record(load_encoder(out / "last.pth"), str(out / "last.pth"), "teacher")["init"]["knn"] == knn["10"]["top1"]


def labeled(cfg: TrainConfig) -> tuple[ImageSet, ImageSet]:
    """The sets of the k-NN evaluation."""
    return labeled_sets(str(cfg.run.knn_train), str(cfg.run.knn_val), options=("a", "b"))


def test_weights_of_another_model_are_refused_before_anything_is_written(whole: TrainConfig, tmp_path: Path) -> None:
    cfg = continued(whole, tmp_path / "out")
    wrong = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, gamma=1.25, width=16, drop_path=0.0))
    with pytest.raises(
        ValueError, match=r"gamma 1.25, there 2.0, .*width 16, there 8\): give --model.gamma 2.0 --model.width 8$"
    ):
        train(wrong)
    assert not (tmp_path / "out").exists()


def test_what_run_init_cannot_know_of_a_published_file_is_the_callers_word(
    whole: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads, which are width / 64 by custom only; and prototypes whose length is not 1 are warned about."""
    model = ModelConfig(arch="vit_small", width=64, depth=1, heads=2, patch_size=8, image_size=32, pos_interp="dino")
    torch.manual_seed(0)
    encoder, head = build_encoder(model), DinoHead(64, **dataclasses.asdict(whole.head))
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    path = tmp_path / "official.pth"
    torch.save({"teacher": to_official(state)}, path)
    cfg = dataclasses.replace(changed(whole, init=str(path), out=str(tmp_path / "out")), model=model)
    start, about = read_start(cfg)
    assert about["sha256"] == weights_sha256(encoder) and start.head is not None
    assert "prototypes" not in capsys.readouterr().err
    state["head.last_layer.parametrizations.weight.original0"][0] = 3
    torch.save({"teacher": to_official(state)}, path)
    read_start(cfg)
    assert "have lengths 1 to 3, which stay while head.norm_last_layer is true" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"run.init timm:resnet18 is timm's own model"):
        read_start(changed(cfg, init="timm:resnet18"))


def test_two_processes_from_weights_stopped_and_resumed(pair: TrainConfig, tmp_path: Path) -> None:
    once = continued(pair, tmp_path / "once")
    twice = continued(pair, tmp_path / "twice")
    values(run_processes(train_each, [once, changed(twice, stop_after_steps=2), twice], environments=group()))
    assert_same_run(tmp_path / "twice", tmp_path / "once")
