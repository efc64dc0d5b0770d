"""Archives as sources, and the index of large sources. Folders and lists: test_data.py."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, CropsConfig, DecodingSettings, Exclude
from dino_simpool.data import ImageSet, TrainBatches, archives, cache, class_folder, find_images, train_loader
from dino_simpool.data import scan as scanning
from dino_simpool.data.augment import MultiCrop
from dino_simpool.data.decode import read_rgb
from dino_simpool.data.index import Index, Strings, open_index

NAMES = ("b/2.jpg", "b/10.jpg", "a/z.PNG", "a/deep/er/q.jpg", "a/deep/p.jpg", "a-b/x.jpg", "B/ü #1.jpg")
LONG = "c/" + "/".join(["long" * 20] * 4) + "/" + "name" * 40 + ".jpg"
"""Longer than the 100 and the 255 characters of old tar headers."""


def image(seed: int, suffix: str = ".jpg") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG" if suffix.lower() == ".png" else "JPEG")
    return file.getvalue()


def write_tree(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(seed, Path(name).suffix))
    return root


def pack_tar(path: Path, root: Path, inside: str = "", *, form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        archive.add(root, arcname=inside or ".")
    return path


def pack_zip(path: Path, root: Path, inside: str = "", *, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(root.rglob("*"), reverse=True):  # folders too, not in the order of the names
            archive.write(file, os.path.join(inside, file.relative_to(root)))
    return path


PACKERS: dict[str, Callable[[Path, Path, str], Path]] = {
    "gnu.tar": lambda path, root, inside: pack_tar(path, root, inside),
    "pax.tar": lambda path, root, inside: pack_tar(path, root, inside, form=tarfile.PAX_FORMAT),
    "stored.zip": lambda path, root, inside: pack_zip(path, root, inside),
    "deflated.zip": lambda path, root, inside: pack_zip(path, root, inside, method=zipfile.ZIP_DEFLATED),
}


def tar_of(path: Path, *members: tuple[str, bytes | str], kind: bytes = tarfile.SYMTYPE) -> Path:
    """An archive of members in this order: bytes are files, a str is the target of a link."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = kind, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def names(images: ImageSet) -> list[str]:
    return [images.name(i) for i in range(len(images))]


def contents(images: ImageSet) -> list[bytes]:
    return [images.read_bytes(i) for i in range(len(images))]


def assert_same(ours: ImageSet, theirs: ImageSet) -> None:
    assert names(ours) == names(theirs) and contents(ours) == contents(theirs) and ours.digest() == theirs.digest()
    assert ours.classes == theirs.classes
    assert (ours.labels is None) == (theirs.labels is None) or np.array_equal(ours.labels, theirs.labels)


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and ":" in text  # one line: what is wrong, then what to do
    return text


# -- one archive


@pytest.mark.parametrize("inside", ["", "train", "./train"])
@pytest.mark.parametrize("kind", PACKERS)
def test_an_archive_equals_its_folder(tmp_path, kind, inside):
    root = write_tree(tmp_path / "train", *NAMES, LONG, "a/._z.jpg", ".hidden/x.jpg")
    (root / "a/notes.txt").write_text("no image")
    path = PACKERS[kind](tmp_path / kind, root, inside)
    assert len(find_images(str(root))) == len(NAMES) + 1
    assert_same(find_images(str(path)), find_images(str(root)))
    assert_same(class_folder(str(path)), class_folder(str(root)))
    assert_same(class_folder(str(path), subset_per_class=1), class_folder(str(root), subset_per_class=1))
    one = find_images(str(path))
    assert one.path(0) == f"{path}/{one.name(0)}" and one.digest() == hashlib.sha256("\n".join(names(one)).encode()).hexdigest()
    assert np.array_equal(np.asarray(one.read(3)), np.asarray(read_rgb(str(root / one.name(3)))))


def test_an_archive_of_images_without_folders(tmp_path):
    root = write_tree(tmp_path / "flat", "b.jpg", "a.jpg")
    path = pack_tar(tmp_path / "flat.tar", root, "flat")
    assert names(find_images(str(path))) == ["flat/a.jpg", "flat/b.jpg"]  # a folder of images is their class
    assert class_folder(str(path)).classes == ("flat",)
    assert names(find_images(str(pack_zip(tmp_path / "flat.zip", root)))) == ["a.jpg", "b.jpg"]
    with pytest.raises(ValueError, match=r"a\.jpg and 1 other images in .*flat\.zip are not in a class folder") as error:
        class_folder(str(tmp_path / "flat.zip"))
    message(error)


