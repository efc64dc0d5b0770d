"""What is read and what is not: system folders, endings, lists, shards, sizes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import Tool


def counted(tool: Tool, data: Path | str, *options: object) -> int:
    """The number of images that check-data sees."""
    ended = tool("check-data", "--data", data, "--workers", 0, *options)
    found = re.search(r"check-data: ([\d,]+) images", ended.out)
    assert found, ended.text
    return int(found[1].replace(",", ""))


def knn(tool: Tool, model: Path, data: Path, out: Path, *options: object) -> str:
    ended = tool("knn", "--checkpoint", model, "--data", data, "--out", out, "--workers", 0, "--k", "[5]", *options)
    assert ended.status == 0, ended.text
    return ended.text


@pytest.mark.parametrize("name", ["nas", "mac", "lost"])
def test_folders_of_the_system_are_no_data(folders: Path, tool: Tool, model: Path, tmp_path: Path, name: str) -> None:
    """0.1 trained on the thumbnails in @eaDir, and took __MACOSX and lost+found for classes without images."""
    assert counted(tool, folders / name) == 78
    knn(tool, model, folders / name, tmp_path)
    said = tool("check-data", "--data", folders / name, "--workers", 0).text
    assert {"nas": "@eaDir", "mac": "__MACOSX", "lost": "lost+found"}[name] in said


@pytest.mark.parametrize("name", ["p.avif", "p.jfif", "p.jp2", "p.tga", "p.qoi", "p.pnm"])
def test_every_format_of_pillow_is_listed(images: Path, tool: Tool, tmp_path: Path, name: str) -> None:
    """0.1 left them out without a word."""
    shutil.copy(images / name, tmp_path)
    shutil.copy(images / "ref.png", tmp_path)
    assert counted(tool, tmp_path) == 2


@pytest.mark.parametrize("name", ["noext", "p.qoi", "p.jp2"])
def test_an_image_may_be_given_alone(images: Path, tool: Tool, name: str) -> None:
    """0.1 said that it is not text in UTF-8."""
    assert counted(tool, images / name) == 1


def test_what_is_left_out_is_said_by_ending(images: Path, tool: Tool, tmp_path: Path) -> None:
    """0.1 said nothing."""
    shutil.copy(images / "ref.png", tmp_path)
    for ending in ("mp4", "mp4", "npy"):
        (tmp_path / f"{len(list(tmp_path.iterdir()))}.{ending}").write_bytes(b"x")
    shutil.copy(images / "noext", tmp_path)
    said = tool("check-data", "--data", tmp_path, "--workers", 0).text
    assert "left out: 2 .mp4" in said and "1 .npy" in said and "1 without an ending" in said


def test_exclude(folders: Path, tool: Tool) -> None:
    """0.1 has no such option."""
    assert counted(tool, folders / "test" / "train", "--exclude", "[hat, 00?.jpg]") == 20
    said = tool("check-data", "--data", folders / "test" / "train", "--workers", 0, "--exclude", "[hat, nothing]").text
    assert "20 excluded by hat" in said or "1 excluded by hat" in said
    assert "nothing matches exclude nothing" in said


def test_members_of_shards_that_are_no_images(folders: Path, tool: Tool, model: Path, tmp_path: Path) -> None:
    """Annotations are counted; where labels are needed, a command sorts them. 0.1 advised folders that do not exist."""
    said = tool("check-data", "--data", folders / "shards" / "train", "--workers", 0).text
    assert "check-data: 60 images" in said and "60 .cls" in said
    copied = tmp_path / "shards"
    shutil.copytree(folders / "shards", copied)
    for split in ("train", "val"):
        ended = tool("knn", "--checkpoint", model, "--data", copied, "--workers", 0, "--out", tmp_path, "--train", split)
        command = re.search(r"Run `(.*?)`", ended.err)
        assert ended.status == 1 and command, ended.text
        subprocess.run(["bash", "-c", command[1]], check=True)
    knn(tool, model, copied, tmp_path, "--train", "train_classes", "--val", "val_classes")


def test_masks_in_shards_are_no_images(images: Path, tool: Tool, tmp_path: Path) -> None:
    """0.1 counted them."""
    for name in ("1.jpg", "1.seg.png", "2.png", "2.mask.png", "v1.2.png"):
        shutil.copy(images / "ref.png", tmp_path / name)
    subprocess.run(["tar", "cf", "s.tar", "1.jpg", "1.seg.png", "2.png", "2.mask.png", "v1.2.png"], cwd=tmp_path, check=True)
    assert counted(tool, tmp_path / "s.tar") == 3


@pytest.mark.parametrize("name", ["hash.txt", "labels.csv", "quoted.txt", "windows.txt", "uri.txt"])
def test_lists_as_people_have_them(folders: Path, tool: Tool, name: str) -> None:
    """0.1 skipped `#sunset.jpg` as a comment, and did not find the others."""
    assert counted(tool, folders / "lists" / name) == (2 if name == "hash.txt" else 1)


def test_the_names_that_extract_writes_are_a_list_of_the_same_images(
    folders: Path, tool: Tool, model: Path, tmp_path: Path
) -> None:
    """0.1 refused a newline, and lost names with # or spaces when it read them again."""
    source = tmp_path / "images"
    source.mkdir()
    for path in (folders / "lists").glob("*.jpg"):
        shutil.copy(path, source)
    options = ("--checkpoint", model, "--workers", 0)
    assert tool("extract", *options, "--data", source, "--out", tmp_path / "out").status == 0
    shutil.copy(tmp_path / "out" / "ids.txt", source / "ids.txt")
    assert counted(tool, source / "ids.txt") == len(list(source.glob("*.jpg")))


@pytest.mark.parametrize("kind", ["device", "sparse", "pipe"])
def test_a_file_without_end_is_not_read(images: Path, tool: Tool, tmp_path: Path, kind: str) -> None:
    """0.1 read a link to /dev/zero and a sparse file of 30 GB until memory ran out, and left out a pipe without a word."""
    shutil.copy(images / "ref.png", tmp_path)
    path = tmp_path / "x.png"
    if kind == "device":
        path.symlink_to("/dev/null")  # which 0.1 reads to its end, as it would read /dev/zero
    elif kind == "sparse":
        with open(path, "wb") as file:
            os.ftruncate(file.fileno(), 4 * 2**29)
    else:
        os.mkfifo(path)
    ended = tool("check-data", "--data", tmp_path, "--workers", 0, "--max_pixels", 1_000_000)
    said = {"device": "a device", "sparse": "2,147,483,648 bytes", "pipe": "1 that are no files"}[kind]
    assert (said in ended.text and "1 images" in ended.text) or said in ended.text
