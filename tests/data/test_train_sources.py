"""Trainings from a folder, archives and a mixture, with the colours made in both places: the same bits, stopped or not."""

from __future__ import annotations

import dataclasses
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_learner import assert_equal_states
from test_train import VIT, changed, config, log_of

from dino_simpool import distributed
from dino_simpool.checkpoint import read_state
from dino_simpool.config import CropsConfig, DataConfig, TrainConfig
from dino_simpool.data import ImageSet, find_images
from dino_simpool.data.bad_files import BadFiles
from dino_simpool.data.feed import Feed, Loaded, build_feed
from dino_simpool.data.loaders import replacement
from dino_simpool.train import train

PLACES = ("cpu", "device")
BROKEN = 2
"""The number of the image that is; its turn is in the second step."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | tuple[str, ...]]:
    """20 images, one of them broken, as a folder, a tar, a zip, and half as a folder and half as a tar."""
    root = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    for number in range(20):
        path = root / "all" / "ab"[number // 10] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((40, 30), Image.Resampling.BICUBIC).save(path)
    path = root / "all" / "ab"[BROKEN // 10] / f"{BROKEN:02}.jpg"
    path.write_bytes(path.read_bytes()[:300])
    for name, part in (("all", root / "all"), ("b", root / "all" / "b")):
        with tarfile.open(root / f"{name}.tar", "w") as archive:
            archive.add(part, name)
    with zipfile.ZipFile(root / "all.zip", "w") as packed:
        for path in sorted((root / "all").rglob("*.jpg")):
            packed.write(path, path.relative_to(root))
    mixed = (str(root / "all" / "a"), str(root / "b.tar"))
    return {"folder": str(root / "all"), "tar": str(root / "all.tar"), "zip": str(root / "all.zip"), "mixed": mixed}


def two_epochs(root: str | tuple[str, ...], place: str, out: Path, **run) -> TrainConfig:
    """Two epochs of two steps."""
    run = {"batch_size": 8, "accumulate": 1, "log_every": 1, "keep_every": 0, "knn_train": None, "knn_val": None} | run
    cfg = config(Path(), out, model=VIT, **run)
    data = DataConfig(root=root, workers=0, augment_on=place)
    return dataclasses.replace(cfg, data=data, crops=CropsConfig(global_size=16, local_size=8, num_local=1))


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """From the folder, in this process alone and never interrupted, by the place of the colours."""
    return {place: train(two_epochs(sources["folder"], place, tmp_path_factory.mktemp(place))) for place in PLACES}


@pytest.mark.parametrize("source", ["folder", "tar", "zip", "mixed"])
@pytest.mark.parametrize("place", PLACES)
def test_stopped_inside_an_epoch_and_resumed_from_any_source(sources, whole, tmp_path: Path, place: str, source: str):
    """With other numbers of workers before and after. The broken image has its turn, and is replaced by the same one."""
    cfg = two_epochs(sources[source], place, tmp_path)
    train(changed(cfg, workers=1, stop_after_steps=1))
    assert read_state(tmp_path / "last.pth")["step"] == 1
    train(changed(cfg, workers=2))
    ours, reference = (read_state(out / "last.pth") for out in (tmp_path, whole[place]))
    for name in sorted(reference.keys() - {"config", "images"}):  # the mixture calls the images by longer names
        assert_equal_states({name: ours[name]}, {name: reference[name]}, name)
    assert log_of(tmp_path) == log_of(whole[place]) and list(reference["bad_files"]) == [BROKEN]
    if source != "mixed":
        assert ours["images"] == reference["images"]
        assert (tmp_path / "bad_files.txt").read_bytes() == (whole[place] / "bad_files.txt").read_bytes()


def test_both_places_train_on_nearly_the_same_views(whole):
    """Not the same bits, which would mean that the option does nothing. Only the losses of the first
    epoch are compared: the training multiplies small differences, by how much depends on the CPU."""
    cpu, device = ([line["loss"] for line in log_of(whole[place]) if line["kind"] == "step"] for place in PLACES)
    assert len(cpu) == 4 and cpu != device and cpu[:2] == pytest.approx(device[:2], rel=0.005)


def test_auto_is_the_cpu_where_the_device_is_one(sources, whole, tmp_path: Path):
    train(two_epochs(sources["folder"], "auto", tmp_path))
    assert log_of(tmp_path) == log_of(whole["cpu"])


def test_batches_carry_the_classes_of_the_images_that_are_shown(sources, tmp_path: Path):
    """Class folders give labels; the place of a broken image of class b has the class of the image shown there instead."""
    cfg = two_epochs(sources["folder"], "cpu", tmp_path)
    images = find_images(cfg.data.root)
    bad_files = BadFiles(images, tmp_path, max_share=0.1, found={})
    for seed in range(4):  # the replacement is of class a for some seed, and of class b for another
        seeded = changed(cfg, seed=seed)
        feed = build_feed(seeded, bad_files, batch_size=20, start_step=0, total_steps=1, device=torch.device("cpu"))
        [batch] = feed.batches(1)
        shown = replacement(BROKEN, total=20, seed=seed, epoch=0, attempt=0)
        expected = [(shown if index == BROKEN else index) // 10 for index in batch.indices.tolist()]
        assert batch.labels is not None and batch.labels.tolist() == expected
    mixed = find_images(sources["mixed"])
    feed = build_feed(
        cfg, BadFiles(mixed, tmp_path, max_share=0.1, found={}), batch_size=20, start_step=0, total_steps=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert next(feed.batches(1)).labels is None  # several sources have no common classes


def test_images_per_second_are_those_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three of them, batches of 4 and 2 of this one and a clock that is told: each row counts from its last call on."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    loader = [([torch.zeros(size, 3, 8, 8)], torch.arange(size), [""] * size, torch.arange(size)) for size in (4, 2, 4)]
    images = ImageSet("", np.array(["x.jpg"] * 4))
    feed = Feed(loader, torch.device("cpu"), list, BadFiles(images, tmp_path, max_share=0.0, found={}))
    assert [len(batch.views[0]) for batch in feed.batches(2)] == [4, 2]
    clock[0] += 2
    window = feed.timings("window")
    assert (window["images_per_second"], window["seconds"], window["data_wait_percent"]) == (3 * 6 / 2, 2, 0)
    assert [len(batch.views[0]) for batch in feed.batches(1)] == [4]
    clock[0] += 4
    assert feed.timings("window")["images_per_second"] == 3 * 4 / 4
    assert feed.timings("epoch")["images_per_second"] == 3 * 10 / 6


def test_waiting_and_memory_of_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A loader that takes 1 s for each batch and steps of 3 s: the share since the row's last call, and memory in MiB."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def items() -> Iterator[Loaded]:
        for _ in range(4):
            clock[0] += 1
            yield [torch.zeros(2, 3, 8, 8)], torch.arange(2), ["", ""], torch.arange(2)

    images = ImageSet("", np.array(["x.jpg"] * 4))
    feed = Feed(items(), torch.device("cpu"), list, BadFiles(images, tmp_path, max_share=0.0, found={}))
    shares = []
    for pause in (3, 3, 1, 1):
        list(feed.batches(1))
        clock[0] += pause
        shares.append(feed.timings("window")["data_wait_percent"])
    assert shares == [25, 25, 50, 50]
    epoch = feed.timings("epoch")
    assert epoch["data_wait_percent"] == pytest.approx(100 * 4 / 12)
    assert 50 < epoch["max_memory_mb"] < 1e6


def test_advice_for_a_run_that_waits_for_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """More workers while there are cores for them, then the colors on a device that is not the CPU, then other means."""
    monkeypatch.setattr("dino_simpool.data.feed.default_workers", lambda: 8)
    bad_files = BadFiles(ImageSet("", np.array(["x.jpg"])), tmp_path, max_share=0.0, found={})
    for device, workers, place, words in (
        ("cpu", 7, "cpu", "raise data.workers, which is 7; this process may use 8 cores"),
        ("cpu", 8, "cpu", "all 8 cores are busy"),
        ("cpu", None, "cpu", "all 8 cores are busy"),
        ("meta", 8, "cpu", "set data.augment_on device"),
        ("meta", 8, "auto", "all 8 cores are busy"),
    ):
        cfg = TrainConfig(data=DataConfig(workers=workers, augment_on=place))
        assert Feed([], torch.device(device), list, bad_files).advice(cfg).startswith(words)