def test_an_archive_in_place_of_a_class_folder(tmp_path):
    root = write_tree(tmp_path / "train", *NAMES)
    expected = class_folder(str(root))
    pack_zip(tmp_path / "train.zip", root)
    write_tree(tmp_path / "other", "c/x.jpg")
    pack_tar(tmp_path / "train.tar", tmp_path / "other")
    assert_same(class_folder(str(root)), expected)  # the folder itself comes first
    kept = [root / name for name in names(expected)]
    shutil.rmtree(root)
    assert class_folder(str(root)).classes == ("c",) and class_folder(str(root)).root == f"{root}.tar"
    (tmp_path / "train.tar").unlink()
    assert names(class_folder(str(root))) == names(expected) and not kept[0].exists()
    (tmp_path / "train.zip").unlink()
    with pytest.raises(FileNotFoundError, match="train does not exist"):
        class_folder(str(root))
    (tmp_path / "train.tgz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"train\.tgz is compressed"):
        class_folder(str(root))


def test_a_class_without_images_in_an_archive(tmp_path):
    root = write_tree(tmp_path / "x", "a/1.jpg")
    (root / "b").mkdir()
    for path in (root, pack_tar(tmp_path / "x.tar", root, "x"), pack_zip(tmp_path / "x.zip", root)):
        with pytest.raises(ValueError, match="class folder b has no images"):
            class_folder(str(path))
        assert names(find_images(str(path), subset_per_class=1))[0].endswith("1.jpg")


def test_links_in_archives_are_followed(tmp_path):
    one, two = image(1), image(2)
    path = tar_of(tmp_path / "x.tar", ("a/1.jpg", one), ("b/2.jpg", "a/1.jpg"), ("blob", two), ("a/3.jpg", "blob"),
                  kind=tarfile.LNKTYPE)  # fmt: skip
    images = find_images(str(path))
    assert dict(zip(names(images), contents(images), strict=True)) == {"a/1.jpg": one, "a/3.jpg": two, "b/2.jpg": one}
    path = tar_of(tmp_path / "y.tar", ("b/2.jpg", "../c/3.jpg"), ("c/3.jpg", "1.jpg"), ("c/1.jpg", one))
    images = find_images(str(path))
    assert names(images) == ["b/2.jpg", "c/1.jpg", "c/3.jpg"] and contents(images) == [one] * 3
    root = write_tree(tmp_path / "z", "c/1.jpg")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(root / "c/1.jpg", "c/1.jpg")
        link = zipfile.ZipInfo("d/2.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "../c/1.jpg")
    assert contents(find_images(str(tmp_path / "z.zip"))) == [(root / "c/1.jpg").read_bytes()] * 2


@pytest.mark.parametrize("link, to, end", [("c", "a", "a"), ("b/more", "../a/deep", "a/deep"), ("b/up", "../a/", "a")])
def test_links_to_folders_in_archives_are_refused(tmp_path, link, to, end):
    root = write_tree(tmp_path / "x", "a/1.jpg", "a/deep/2.jpg", "b/3.jpg")
    (root / link).symlink_to(to)
    for path in (pack_tar(tmp_path / "x.tar", root), zip_with_links(tmp_path / "x.zip", root)):
        with pytest.raises(ValueError, match=rf"{path.name}/{link} is a link to the folder {end}: pack the folder") as error:
            find_images(str(path))
        message(error)


def test_links_that_add_no_images_are_ignored_as_in_the_unpacked_folder(tmp_path):
    root = write_tree(tmp_path / "x", "a/1.jpg", "a/deep/2.jpg", "b/3.jpg")
    (root / "empty").mkdir()
    for link, to in (
        ("a/self", "."),
        ("up", "."),
        (".hidden", "a"),
        ("gone", "z"),
        ("b/nothing", "../empty"),
        ("a/file", "1.jpg"),
    ):
        (root / link).symlink_to(to)
    for path in (pack_tar(tmp_path / "x.tar", root), zip_with_links(tmp_path / "x.zip", root)):
        assert_same(find_images(str(path)), find_images(str(root)))


def zip_with_links(path: Path, root: Path) -> Path:
    """A folder packed as by `zip --symlinks`."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            link = zipfile.ZipInfo(str(file.relative_to(root)))
            link.external_attr = 0o120777 << 16
            if file.is_symlink():
                archive.writestr(link, os.readlink(file))
            elif file.is_file():
                archive.write(file, file.relative_to(root))
    return path


def test_hard_links_keep_their_content(tmp_path):
    one, two = image(1), image(2)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("a/1.jpg", one), ("b/1.jpg", "a/1.jpg"), ("a/1.jpg", "a/1.jpg"), ("a/1.jpg", two)):
            member = tarfile.TarInfo(name)
            if isinstance(content, str):  # the third as `tar cf x.tar a a/1.jpg` writes it: a link to itself
                member.type, member.linkname = tarfile.LNKTYPE, content
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    images = find_images(str(path))  # as tar unpacks it: it creates a new file and does not overwrite the old one
    assert dict(zip(names(images), contents(images), strict=True)) == {"a/1.jpg": two, "b/1.jpg": one}


@pytest.mark.parametrize("target", ["/etc/x.jpg", "gone.jpg", "1.jpg", ""])
def test_links_that_lead_nowhere_are_refused(tmp_path, target):
    path = tar_of(tmp_path / "x.tar", ("1.jpg", target), ("2.jpg", image(0)))
    with pytest.raises(ValueError, match=r"x\.tar/1\.jpg (is a link to|cannot be read)") as error:
        find_images(str(path))
    message(error)


def test_the_last_of_two_members_of_one_name_counts(tmp_path):
    path = tar_of(tmp_path / "x.tar", ("1.jpg", image(1)), ("2.jpg", image(2)), ("./1.jpg", image(3)))
    assert contents(find_images(str(path))) == [image(3), image(2)]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("1.jpg", image(1))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("1.jpg", image(3))
    assert contents(find_images(str(tmp_path / "x.zip"))) == [image(3)]


def test_paths_that_lead_out_of_the_archive_stay_inside(tmp_path):
    path = tar_of(tmp_path / "x.tar", ("../../up.jpg", image(1)), ("/etc/root.jpg", image(2)), ("a/../b//c.jpg", image(3)))
    images = find_images(str(path))
    assert names(images) == ["up.jpg", "a/b/c.jpg", "etc/root.jpg"] and contents(images) == [image(1), image(3), image(2)]
    assert sorted(os.listdir(tmp_path)) == ["x.tar"]


def test_zip_with_64_bit_fields_a_comment_and_bytes_before_it(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(3):
            with archive.open(zipfile.ZipInfo(f"{i}.jpg"), "w", force_zip64=True) as file:
                file.write(image(i))
        archive.comment = b"of three images"
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    assert contents(find_images(str(path))) == [image(i) for i in range(3)]


# -- what is wrong with an archive


def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path):
    whole = pack_tar(tmp_path / "x.tar", write_tree(tmp_path / "x", "1.jpg", "2.jpg"), form=tarfile.USTAR_FORMAT).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as archive:
        _folder, first, second = archive.getmembers()
    end = second.offset_data + -(-second.size // 512) * 512
    assert len(find_images(str(tmp_path / "x.tar"))) == 2
    inside = (0, 100, first.offset, first.offset + 5, first.offset_data, first.offset_data + 9, second.offset, end - 600, end)
    for length in inside:
        (tmp_path / "short.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"short\.tar cannot be read as an archive \(.*truncated") as error:
            find_images(str(tmp_path / "short.tar"))
        message(error)
    (tmp_path / "short.tar").write_bytes(whole[:end] + bytes(512))  # one of the two blocks of zeros is enough
    assert len(find_images(str(tmp_path / "short.tar"))) == 2
    (tmp_path / "short.tar").write_bytes(whole[: second.offset] + b"x" * 512 + whole[second.offset + 512 :])
    with pytest.raises(ValueError, match="truncated or broken"):
        find_images(str(tmp_path / "short.tar"))


def test_a_truncated_zip_is_refused(tmp_path):
    whole = pack_zip(tmp_path / "x.zip", write_tree(tmp_path / "x", "1.jpg", "2.jpg")).read_bytes()
    for part in (b"", whole[:9], whole[:-1], whole[: len(whole) // 2], whole[1:]):
        (tmp_path / "short.zip").write_bytes(part)
        with pytest.raises(ValueError, match=r"short\.zip") as error:
            images = find_images(str(tmp_path / "short.zip"))
            contents(images)
        message(error)


def test_what_cannot_be_read_at_random_is_refused(tmp_path):
    root = write_tree(tmp_path / "x", "1.jpg")
    for mode, name in (("w:gz", "x.tar.gz"), ("w:xz", "x.tar.xz"), ("w:bz2", "gzip.tar")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(root, arcname=".")
        with pytest.raises(ValueError, match=f"{name} is compressed, .*uncompressed .tar or a .zip") as error:
            find_images(str(tmp_path / name))
        message(error)
    pack_zip(tmp_path / "bzip.zip", root, method=zipfile.ZIP_BZIP2)
    encrypted = pack_zip(tmp_path / "locked.zip", root)
    data = bytearray(encrypted.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    encrypted.write_bytes(data)
    for path, pattern in ((tmp_path / "bzip.zip", "packed by method 12"), (encrypted, "encrypted")):
        with pytest.raises(ValueError, match=rf"zip/1\.jpg cannot be read, it is {pattern}") as error:
            find_images(str(path))
        message(error)


def test_sparse_members_and_devices_are_refused(tmp_path):
    for kind, pattern in ((tarfile.GNUTYPE_SPARSE, "sparse"), (tarfile.FIFOTYPE, "device")):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            member = tarfile.TarInfo("1.jpg")
            member.type = kind
            archive.addfile(member)
        with pytest.raises(ValueError, match=rf"x\.tar/1\.jpg cannot be read, it is .*{pattern}") as error:
            find_images(str(tmp_path / "x.tar"))
        message(error)


def test_a_sparse_member_that_is_not_an_image_is_ignored(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("index.db")
        member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
        member.mode = 0o644
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[483:495] = b"%011o\0" % 50_000_000  # the apparent size; nothing is stored
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
        archive.fileobj.write(header)
        archive.offset += len(header)
        picture = tarfile.TarInfo("1.jpg")
        picture.size = len(image(0))
        archive.addfile(picture, io.BytesIO(image(0)))
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getmember("index.db").issparse() and archive.getmember("index.db").size == 50_000_000
    assert contents(find_images(str(tmp_path / "x.tar"))) == [image(0)]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_changed_byte_in_a_zip_is_noticed(tmp_path, method):
    path = pack_zip(tmp_path / "x.zip", write_tree(tmp_path / "x", "1.jpg"), method=method)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("1.jpg")
    data = bytearray(path.read_bytes())
    data[member.header_offset + 30 + len("1.jpg") + member.compress_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.zip/1\.jpg cannot be read as an image \(its (bytes|compressed data)") as error:
        find_images(str(path)).read_bytes(0)
    message(error)


def test_a_bomb_in_a_zip_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", bytes(9_500_000))
    images = find_images(str(tmp_path / "x.zip"))
    assert len(images.read_bytes(0)) == 9_500_000
    with monkeypatch.context() as patch:
        patch.setattr(archives.zlib, "decompressobj", lambda *_: pytest.fail("it was unpacked"))
        with pytest.raises(
            ValueError, match=r"x\.zip/1\.jpg cannot .*9,500,000 bytes, more than .* max_pixels; raise"
        ) as error:
            images.with_decoding(DecodingSettings(max_pixels=1_000_000, exif_orientation=False)).read_bytes(0)
        message(error)


def test_a_zip_member_that_unpacks_to_more_than_it_says_is_broken(tmp_path):
    path = pack_zip(tmp_path / "x.zip", write_tree(tmp_path / "x", "1.jpg"), method=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2") + 24
    data[place : place + 4] = (10).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"its bytes are broken"):
        find_images(str(path)).read_bytes(0)


def test_damage_inside_names_the_image(tmp_path):
    root = write_tree(tmp_path / "x", "1.jpg")
    path = pack_zip(tmp_path / "x.zip", root, method=zipfile.ZIP_DEFLATED)
    images, before = find_images(str(path)), os.stat(path)
    data = bytearray(path.read_bytes())
    for start, text, pattern in ((40, b"\xff" * 60, "compressed data is broken"), (0, b"no", "no file starts")):
        data[start : start + len(text)] = text
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        copy = pickle.loads(pickle.dumps(images))
        with pytest.raises(ValueError, match=rf"x\.zip/1\.jpg cannot be read as an image \(.*{pattern}") as error:
            copy.read(0)
        message(error)
    os.truncate(path, 5)
    with pytest.raises(ValueError, match=r"x\.zip/1\.jpg cannot be read as an image \(the archive has changed"):
        images.read(0)
    path.unlink()
    with pytest.raises(ValueError, match=r"x\.zip/1\.jpg cannot be read as an image \(.*No such file"):
        images.read(0)


def test_an_archive_replaced_by_one_of_the_same_size_is_refused(tmp_path):
    """Whoever opens it later refuses it; a process that has it open still reads the old one."""
    path, other = (tar_of(tmp_path / f"{seed}.tar", ("1.jpg", image(seed))) for seed in (0, 1))
    images, before = find_images(str(path)), os.stat(path)
    assert images.read_bytes(0) == image(0)
    later = before.st_mtime_ns + 2 * 10**9
    os.utime(other, ns=(later, later))
    os.replace(other, path)
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, later)
    with pytest.raises(
        ValueError, match=r"0\.tar/1\.jpg cannot .*\(the archive has changed since its files were listed"
    ) as error:
        pickle.loads(pickle.dumps(images)).read_bytes(0)
    message(error)
    assert images.read_bytes(0) == image(0)


def test_an_archive_of_archives_is_refused(tmp_path):
    inner = tar_of(tmp_path / "n01.tar", ("n01_1.jpg", image(0)))
    outer = tar_of(tmp_path / "all.tar", ("n01.tar", inner.read_bytes()))
    with pytest.raises(ValueError, match=r"all\.tar holds archives such as n01\.tar and no images: unpack it") as error:
        find_images(str(outer))
    message(error)
    outer.unlink()
    with pytest.raises(
        ValueError, match=r"n01\.tar/n01_1\.jpg .* not in a class folder: put each archive into a folder"
    ) as error:
        class_folder(str(tmp_path))
    message(error)


def test_a_missing_file_is_named(tmp_path):
    images = find_images(str(write_tree(tmp_path, "1.jpg")))
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1\.jpg cannot be read .*No such file") as error:
        images.read(0)
    message(error)


def test_odd_entries_of_a_folder_do_no_harm(tmp_path):
    root = write_tree(tmp_path / "x", "a/1.jpg")
    (root / "a/loop.jpg").symlink_to("loop.jpg")
    (root / "a/round").symlink_to("round")
    os.mkfifo(root / "a/pipe.jpg")  # reading it would wait forever
    images = find_images(str(root))
    assert names(images) == ["a/1.jpg", "a/loop.jpg"]
    with pytest.raises(ValueError, match=r"loop\.jpg cannot be read as an image"):
        images.read_bytes(1)
    (root / "shard.tar").symlink_to("elsewhere.tar")
    with pytest.raises(FileNotFoundError, match=r"shard\.tar is a broken link: remove it"):
        find_images(str(root))


def test_no_more_archives_stay_open_than_the_process_may_have_files(tmp_path):
    for number in range(40):
        tar_of(tmp_path / f"{number}.tar", ("1.jpg", image(0)))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\n"
        "from dino_simpool.data import archives, find_images\n"
        "images = find_images(sys.argv[1])\n"
        "assert archives.MOST_OPEN == 8 and len({images.read_bytes(i) for i in range(len(images))}) == 1\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_too_many_open_files_are_not_a_broken_image(tmp_path, monkeypatch):
    images = find_images(str(write_tree(tmp_path, "1.jpg")))

    def refuse(*_args, **_options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError, match="Too many open files"):  # not a BrokenImage, which training would replace
        images.read_bytes(0)


# -- archives among folders


def test_a_folder_of_shards_equals_the_unpacked_folder(tmp_path):
    root = write_tree(tmp_path / "whole", *NAMES, "b/n/5.jpg", "loose.jpg")
    shards = tmp_path / "shards"
    for number, part in enumerate((NAMES[::3], NAMES[1::3], NAMES[2::3])):
        for name in part:
            (tmp_path / f"part{number}" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, tmp_path / f"part{number}" / name)
    shutil.copytree(root / "b/n", shards / "b/n")
    shutil.copy(root / "loose.jpg", shards)
    pack_tar(shards / "0.tar", tmp_path / "part0")
    pack_zip(shards / "1.ZIP", tmp_path / "part1", method=zipfile.ZIP_DEFLATED)
    pack_tar(shards / "2.tar", tmp_path / "part2", "part2")
    pack_tar(shards / ".3.tar", tmp_path / "part2")
    images, expected = find_images(str(shards)), find_images(str(root))
    assert contents(images) == contents(expected)
    shown = {name: f"{number}.{'ZIP' if number == 1 else 'tar'}/{name}" for number in range(3) for name in NAMES[number::3]}
    assert names(images) == [shown.get(name, name) for name in names(expected)]
    assert images.path(1) == f"{shards}/{images.name(1)}"
    (shards / "loose.jpg").unlink()
    (root / "loose.jpg").unlink()
    labelled, expected = class_folder(str(shards)), class_folder(str(root))
    assert labelled.classes == expected.classes and np.array_equal(labelled.labels, expected.labels)
    assert contents(labelled) == contents(expected)
    few = class_folder(str(shards), subset_per_class=1)
    assert contents(few) == contents(class_folder(str(root), subset_per_class=1)) and len(few) == len(few.classes)


def test_shards_with_the_same_paths_inside(tmp_path):
    for number in range(2):
        tar_of(tmp_path / f"{number}.tar", ("a/x.jpg", image(number)), ("a/y.jpg", image(10 + number)))
    images = find_images(str(tmp_path))
    assert names(images) == ["0.tar/a/x.jpg", "1.tar/a/x.jpg", "0.tar/a/y.jpg", "1.tar/a/y.jpg"]
    assert contents(images) == [image(0), image(1), image(10), image(11)]


def test_an_archive_in_a_class_folder_belongs_to_the_class(tmp_path):
    (tmp_path / "data/n01").mkdir(parents=True)
    tar_of(tmp_path / "data/n01/x.tar", ("1.jpg", image(1)))
    write_tree(tmp_path / "data", "n02/2.jpg")
    images = class_folder(str(tmp_path / "data"))
    assert images.classes == ("n01", "n02") and names(images) == ["n01/x.tar/1.jpg", "n02/2.jpg"]


def test_a_packed_copy_beside_its_folder_is_skipped(tmp_path, capsys):
    root = write_tree(tmp_path, "images/1.jpg")
    pack_tar(root / "images.tar", root / "images")
    (root / "images.tar.gz").write_bytes(b"the same once more")
    assert names(find_images(str(root))) == ["images/1.jpg"] and "skipped" not in capsys.readouterr().err


def test_compressed_archives_in_a_folder_are_reported(tmp_path, capsys):
    (tmp_path / "more.tar.gz").write_bytes(b"")
    for source in (find_images, class_folder):
        with pytest.raises(ValueError, match=r"more\.tar\.gz is compressed"):
            source(str(tmp_path))
    write_tree(tmp_path, "a/1.jpg")
    assert len(find_images(str(tmp_path))) == 1
    assert "1 compressed archive(s) skipped, such as more.tar.gz" in capsys.readouterr().err


def test_archives_folders_and_lists_together(tmp_path, monkeypatch):
    write_tree(tmp_path, "one/z.jpg", "two/a.jpg", "three/m.jpg", "four/x\ny.jpg")
    pack_tar(tmp_path / "1.tar", tmp_path / "one")
    (tmp_path / "shards").mkdir()
    pack_zip(tmp_path / "shards/2.zip", tmp_path / "two", "n")
    (tmp_path / "list.txt").write_text(f"three/m.jpg\n{tmp_path}/two/a.jpg\n")
    roots = ["shards", "1.tar", "list.txt", "four", "one"]
    inside = ["shards/2.zip/n/a.jpg", "1.tar/z.jpg", "three/m.jpg", f"{tmp_path}/two/a.jpg", "four/x\ny.jpg", "one/z.jpg"]
    files = ["two/a.jpg", "one/z.jpg", "three/m.jpg", "two/a.jpg", "four/x\ny.jpg", "one/z.jpg"]
    monkeypatch.chdir(tmp_path)
    for prefix in ("", f"{tmp_path}/"):
        images = find_images([prefix + root for root in roots])
        assert names(images) == [os.path.join(prefix, name) for name in inside]
        assert contents(images) == [(tmp_path / file).read_bytes() for file in files]
        assert images.digest() == hashlib.sha256("\n".join(names(images)).encode()).hexdigest()


# -- reading from many places


def test_threads_read_from_more_archives_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_OPEN", 2)
    for number in range(7):
        tar_of(tmp_path / f"{number}.tar", *[(f"{i}.jpg", image(10 * number + i)) for i in range(3)])
    images = find_images(str(tmp_path))
    expected = contents(images)
    order = np.random.default_rng(0).integers(0, len(images), 5000).tolist()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads interrupt each other everywhere
    try:
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda i: (images.read_bytes(i), len(images._archives._open)), order))
    finally:
        sys.setswitchinterval(interval)
    assert [data for data, _ in read] == [expected[i] for i in order]
    assert max(count for _, count in read) <= 2


def read_in_a_process(images: ImageSet) -> tuple[int, list[bytes], str, str]:
    """In another process: the number of open archives, the content, the digest, the mapped file."""
    opened = len(images._archives._open)
    return opened, contents(images), images.digest(), images.index.file


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_set_goes_to_other_processes(tmp_path, big, method):
    pack_tar(tmp_path / "x.tar", write_tree(tmp_path / "x", *NAMES))
    settle()
    images = find_images(str(tmp_path / "x.tar"))
    expected = contents(images)
    assert len(images._archives._open) == 1 and images.index.file
    with multiprocessing.get_context(method).Pool(1) as pool:
        opened, found, digest, file = pool.apply(read_in_a_process, [images])
    assert (opened, found, digest, file) == (0, expected, images.digest(), images.index.file)


def test_a_pickle_of_a_large_set_is_small(tmp_path, big):
    root = write_tree(tmp_path / "x", *NAMES)
    settle()
    images = find_images(str(root))
    assert images.index.file and len(pickle.dumps(images)) < 2000
    assert_same(pickle.loads(pickle.dumps(images)), images)
    in_memory = ImageSet(str(root), names(images))
    assert names(pickle.loads(pickle.dumps(in_memory))) == names(images) == names(in_memory)
    write_tree(root, "b/new.jpg")
    settle()
    old = pickle.dumps(images)
    assert len(find_images(str(root))) == len(NAMES) + 1 and names(images) == names(in_memory)  # still the old one
    with pytest.raises(ValueError, match="was replaced by an index of other images"):
        pickle.loads(old)


CROP = MultiCrop(
    **dataclasses.asdict(CropsConfig(global_size=16, local_size=8, num_local=1)), mean=IMAGENET_MEAN, std=IMAGENET_STD
)


def load(images: ImageSet, **changes) -> list[torch.Tensor]:
    workers = changes.pop("workers", 0)
    batches = TrainBatches(num_images=len(images), seed=0, batch_size=3, total_steps=6, **changes)
    loader = train_loader(images, CROP, batches, workers=workers, device=torch.device("cpu"))
    return [torch.cat([index.float(), *(view.flatten() for view in views)]) for views, index, *_ in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_from_an_archive_are_those_from_its_folder(tmp_path, workers):
    root = write_tree(tmp_path / "x", *NAMES)
    images = find_images(str(pack_tar(tmp_path / "x.tar", root)))
    expected = load(find_images(str(root)))
    found = load(images, workers=workers)
    assert len(found) == 6 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    rest = load(images, workers=workers, start_step=3)
    assert len(rest) == 3 and all(torch.equal(a, b) for a, b in zip(rest, expected[3:], strict=True))


# -- the index of large sources


@pytest.fixture
def big(tmp_path, monkeypatch) -> Path:
    """Every source counts as large, and 10 ms as a long time ago.

    Returns the folder of the cache.
    """
    monkeypatch.setattr(cache, "SMALL", 0)
    monkeypatch.setattr(scanning, "RECENT_NS", 10**7)
    monkeypatch.setenv("DINO_SIMPOOL_CACHE", str(tmp_path / ".cache"))
    return tmp_path / ".cache"


def settle() -> None:
    """Wait until the last change is some time ago. (A ctime cannot be set.)"""
    time.sleep(0.03)


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """The sources that are listed in full after this call."""
    found: list[str] = []
    original = cache.scan

    def scan(root: str, exclude: Exclude, **options) -> Index:
        found.extend([root] * (options.get("limit") is None))
        return original(root, exclude, **options)

    monkeypatch.setattr(cache, "scan", scan)
    return found


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder with class folders and a shard, changed some time ago."""
    root = write_tree(tmp_path / "mixed", *NAMES)
    write_tree(tmp_path / "part", "b/shard.jpg", "new/1.jpg")
    pack_tar(root / "x.tar", tmp_path / "part")
    settle()
    return root


def test_the_second_start_reads_the_cache(mixed, big, scans, capsys):
    first = class_folder(str(mixed))
    assert scans == [str(mixed)] and "9 images in 5 top-level folder(s), listed now" in capsys.readouterr().err
    again = class_folder(str(mixed))
    assert len(scans) == 1 and "9 images in 5 top-level folder(s), from the cache" in capsys.readouterr().err
    assert_same(again, first)
    assert again.index.file == first.index.file == str(cache.cache_file(str(mixed)))
    assert not again.index.names.data.flags.writeable
    assert len(find_images(str(mixed), subset_per_class=1)) == 5 and len(scans) == 1  # another option, the same index
    with pytest.raises(ValueError, match=r"class B in .* has 1 images"):
        find_images(str(mixed), subset_per_class=2)
    alias = mixed.with_name("alias")
    alias.symlink_to(mixed)
    assert names(find_images(str(alias))) == names(first) and len(scans) == 1  # the same folder by another path
    assert sorted(path.suffix for path in big.iterdir()) == [".lock", ".safetensors"]


def test_the_cached_index_equals_the_listed_one(mixed, big, monkeypatch):
    cached = [
        find_images(str(mixed)),
        find_images([str(mixed), str(mixed / "x.tar")]),
        class_folder(str(mixed), subset_per_class=1),
    ]
    monkeypatch.setattr(cache, "SMALL", 5000)
    shutil.rmtree(big)
    listed = [
        find_images(str(mixed)),
        find_images([str(mixed), str(mixed / "x.tar")]),
        class_folder(str(mixed), subset_per_class=1),
    ]
    assert not big.exists()  # small sources are not cached
    for ours, theirs in zip(cached, listed, strict=True):
        assert_same(ours, theirs)


def changes() -> dict[str, Callable[[Path], object]]:
    return {
        "added": lambda root: write_tree(root, "b/new.jpg"),
        "removed": lambda root: (root / "a/deep/er/q.jpg").unlink(),
        "renamed": lambda root: (root / "b/2.jpg").rename(root / "b/3.jpg"),
        "moved": lambda root: (root / "b/2.jpg").rename(root / "a/2.jpg"),
        "added folder": lambda root: write_tree(root, "new/more/x.jpg"),
        "removed folder": lambda root: shutil.rmtree(root / "a-b"),
        "added shard": lambda root: tar_of(root / "y.tar", ("b/7.jpg", image(7))),
        "replaced shard": lambda root: tar_of(root / "x.tar", ("b/7.jpg", image(7))),
        "unpacked into": unpack_into,
    }


def unpack_into(root: Path) -> None:
    """Add a file and restore the time of its folder, as tar, rsync and cp --archive do."""
    before = os.stat(root / "b")
    write_tree(root, "b/new.jpg")
    os.utime(root / "b", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", changes())
def test_changes_of_a_source_are_noticed(mixed, big, scans, change, capsys):
    before = find_images(str(mixed))
    changes()[change](mixed)
    settle()
    after = find_images(str(mixed))
    assert (
        len(scans) == 2 and names(after) != names(before) and "has changed, listing all files again" in capsys.readouterr().err
    )
    assert contents(after)
    find_images(str(mixed))
    assert len(scans) == 2


def test_an_edited_image_does_not_change_the_index(mixed, big, scans):
    images = find_images(str(mixed))
    (mixed / "b/2.jpg").write_bytes(image(99))
    again = find_images(str(mixed))
    assert len(scans) == 1 and again.read_bytes(names(images).index("b/2.jpg")) == image(99)


def test_changes_of_lists_and_archives_are_noticed(tmp_path, big, scans):
    write_tree(tmp_path / "x", "1.jpg", "2.jpg")
    listing, archive = tmp_path / "x/list.txt", pack_tar(tmp_path / "x.tar", tmp_path / "x")
    listing.write_text("1.jpg\n")
    settle()
    for _ in range(2):
        assert (len(find_images(str(listing))), len(find_images(str(archive)))) == (1, 2)
    assert len(scans) == 2
    listing.write_text("1.jpg\n2.jpg\n1.jpg\n")
    tar_of(archive, ("7.jpg", image(7)))
    settle()
    assert (len(find_images(str(listing))), names(find_images(str(archive)))) == (3, ["7.jpg"]) and len(scans) == 4


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "format", "name", "number", "left out"])
def test_a_broken_cache_is_not_used(mixed, big, scans, damage, capsys):
    expected = names(find_images(str(mixed)))
    file = cache.cache_file(str(mixed))
    data = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": data[:-9], "text": b"text" * 9,
                      "format": data.replace(b'"format":"3"', b'"format":"0"'), "name": data.replace(b"10.jpg", b"11.jpg"),
                      "number": data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
                      "left out": data.replace(b'"left_out":"{', b'"left_out":"{ ')}[damage])  # fmt: skip
    assert (
        names(find_images(str(mixed))) == expected
        and len(scans) == 2
        and "is not an index of this version" in capsys.readouterr().err
    )
    assert names(find_images(str(mixed))) == expected and len(scans) == 2


