"""Where the images to learn from and to measure on are, what is said if they are not there, and how classes are matched."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_simpool.data import class_folder, class_numbers, find_split, labeled_sets, same_source

NFC, NFD = "K\u00e4tzchen", "Ka\u0308tzchen"


def write(root: Path, *names: str) -> Path:
    """A small image for each path."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number % 256, np.uint8)).save(root / name)
    return root


# -- a part that is missing


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (["test/a/0.png"], "val does not exist, but there is test: give --val test"),
        (["Validation/a/0.png"], "val does not exist, but there is Validation: give --val Validation"),
        (["val2017/a/0.png", "img_test/a/0.png"], "val does not exist, but there is img_test and val2017: give --val img_test"),
        (["dev set/a/0.png"], "val does not exist, but there is dev set: give --val 'dev set'"),
        (["test/0.png"], "val does not exist, only test, train: give --val NAME, a folder of the form NAME/CLASS/IMAGE"),
        (["evaluate_me/a/0.png"], "val does not exist, only evaluate_me, train: give --val NAME"),
        ([], "val does not exist, only train: give --val NAME"),
    ],
)  # fmt: skip
def test_what_is_there_in_place_of_val_is_named(tmp_path: Path, there: list[str], said: str) -> None:
    data = write(tmp_path / "data", "train/a/0.png", *there)
    with pytest.raises(FileNotFoundError, match=f"^{data}/{re.escape(said)}"):
        labeled_sets("train", "val", inside=str(data))


def test_archives_count_as_their_folders(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "train/a/0.png", "test/a/0.png")
    shutil.make_archive(str(data / "test"), "tar", data / "test")
    shutil.rmtree(data / "test")
    with pytest.raises(FileNotFoundError, match=r"val does not exist, but there is test\.tar: give --val test$"):
        labeled_sets("train", "val", inside=str(data))
    assert [len(images) for images in labeled_sets("train", "test", inside=str(data))] == [1, 1]


def test_a_missing_train_and_a_folder_too_deep(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "training/a/0.png", "val/a/0.png")
    with pytest.raises(FileNotFoundError, match=r"train does not exist, but there is training: give --train training$"):
        labeled_sets("train", "val", inside=str(data))
    with pytest.raises(FileNotFoundError, match=rf"val/val does not exist, but {data} has val: give --data {data}$"):
        find_split("val", inside=str(data / "val"))
    with pytest.raises(
        FileNotFoundError, match=r"nowhere/train does not exist, .*nowhere is no folder: give the one that holds train"
    ):
        labeled_sets("train", "val", inside=str(tmp_path / "nowhere"))


def test_paths_of_their_own_get_advice_with_whole_paths(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "train/a/0.png", "test/a/0.png")
    options = ("--run.knn_train", "--run.knn_val")
    with pytest.raises(FileNotFoundError, match=rf"val does not exist, but there is test: give --run\.knn_val {data}/test$"):
        labeled_sets(f"{data}/train", f"{data}/val", options=options)
    assert len(labeled_sets(f"{data}/train", f"{data}/test", options=options)[1]) == 1


# -- images without class folders, and a list of their classes

