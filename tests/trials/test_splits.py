"""Validation images that are not where they are looked for, or that the training images hold too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest
from harness import Ended, Tool

OPTIONS = ("--workers", 0, "--k", "[5]")


def knn(tool: Tool, model: Path, data: Path, out: Path, *options: object) -> Ended:
    return tool("knn", "--checkpoint", model, "--data", data, "--out", out, *OPTIONS, *options)


def record(out: Path) -> dict:
    return json.loads((out / "knn.json").read_text())


@pytest.mark.parametrize("name", ["test", "valid"])
def test_the_error_names_the_option_that_serves(name: str, folders: Path, model: Path, tmp_path: Path, tool: Tool) -> None:
    """0.1 says only that val does not exist, though another folder of class folders lies beside train."""
    ended = knn(tool, model, folders / name, tmp_path)
    assert ended.status == 1 and ended.err.count("\n") == 1
    option = re.search(rf"val does not exist, but there is {name}: give (--val \S+)", ended.err)
    assert option, ended.err
    assert knn(tool, model, folders / name, tmp_path, *option[1].split()).status == 0
    assert record(tmp_path)["counts"] == {"train": 60, "val": 18, "classes": 3}


def test_a_list_of_labels_beside_a_flat_val_is_named_with_the_conversion(
    folders: Path, model: Path, tmp_path: Path, tool: Tool
) -> None:
    """0.1 says `move or remove them` about all images of val, and nothing of the list of their classes beside it."""
    data = shutil.copytree(folders / "flatval", tmp_path / "a b")
    ended = knn(tool, model, data, tmp_path)
    assert ended.status == 1 and ended.err.count("error: ") == 1
    advice = re.search(r"val\.txt says the class of each\. Run `(.*)`, then give (--val \S+)", ended.err)
    assert advice, ended.err
    subprocess.run(["sh", "-c", advice[1]], check=True)
    assert knn(tool, model, data, tmp_path, *advice[2].split()).status == 0
    assert record(tmp_path)["counts"] == {"train": 60, "val": 18, "classes": 3}
    for image in (data / "val_classes").rglob("*.jpg"):
        assert image.name.startswith(f"{image.parent.name}_") and image.resolve() == data / "val" / image.name


@pytest.mark.parametrize("evaluator", ["knn", "linear"])
def test_copies_of_training_images_are_said_beside_the_number(
    evaluator: str, folders: Path, model: Path, tmp_path: Path, tool: Tool
) -> None:
    """0.1 prints the accuracy on a val set half of which is copied from train, without a word."""
    options = OPTIONS if evaluator == "knn" else ("--workers", 0, "--epochs", 2)
    ended = tool(evaluator, "--checkpoint", model, "--data", folders / "leak", "--out", tmp_path, *options)
    assert ended.status == 0, ended.text
    lines = [line.strip() for line in ended.out.splitlines()]
    assert "warning: 18 of 36 val images are also in train (same bytes)" in lines
    overlap = json.loads((tmp_path / f"{evaluator}.json").read_text())["overlap"]
    assert overlap == {"same_folder": False, "equal_files": 18, "val": 36}


@pytest.mark.parametrize("other", ["train", "link", "train.tar"])
def test_the_same_images_as_train_and_val_are_said(other: str, folders: Path, model: Path, tmp_path: Path, tool: Tool) -> None:
    """0.1 prints the accuracy of images that find themselves, without a word; link is a link to train, train.tar is packed."""
    data = tmp_path / "data"
    shutil.copytree(folders / "test" / "train", data / "train")
    if other == "link":
        (data / other).symlink_to(data / "train")
    if other == "train.tar":
        shutil.make_archive(str(data / "train"), "tar", data / "train")
    ended = knn(tool, model, data, tmp_path, "--val", other)
    assert ended.status == 0, ended.text
    assert "train and val are the same folder; 60 of 60 val images are also in train (same bytes)" in ended.out
    assert record(tmp_path)["overlap"] == {"same_folder": True, "equal_files": 60, "val": 60}


def test_accents_are_one_name_however_they_are_stored(folders: Path, model: Path, tmp_path: Path, tool: Tool) -> None:
    """0.1 does not find the class of val among those of train, and prints the same name for both."""
    ended = knn(tool, model, folders / "accents", tmp_path)
    assert ended.status == 0, ended.text
    assert record(tmp_path)["counts"] == {"train": 60, "val": 18, "classes": 3}


def test_two_folders_of_one_name_are_an_error(folders: Path, model: Path, tmp_path: Path, tool: Tool) -> None:
    """0.1 takes the two for two classes, which look the same."""
    data = shutil.copytree(folders / "accents", tmp_path / "data")
    shutil.copytree(data / "train" / "boot", data / "train" / unicodedata.normalize("NFD", "Kätzchen"))
    ended = knn(tool, model, data, tmp_path)
    assert ended.status == 1 and ended.err.count("error: ") == 1
    assert r"class folders 'Ka\u0308tzchen' and 'K\xe4tzchen' have one name" in ended.err


def test_classes_of_unequal_size_do_not_hide_behind_the_mean(folders: Path, model: Path, tmp_path: Path, tool: Tool) -> None:
    """0.1 has only the accuracy over all images, in which a class of two counts a sixth of one of twelve."""
    data = shutil.copytree(folders / "leak", tmp_path / "data")
    for image in sorted((data / "val" / "hat").iterdir())[2:]:
        image.unlink()
    for image in (data / "val" / "shirt").iterdir():
        image.unlink()
    (data / "val" / "shirt").rmdir()
    ended = knn(tool, model, data, tmp_path)
    assert ended.status == 0, ended.text
    found = record(tmp_path)
    classes = found["per_class"]
    assert {name: each["images"] for name, each in classes.items()} == {"boot": 12, "hat": 2, "shirt": 0}
    shares = [100 * each["correct"] / each["images"] for each in classes.values() if each["images"]]
    assert [each["top1"] for each in classes.values()] == [*shares, None]
    assert found["metrics"]["balanced_k5"] == pytest.approx(sum(shares) / 2)
    assert found["metrics"]["top1_k5"] == pytest.approx(100 * sum(each["correct"] for each in classes.values()) / 14)
    assert re.search(rf"top1_k5 .*\n  balanced_k5 +{found['metrics']['balanced_k5']:.2f} %\n", ended.out)


def test_a_model_of_a_fifth_of_imagenet_is_marked_beside_the_papers(model: Path, tmp_path: Path, tool: Tool) -> None:
    """0.1 puts its accuracy beside Table 3, whose models saw all of ImageNet, without a word; nor does it know of which images
    its own weights are."""
    result = json.loads((model.parent / "results" / "knn.json").read_text())
    paper = {"arch": "vit_small", "gamma": 1.25, "epochs": 100.0, "width": None, "depth": None, "heads": None, "patch_size": 16}
    result["counts"] = {"train": 1_281_167, "val": 50_000, "classes": 1000}
    result["preprocessing"] |= {"image_size": 224, "resize": 256}
    said = {}
    for number in (1_281_167, 260_000, None):
        result["model"] |= paper | ({} if number is None else {"num_images": number, "images": "0"})
        if number is None:
            del result["model"]["num_images"], result["model"]["images"]
        (tmp_path / "knn.json").write_text(json.dumps(result))
        ended = tool("table", tmp_path)
        assert ended.status == 0, ended.text
        said[number] = ended.out
    assert "69.8 " in said[1_281_167] and "images of pre-training" not in said[1_281_167] and "*" not in said[1_281_167]
    assert "images of pre-training 260,000, ImageNet-20 % (paper: 1,281,167)" in said[260_000]
    assert "images of pre-training unknown (paper: 1,281,167)" in said[None]
    for text in (said[260_000], said[None]):
        assert "69.8*" in text and "\n  * of weights trained on all of ImageNet-1k; ours" in text


def test_the_bank_of_a_training_can_be_a_part_of_train(folders: Path, model: Path, tmp_path: Path, tool: Tool) -> None:
    """0.1 has no option for it: a training on 260 images of each class is measured with all others in the bank."""
    data, run = folders / "leak", tmp_path / "run"
    ended = tool(
        "train", "--config", model.parent / "config.yaml", "--data.root", data / "train", "--run.out", run,
        "--run.epochs", 1, "--run.knn_train", data / "train", "--run.knn_val", data / "val", "--run.knn_subset_per_class", 7,
        "--data.workers", 0,
    )  # fmt: skip
    assert ended.status == 0, ended.text
    assert "; warning: 18 of 36 val images are also in train (same bytes)" in ended.err  # numbers 0 to 5 of each class
    [logged] = [line["k-NN"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "k-NN" in line]
    trained = run / "backbone.safetensors"
    assert knn(tool, trained, data, tmp_path, "--subset_per_class", 7, "--k", "[10]").status == 0
    assert record(tmp_path)["metrics"]["top1_k10"] == logged["10"]["top1"]
    assert knn(tool, trained, data, tmp_path, "--k", "[10]").status == 0
    assert record(tmp_path)["metrics"]["top1_k10"] != logged["10"]["top1"]
