"""Trainings on a folder in which some files are broken: to the end, resumed, in two processes, and above the limit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_distributed import group, run_processes, values
from test_train import VIT, assert_same_run, changed, log_of
from test_train import config as train_config

from dino_simpool import cli
from dino_simpool.checkpoint import load_encoder, read_state
from dino_simpool.config import CropsConfig, DataConfig, TrainConfig, dump
from dino_simpool.data import EvalTransform, class_folder, epoch_order, find_images
from dino_simpool.data.bad_files import BadFiles, write_bad_files
from dino_simpool.eval.knn import Pixels, knn_accuracy
from dino_simpool.features.encode import Forward
from dino_simpool.train import train

NUM_IMAGES = 40
BROKEN = {"a/07.png": "it is a web page, probably a failed download; download the image again", "b/08.png": "it is empty"}
"""Five per cent, with what is wrong; their turns are in the first and the third step."""
FOUND = dict(zip((7, 28), BROKEN.values(), strict=True))
LISTED = "".join(f"{name}\t{reason}\n" for name, reason in BROKEN.items())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/a and train/b with twenty images each, two of them broken."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = root / "train" / "ab"[number // 20] / f"{number % 20:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    (root / "train" / "a" / "07.png").write_text("<!DOCTYPE html>")
    (root / "train" / "b" / "08.png").write_bytes(b"")
    return root


def config(images: Path, out: Path, *, workers: int = 0, max_bad_share: float = 0.1, **run: Any) -> TrainConfig:
    """Two epochs of four steps of 10 images, so that every image has its turn; a line of the log for each step."""
    run = {"batch_size": 10, "accumulate": 1, "log_every": 1, "keep_every": 0, "knn_train": None, "knn_val": None} | run
    cfg = train_config(images, out, model=VIT, **run)
    data = DataConfig(root=str(images / "train"), workers=workers, max_bad_share=max_bad_share)
    return dataclasses.replace(cfg, data=data, crops=CropsConfig(global_size=16, local_size=8, num_local=1))


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that nothing interrupted."""
    cfg = config(images, tmp_path_factory.mktemp("whole"))
    train(cfg)
    return cfg


def turns(cfg: TrainConfig) -> list[int]:
    """After each step of the first epoch, how many of the broken images have had their turn."""
    images = find_images(str(cfg.data.root))
    order = [images.name(index) in BROKEN for index in epoch_order(NUM_IMAGES, seed=cfg.run.seed, epoch=0)]
    return [sum(order[: 10 * step]) for step in (1, 2, 3, 4)]