def test_a_cache_that_cannot_be_written_is_reported(mixed, big, scans, monkeypatch, capsys):
    big.write_text("a file where the folder should be")
    for start in (1, 2):
        assert len(find_images(str(mixed))) == 9 and len(scans) == start
        assert f"cannot be cached in {big} (" in capsys.readouterr().err
    monkeypatch.setenv("DINO_SIMPOOL_CACHE", str(big.with_name("full")))

    def full(index: Index, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Index, "save", full)
    assert len(find_images(str(mixed))) == 9 and len(scans) == 3
    assert "the disk is full" in capsys.readouterr().err and not list(big.with_name("full").glob("*.tmp"))


def test_a_source_that_is_being_written_is_not_cached(mixed, big, scans, monkeypatch, capsys):
    pauses: list[float] = []
    monkeypatch.setattr(scanning, "RECENT_NS", cache.RECENT_NS)
    monkeypatch.setattr(time, "sleep", pauses.append)
    write_tree(mixed, "b/now.jpg")
    assert len(find_images(str(mixed))) == 10 and len(scans) == 2 and pauses == [2.0]
    assert "not cached" in capsys.readouterr().err and not list(big.glob("*.safetensors"))
    # Later nothing changes.
    monkeypatch.setattr(time, "sleep", lambda seconds: monkeypatch.setattr(scanning, "RECENT_NS", 0))
    assert len(find_images(str(mixed))) == 10 and len(scans) == 4 and cache.cache_file(str(mixed)).exists()