LISTS = {
    "paths": ("val.txt", "val/0.png hat\nval/1.png boot\nval/2.png hat\n"),
    "names": ("val/labels.txt", "0.png hat\n1.png boot\n2.png hat"),
    "header": ("val.csv", "image,class\r\n0.png,hat\r\n1.png,boot\r\n2.png,hat\r\n"),
    "classes first": ("labels.tsv", "hat\t0.png\nboot\t1.png\nhat\t2.png\n"),
    "more columns": ("val/annotations.txt", "0.png\that\t0\t0\t9\t9\n1.png\tboot\t1\t1\t9\t9\n2.png\that\t0\t0\t9\t9\n"),
    "blank lines": ("val.txt", "\n0.png hat\n\n1.png boot\n2.png hat\n\n"),
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("flat", ["val", "val/images"])
def test_the_conversion_makes_class_folders(tmp_path: Path, kind: str, flat: str) -> None:
    """The command runs in the shell, also in a folder with a space and a quote in its name."""
    data = write(tmp_path / "it's data", "train/hat/0.png", "train/boot/0.png", *(f"{flat}/{i}.png" for i in range(3)))
    name, text = LISTS[kind]
    (data / name).write_text(text.replace("val/", f"{flat}/"), newline="")
    (data / "train.txt").write_text("train/hat/0.png hat\n")
    with pytest.raises(ValueError, match="are in no class folders, but") as error:
        labeled_sets("train", "val", inside=str(data))
    advice = re.search(r"Run `(.*)`, then give --val (\S+)$", str(error.value))
    assert advice and "\n" not in str(error.value)
    subprocess.run(["sh", "-c", advice[1]], check=True, cwd=tmp_path)
    _, val = labeled_sets("train", advice[2], inside=str(data))
    assert val.classes == ("boot", "hat") and [val.name(i) for i in range(3)] == ["boot/1.png", "hat/0.png", "hat/2.png"]


def test_long_lists_are_judged_by_their_beginning(tmp_path: Path) -> None:
    """A line that is cut there is no row; the command reads all of them."""
    names = [f"val/{number:04}.png" for number in range(1500)]
    data = write(tmp_path, "train/hat/0.png", *names)
    (data / "val.txt").write_text("".join(f"{name} hat\n" for name in names))
    with pytest.raises(ValueError, match="are in no class folders, but") as error:
        labeled_sets("train", "val", inside=str(data))
    command = re.search("Run `(.*)`", str(error.value))
    assert command
    (data / "val.txt").write_text("".join(f"{name} hat\n" for name in names[-3:]))  # fewer: it starts processes for each
    subprocess.run(["sh", "-c", command[1]], check=True)
    assert len(labeled_sets("train", "val_classes", inside=str(data))[1]) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.png 1\n1.png 0\n", "has labels such as '1', which is no class of train: put each image into a folder of its class"),
        ("0.png hat\n7.png hat\n", "not in a class folder"),
        ("notes about these images\n", "not in a class folder"),
        ("0.png\n1.png\n", "not in a class folder"),
        ("", "not in a class folder"),
        ("0" * 100_000, "not in a class folder"),
        ("0" * 300 + ".png hat", "not in a class folder"),
        ("\xff", "not in a class folder"),
    ],
)
def test_other_lists_make_no_command(tmp_path: Path, text: str, said: str) -> None:
    data = write(tmp_path, "train/hat/0.png", "val/0.png", "val/1.png")
    (data / "val.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        labeled_sets("train", "val", inside=str(data))
    assert "Run" not in str(error.value)


# -- names of classes, and one source under two names


def test_class_names_are_compared_in_composed_form(tmp_path: Path) -> None:
    data = write(tmp_path, f"train/{NFD}/0.png", "train/b/0.png", "train/z/0.png", "val/z/0.png", f"val/{NFC}/0.png")
    train, val = labeled_sets("train", "val", inside=str(data))
    assert train.classes == (NFD, "b", "z") and val.classes == (NFC, "z")
    assert class_numbers(val, train).tolist() == [0, 2]


def test_two_folders_with_one_name(tmp_path: Path) -> None:
    data = write(tmp_path, f"{NFD}/0.png", f"{NFC}/0.png")
    with pytest.raises(ValueError, match=r"class folders 'Ka\\u0308tzchen' and 'K\\xe4tzchen' have one name, .* in .*: put"):
        class_folder(str(data))


def test_the_same_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "train/a/0.png", "val/a/0.png")
    shutil.make_archive(str(tmp_path / "train"), "tar", tmp_path / "train")
    (tmp_path / "link").symlink_to("train")
    (tmp_path / "packed").symlink_to("train.tar")
    places = {name: str(tmp_path / name) for name in ("train", "val", "link", "packed", "train.tar")}
    for name, same in {"train": True, "link": True, "train.tar": True, "packed": True, "val": False}.items():
        assert same_source(places["train"], places[name]) == same_source(places[name], places["train"]) == same, name
    labeled_sets("train", "link", inside=str(tmp_path))
    assert "warning: --train and --val are the same images" in capsys.readouterr().err