def test_five_per_cent_of_broken_files_are_replaced_and_said(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command: status 0, the list, a number in each line of the log, a warning for each discovery and a last word."""
    cfg = config(images, tmp_path / "run", workers=2)
    (tmp_path / "run.yaml").write_text(dump(cfg))
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().err
    assert (tmp_path / "run" / "bad_files.txt").read_text() == LISTED
    log = log_of(tmp_path / "run")
    expected = turns(cfg)
    assert expected == [1, 1, 2, 2]
    assert [line["bad_files"] for line in log if line["kind"] == "step"] == expected + [2] * 4
    assert [line["bad_files"] for line in log if line["kind"] == "epoch"] == [2, 2]
    assert read_state(tmp_path / "run" / "last.pth")["bad_files"] == FOUND
    for name, reason in BROKEN.items():
        assert f"warning: {name} ({reason}) cannot be read and was replaced by another image" in said
    last = f"2 of 40 images could not be read and were replaced: see {tmp_path}/run/bad_files.txt"
    assert said.count(last) == 1 and said.count("was replaced by another image") == 2


def test_workers_change_nothing(images: Path, whole: TrainConfig, tmp_path: Path) -> None:
    train(changed(whole, out=tmp_path, workers=2))
    assert_same_run(tmp_path, Path(whole.run.out))


def test_stopped_and_resumed_it_is_the_same_run(whole: TrainConfig, tmp_path: Path) -> None:
    """Inside both epochs; the list is never behind or ahead of what is saved."""
    for stop, workers in ((1, 1), (2, 0), (6, 0)):
        train(changed(whole, out=tmp_path, workers=workers, stop_after_steps=stop))
        known = read_state(tmp_path / "last.pth")["bad_files"]
        assert len(known) == (turns(whole) + [2] * 4)[stop - 1]
        listed = tmp_path / "bad_files.txt"
        assert (listed.read_text().count("\n") if listed.exists() else 0) == len(known)
    train(changed(whole, out=tmp_path))
    assert_same_run(tmp_path, Path(whole.run.out))
    assert (tmp_path / "bad_files.txt").read_text() == LISTED


def test_a_state_from_before_there_was_such_a_list(whole: TrainConfig, tmp_path: Path) -> None:
    """Broken images then had ended the run: it goes on, and lists what it finds from there on."""
    train(changed(whole, out=tmp_path, stop_after_steps=4))
    state = read_state(tmp_path / "last.pth")
    del state["bad_files"]
    torch.save(state, tmp_path / "last.pth")
    (tmp_path / "bad_files.txt").write_text("x\ty\n")
    train(changed(whole, out=tmp_path, stop_after_steps=5))
    found = read_state(tmp_path / "last.pth")["bad_files"]
    assert len(found) < 2 and "x" not in ((tmp_path / "bad_files.txt").read_text() if found else "")
    train(changed(whole, out=tmp_path))
    assert (tmp_path / "bad_files.txt").read_text() == LISTED


def test_an_old_list_goes_when_the_files_are_whole(images: Path, tmp_path: Path) -> None:
    """A new run in a folder that has one; and what is said then."""
    (tmp_path / "bad_files.txt").write_text(LISTED)
    cfg = config(images, tmp_path, stop_after_steps=1)
    (images / "whole").mkdir(exist_ok=True)
    for number in range(10):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(images / "whole" / f"{number}.png")
    train(dataclasses.replace(cfg, data=DataConfig(root=str(images / "whole"), workers=0)))
    assert not (tmp_path / "bad_files.txt").exists() and log_of(tmp_path)[0]["bad_files"] == 0


@pytest.mark.parametrize("share, stops", [(0.0, True), (0.04, True), (0.05, False)])
def test_above_the_share_the_run_stops_and_says_what_to_do(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float, stops: bool
) -> None:
    """2 of 40 is 5 %; the last checkpoint stays, and with a higher limit the run goes on from it."""
    cfg = config(images, tmp_path / "run", max_bad_share=share, epochs=1, save_every_steps=1)
    (tmp_path / "run.yaml").write_text(dump(cfg))
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == int(stops)
    if not stops:
        return
    last = capsys.readouterr().err.splitlines()[-1]
    step = next(s for s, count in enumerate(turns(cfg), 1) if count > share * NUM_IMAGES)
    count = turns(cfg)[step - 1]
    assert last.startswith(f"dino-simpool train: error: {count} of 40 images cannot be read, such as ")
    assert any(f"{name} ({reason})" in last for name, reason in BROKEN.items())
    assert f"data.max_bad_share is {share:g}: repair or remove what {tmp_path}/run/bad_files.txt lists" in last
    assert (tmp_path / "run" / "bad_files.txt").read_text().count("\n") == count
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, step))
    train(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, max_bad_share=0.1)))
    train(config(images, tmp_path / "reference", epochs=1))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "reference")


def train_at_once_and_in_stages(one: TrainConfig, stages: TrainConfig) -> list[dict[int, str]]:
    train(one)
    train(changed(stages, stop_after_steps=2))
    train(stages)
    return [read_state(Path(cfg.run.out) / "last.pth")["bad_files"] for cfg in (one, stages)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_k_nn_of_a_training_leaves_broken_images_out(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    both = {"knn_train": str(images / "train"), "knn_val": str(images / "train"), "knn_every": 1}
    cfg = config(images, tmp_path / "run", workers=workers, **both)
    train(cfg)
    said = capsys.readouterr().err
    for name in ("bank", "val"):
        text = f"warning: k-NN {name} leaves out 2 broken image(s), such as {images}/train/a/07.png"
        assert said.count(text) == 2
    found = [row["k-NN"] for row in log_of(tmp_path / "run") if "k-NN" in row]

    intact = tmp_path / "intact"  # the same without them
    shutil.copytree(images / "train", intact, ignore=lambda folder, _: [x[2:] for x in BROKEN if folder.endswith(x[:1])])
    encoder = load_encoder(tmp_path / "run/last.pth")
    transform = EvalTransform(cfg.model.image_size, resize=cfg.model.resize, mean=cfg.model.mean, std=cfg.model.std)
    expected = knn_accuracy(encoder, class_folder(str(intact)), class_folder(str(intact)), Forward(transform, 7, 0))
    assert len(found) == 2 and found[-1] == expected.percent and len(class_folder(str(intact))) == NUM_IMAGES - 2


def test_a_k_nn_set_of_broken_images_only_is_an_error(tmp_path: Path) -> None:
    for name in ("val", "bank"):
        (tmp_path / name / "a").mkdir(parents=True)
    (tmp_path / "val/a/1.jpg").write_text("no image")
    Image.new("RGB", (20, 20)).save(tmp_path / "bank/a/1.png")
    bank, val = class_folder(str(tmp_path / "bank")), class_folder(str(tmp_path / "val"))
    transform = EvalTransform(16, resize=None, mean=(0, 0, 0), std=(1, 1, 1))
    for sets in ((bank, val), (val, bank)):
        with pytest.raises(ValueError, match=r"no image of .*val can be read"):
            knn_accuracy(Pixels(16), *sets, Forward(transform, 1, 0), skip_broken=True)


def test_two_processes_agree(whole: TrainConfig, tmp_path: Path) -> None:
    """One list of what both found, the numbers of one process in the log, exact when resumed; above the limit both end."""
    one, stages = (changed(whole, out=tmp_path / name) for name in ("one", "stages"))
    found = values(run_processes(train_at_once_and_in_stages, one, stages, environments=group()))
    assert found == [[FOUND] * 2] * 2
    assert_same_run(tmp_path / "stages", tmp_path / "one")
    for name in ("one", "stages"):
        assert (tmp_path / name / "bad_files.txt").read_text() == LISTED
    counts = [[(line["kind"], line["bad_files"]) for line in log_of(out)] for out in (tmp_path / "one", Path(whole.run.out))]
    assert counts[0] == counts[1]
    strict = dataclasses.replace(whole.data, max_bad_share=0.0)
    refused = dataclasses.replace(changed(whole, out=tmp_path / "strict"), data=strict)
    (tmp_path / "strict.yaml").write_text(dump(refused))
    outcomes = run_processes(cli.main, ["train", "--config", str(tmp_path / "strict.yaml")], environments=group())
    assert [outcome.value for outcome in outcomes] == [1, 1]
    assert all("images cannot be read, such as" in outcome.stderr.splitlines()[-1] for outcome in outcomes)


def test_the_list_holds_names_that_are_not_text(tmp_path: Path) -> None:
    name = b"\xff\xfe.jpg".decode("utf-8", "surrogateescape")
    write_bad_files(tmp_path / "bad_files.txt", [(name, "it is empty"), ("ü/ß.jpg", "it is a façade")])
    assert (tmp_path / "bad_files.txt").read_bytes() == (
        b'"\\udcff\\udcfe.jpg"\tit is empty\n' + "ü/ß.jpg\tit is a façade\n".encode()
    )
    write_bad_files(tmp_path / "bad_files.txt", [])
    assert (tmp_path / "bad_files.txt").read_bytes() == b""


def test_each_file_is_listed_once_with_its_first_reason(images: Path, tmp_path: Path) -> None:
    bad = BadFiles(find_images(str(images / "train")), tmp_path, max_share=0.1, found={})
    bad.note([3, 2, 39], ["late", "", "gone"])
    assert bad.found == {} and not (tmp_path / "bad_files.txt").exists()
    bad.gather()
    bad.note([1, 39], ["early", "other"])
    bad.gather()
    bad.gather()
    assert list(bad.found.items()) == [(1, "early"), (3, "late"), (39, "gone")]
    assert (tmp_path / "bad_files.txt").read_text() == "a/01.png\tearly\na/03.png\tlate\nb/19.png\tgone\n"
    bad.note([5, 6], ["x", "y"])
    with pytest.raises(
        ValueError, match=r"^5 of 40 images cannot be read, such as a/05\.png \(x\), and data\.max_bad_share is 0"
    ):
        bad.gather()