def build(root: str, folder: str) -> None:
    """In its own process: index a source and note who lists it.

    The lister waits until another one waits.
    """
    original = cache.scan

    def scan(root: str, exclude: Exclude, **options) -> Index:
        if options.get("limit") is None:
            Path(folder, f"listed-{os.getpid()}").touch()
            for _ in range(3000):
                if list(Path(folder).glob("waits-*")):
                    break
                time.sleep(0.01)
        return original(root, exclude, **options)

    def say(text: str) -> None:
        if "waiting for it" in text:
            Path(folder, f"waits-{os.getpid()}").touch()

    cache.scan, cache.say = scan, say
    Path(folder, f"found-{os.getpid()}").write_text("\n".join(names(find_images(root))))


def test_one_of_two_processes_lists_and_the_other_waits(mixed, big, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build, args=(str(mixed), str(notes)), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert {kind: len(list(notes.glob(f"{kind}-*"))) for kind in ("listed", "waits", "found")} == {
        "listed": 1, "waits": 1, "found": 2,
    }  # fmt: skip
    first, second = (path.read_text() for path in notes.glob("found-*"))
    assert first == second == "\n".join(names(find_images(str(mixed))))


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("DINO_SIMPOOL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_file("x").parent == tmp_path / ".cache/dino_simpool"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_file("x").parent == tmp_path / "xdg/dino_simpool"
    monkeypatch.setenv("DINO_SIMPOOL_CACHE", str(tmp_path / "own"))
    assert cache.cache_file("x").parent == tmp_path / "own"
    assert cache.cache_file("x") == cache.cache_file("./x/") != cache.cache_file("y")


# -- strings in one buffer

ODD = ["", "a", "line\nbreak", "", "ü", "\udcff", "/abs", "z" * 300, ""]


@pytest.mark.parametrize("strings", [[], ["a"], ["a", "b/c"], [""], ODD])
def test_packed_strings_are_the_strings(strings, tmp_path):
    packed = Strings.of(strings)
    assert list(packed) == strings and len(packed) == len(strings)
    assert [packed[i - len(strings)] for i in range(len(strings))] == strings
    for outside in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            packed[outside]
    for folder in ("", "d", "/d/e", "ü"):
        assert list(packed.below(folder)) == [os.path.join(folder, text) if text else folder for text in strings]
    for start in range(len(strings) + 1):
        rows = [slice(start, len(strings)), slice(0, start)]
        assert list(Strings.chain([(packed, each) for each in rows])) == strings[start:] + strings[:start]
    index = Index.of(strings)
    index.save(str(tmp_path / "x"))
    expected = hashlib.sha256("\n".join(strings).encode("utf-8", "surrogateescape")).hexdigest()
    assert list(open_index(str(tmp_path / "x"))) == list(index) == strings
    assert index.digest() == open_index(str(tmp_path / "x")).digest() == expected


def test_a_list_and_a_link_to_it_have_a_cache_each(tmp_path):
    """The paths in a list are relative to the place where it was given."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "list.txt").write_text("1.jpg\n")
    (tmp_path / "list.txt").symlink_to("a/list.txt")
    assert cache.cache_file(str(tmp_path / "list.txt")) != cache.cache_file(str(tmp_path / "a" / "list.txt"))


def test_a_common_folder_with_images_of_its_own_is_kept(tmp_path):
    archive = tar_of(tmp_path / "x.tar", ("train/1.jpg", image(0)), ("train/c/2.jpg", image(1)))
    assert names(find_images(str(archive))) == ["train/1.jpg", "train/c/2.jpg"]


def test_a_small_image_may_have_a_megabyte_beside_its_pixels(tmp_path):
    """Headers and color profiles."""
    content = image(0) + bytes(1_000_000)
    images = find_images(str(tar_of(tmp_path / "x.tar", ("1.jpg", content))))
    assert images.with_decoding(DecodingSettings(max_pixels=480, exif_orientation=False)).read_bytes(0) == content


def test_a_box_beside_the_image_is_refused(tmp_path):
    write_tree(tmp_path, "1.jpg")  # 24 x 20 pixels
    for box in ((24, 0, 30, 5), (0, 20, 5, 30)):
        with pytest.raises(ValueError, match=r"its box .* does not fit into 24 x 20 pixels"):
            ImageSet(str(tmp_path), ["1.jpg"], boxes=np.array([box], float)).read(0)
    assert ImageSet(str(tmp_path), ["1.jpg"], boxes=np.array([[23, 19, 30, 30]], float)).read(0).size == (7, 11)
