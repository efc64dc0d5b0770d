"""What is read and what is not: system folders, endings, lists, shards, sizes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
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
def test_an_image_may_be_given_alone(images: Path, tool: Tool, tmp_path: Path, name: str) -> None:
    """0.1 said that it is not text in UTF-8."""
    assert counted(tool, images / name) == 1
    shutil.copy(images / name, tmp_path / "image.txt")  # also under the name of a list
    assert counted(tool, tmp_path / "image.txt") == 1


def test_a_file_that_is_no_image_is_named(folders: Path, tool: Tool, tmp_path: Path) -> None:
    """0.1 said of all of them that they are not text in UTF-8."""
    shutil.copy(folders / "shards" / "val" / "000000.tar", tmp_path / "shard")
    (tmp_path / "array.npy").write_bytes(b"\x93NUMPY\1\0v\0")
    for name, said in (("shard", "a tar archive; give it a name that ends in .tar"), ("array.npy", "an array")):
        assert said in tool("check-data", "--data", tmp_path / name, "--workers", 0).text


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


def test_exclude_is_the_same_for_a_folder_an_archive_and_a_list(folders: Path, tool: Tool, tmp_path: Path) -> None:
    """0.1 has no such option."""
    shutil.copytree(folders / "test" / "train", tmp_path / "a" / "train")
    paths = sorted((tmp_path / "a").rglob("*.jpg"))
    (tmp_path / "a" / "list.txt").write_text("".join(f"{path.relative_to(tmp_path / 'a')}\n" for path in paths))
    (tmp_path / "b" / "train").mkdir(parents=True)
    classes = os.listdir(folders / "test" / "train")
    subprocess.run(["tar", "cf", tmp_path / "b/train/s.tar", *classes], cwd=tmp_path / "a/train", check=True)
    subprocess.run(["tar", "cf", tmp_path / "c.tar", "train"], cwd=tmp_path / "a", check=True)
    for source in ("a", "b", "a/list.txt"):
        assert counted(tool, tmp_path / source, "--exclude", "[train/hat, train/*/00?.jpg]") == 20, source
    assert counted(tool, tmp_path / "c.tar", "--exclude", "[hat/*, boot/00?.jpg]") == 30  # its leading folder is dropped


def test_members_of_shards_that_are_no_images(folders: Path, tool: Tool, model: Path, tmp_path: Path) -> None:
    """Annotations are counted; where labels are needed, a command sorts them. 0.1 advised folders that do not exist."""
    said = tool("check-data", "--data", folders / "shards" / "train", "--workers", 0).text
    assert "check-data: 60 images" in said and "60 .cls" in said
    copied = tmp_path / "shards"
    shutil.copytree(folders / "shards", copied)
    for split in ("train", "val"):
        ended = tool("knn", "--checkpoint", model, "--data", copied, "--workers", 0, "--out", tmp_path, "--train", split)
        if split == "val":  # unpacked, and of samples in folders
            (copied / "val" / "nested").mkdir()
            subprocess.run(["tar", "xf", "000000.tar", "-C", "nested"], cwd=copied / "val", check=True)
            subprocess.run(["tar", "cf", "000000.tar", "-C", "nested", "."], cwd=copied / "val", check=True)
            shutil.rmtree(copied / "val" / "nested")
        else:  # samples of two shards have the same names
            shutil.copy(copied / "train" / "000000.tar", copied / "train" / "000001.tar")
        command = re.search(r"Run `(.*?)`", ended.err)
        assert ended.status == 1 and command, ended.text
        subprocess.run(["bash", "-c", command[1]], check=True)
    knn(tool, model, copied, tmp_path, "--train", "train_classes", "--val", "val_classes")
    assert counted(tool, copied / "train_classes") == 120 and counted(tool, copied / "val_classes") == 18


def test_unpacked_shards(folders: Path, tool: Tool, model: Path, tmp_path: Path) -> None:
    """0.1 advised to remove the images."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        subprocess.run(["tar", "xf", folders / "shards" / split / "000000.tar"], cwd=tmp_path / split, check=True)
    for split in ("train", "val"):
        ended = tool("knn", "--checkpoint", model, "--data", tmp_path, "--workers", 0, "--out", tmp_path, "--train", split)
        command = re.search(r"Run `(.*?)`", ended.err)
        assert ended.status == 1 and command, ended.text
        subprocess.run(["bash", "-c", command[1]], check=True)
    assert counted(tool, tmp_path / "train_classes") == 60 and len(os.listdir(tmp_path / "val_classes")) == 3


def test_masks_in_shards_are_no_images(images: Path, tool: Tool, tmp_path: Path) -> None:
    """0.1 counted them."""
    names = ("1.jpg", "1.seg.png", "2.png", "2.mask.png", "2.1.png", "v1.2.png")  # 2.1 is a second image, not of a kind
    for name in names:
        shutil.copy(images / "ref.png", tmp_path / name)
    subprocess.run(["tar", "cf", "s.tar", *names], cwd=tmp_path, check=True)
    assert counted(tool, tmp_path / "s.tar") == 4


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


@pytest.mark.parametrize("kind", ["device", "sparse", "pipe", "proc"])
def test_a_file_without_end_is_not_read(images: Path, tool: Tool, tmp_path: Path, kind: str) -> None:
    """0.1 read a link to /dev/zero and a sparse file of 30 GB until memory ran out, and left out a pipe without a word."""
    shutil.copy(images / "ref.png", tmp_path)
    path = tmp_path / "x.png"
    if kind == "device":
        path.symlink_to("/dev/null")  # which 0.1 reads to its end, as it would read /dev/zero
    elif kind == "sparse":
        with open(path, "wb") as file:
            os.ftruncate(file.fileno(), 4 * 2**29)
    elif kind == "proc":
        path.symlink_to("/proc/cpuinfo")  # which says that it is empty
    else:
        os.mkfifo(path)
    ended = tool("check-data", "--data", tmp_path, "--workers", 0, "--max_pixels", 1_000_000)
    said = {"device": "a device", "sparse": "2,147,483,648 bytes", "pipe": "1 that are no files", "proc": "no ordinary file"}
    assert said[kind] in ended.text and ended.status == (0 if kind == "pipe" else 1)


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_a_header_in_an_archive_is_not_read_without_end(tool: Tool, tmp_path: Path, kind: bytes) -> None:
    """0.1 read as much as a header of a tar claims: 1 GB here, for ever in larger files."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 2**30
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(header.tobuf())
        file.truncate(2**30 + 10240)
    ended = tool("check-data", "--data", tmp_path / "x.tar", "--workers", 0)
    assert ended.status == 1 and "a header has 1,073,741,824 bytes" in ended.text
