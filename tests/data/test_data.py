"""Sources, decoding and loaders, on files that are created here."""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import shutil
import signal
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from dino_simpool import data, distributed
from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, CropsConfig, DecodingSettings
from dino_simpool.data import EvalTransform, TrainBatches, class_folder, evenly, find_images, index_loader, train_loader
from dino_simpool.data.augment import MultiCrop
from dino_simpool.data.decode import read_rgb

CPU = torch.device("cpu")
EVALUATE = EvalTransform(16, resize=None, mean=IMAGENET_MEAN, std=IMAGENET_STD)
CROP = MultiCrop(
    **dataclasses.asdict(CropsConfig(global_size=16, local_size=8, num_local=2)), mean=IMAGENET_MEAN, std=IMAGENET_STD
)


def write_image(path: Path, *, seed: int = 0, size: tuple[int, int] = (20, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG" if path.suffix.lower() == ".png" else "JPEG")


def write_tree(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        write_image(root / name, seed=seed)
    return root


def paths(images: data.ImageSet, root: Path) -> list[str]:
    return [os.path.relpath(images.path(i), root) for i in range(len(images))]


# -- sources


def test_flat_folder(tmp_path):
    root = write_tree(tmp_path, "b.jpg", "a.png", "c.JPEG", "D.Jpg")
    (root / "notes.txt").write_text("no image")
    images = find_images([str(root)])
    assert paths(images, root) == ["D.Jpg", "a.png", "b.jpg", "c.JPEG"]
    assert images.labels is None and images.classes == ()


def test_nested_folder_without_classes(tmp_path):
    root = write_tree(tmp_path, "2024/may/x.jpg", "2024/y.jpg", "z.jpg", "2023/a b/ü #1.jpg")
    assert paths(find_images([str(root)]), root) == ["z.jpg", "2023/a b/ü #1.jpg", "2024/y.jpg", "2024/may/x.jpg"]


def test_hidden_files_and_folders_are_skipped(tmp_path):
    root = write_tree(tmp_path, "a.jpg", ".b.jpg", ".cache/c.jpg", "d/._e.jpg")
    assert paths(find_images([str(root)]), root) == ["a.jpg"]


def test_all_endings(tmp_path):
    for suffix in data.IMAGE_SUFFIXES:
        Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / f"x{suffix}", "PNG")
    images = find_images([str(tmp_path)])
    assert len(images) == len(data.IMAGE_SUFFIXES)
    assert all(read_rgb(images.path(i)).size == (4, 4) for i in range(len(images)))


def test_the_endings_are_those_of_pillow() -> None:
    """All that it opens, but what is no image of pixels or would start a program; and those of its plug-ins."""
    Image.init()
    none = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF", "PDF", "PALM"}
    known = {ending for ending, kind in Image.registered_extensions().items() if kind not in none}
    plug_ins = {".heic", ".heif", ".heics", ".heifs", ".hif", ".jxl"}
    assert set(data.IMAGE_SUFFIXES) == known | plug_ins | {".mpo"}


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = write_tree(tmp_path / "root", "a/x.jpg")
    write_image(tmp_path / "elsewhere/y.jpg")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a/up").symlink_to(root)
    (tmp_path / "elsewhere/back").symlink_to(root / "a")
    assert paths(find_images([str(root)]), root)[0] == "a/x.jpg"
    assert "b/y.jpg" in paths(find_images([str(root)]), root)


def test_text_file_of_paths(tmp_path):
    write_tree(tmp_path, "lists/near.jpg", "images/far.jpg", "absolute.jpg")
    listing = tmp_path / "lists/train.txt"
    lines = [
        "\ufeff# wanted",
        "",
        "../images/far.jpg",
        "  near.jpg  ",
        "# near.jpg",
        str(tmp_path / "absolute.jpg"),
        "near.jpg",
        "",
    ]
    listing.write_bytes("\r\n".join(lines).encode())
    found = paths(find_images([str(listing)]), tmp_path)
    assert found == ["images/far.jpg", "lists/near.jpg", "absolute.jpg", "lists/near.jpg"]


def test_text_file_in_the_current_folder(tmp_path, monkeypatch):
    write_tree(tmp_path, "a.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\n")
    monkeypatch.chdir(tmp_path)
    images = find_images("list.txt")
    assert read_rgb(images.path(0)).size == (24, 20)


def test_several_sources_in_the_given_order(tmp_path):
    write_tree(tmp_path, "one/z.jpg", "two/a.jpg", "three/m.jpg")
    (tmp_path / "list.txt").write_text("three/m.jpg\n")
    images = find_images([str(tmp_path / name) for name in ("two", "list.txt", "one")])
    assert paths(images, tmp_path) == ["two/a.jpg", "three/m.jpg", "one/z.jpg"]


def test_class_folder_equals_imagefolder(tmp_path):
    names = ["b/2.jpg", "b/10.jpg", "a/z.jpg", "a/deep/er/q.jpg", "a/deep/p.jpg", "a-b/x.jpg", "B/y.png"]
    root = write_tree(tmp_path, *names)
    (root / ".hidden").mkdir()
    ours = class_folder(str(root))
    (root / ".hidden").rmdir()  # ImageFolder would treat it as a class
    theirs = datasets.ImageFolder(str(root))
    assert ours.classes == tuple(theirs.classes) and ours.labels.dtype == np.int64
    assert [(ours.path(i), ours.labels[i]) for i in range(len(ours))] == theirs.samples
    assert paths(find_images([str(root)]), root) == paths(ours, root)


def test_subset_takes_the_first_sorted_files_of_each_class(tmp_path):
    root = write_tree(tmp_path, "b/3.jpg", "b/1.jpg", "b/2.jpg", "a/10.jpg", "a/9.jpg")
    expected = ["a/10.jpg", "a/9.jpg", "b/1.jpg", "b/2.jpg"]
    labelled = class_folder(str(root), subset_per_class=2)
    assert paths(labelled, root) == expected and labelled.labels.tolist() == [0, 0, 1, 1]
    assert paths(find_images([str(root)], subset_per_class=2), root) == expected
    for source in (class_folder, lambda path, **options: find_images([path], **options)):
        with pytest.raises(ValueError, match=r"class a in .* has 2 images: subset_per_class 3"):
            source(str(root), subset_per_class=3)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(1, 10, [0]), (5, 5, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (7, 1, [0])],
)
def test_evenly(total, count, expected):
    assert evenly(total, count).tolist() == expected


def labels_and_classes(images: data.ImageSet) -> tuple[list[int], tuple[str, ...]]:
    found = images.labels_of(range(len(images)))
    assert found.dtype == np.int64
    return found.tolist(), images.classes


NESTED = ("b/2.jpg", "b/10.jpg", "a/z.jpg", "a/deep/er/q.jpg", "a/deep/p.jpg", "a-b/x.jpg", "B/y.png")


@pytest.mark.parametrize("source", ["folder", "tar", "shards"])
def test_labels_of_one_source_are_those_of_imagefolder(tmp_path, source):
    root = write_tree(tmp_path / "train", *NESTED)
    theirs = datasets.ImageFolder(str(root))
    (root / "empty").mkdir()  # a folder without images is not a class
    if source == "shards":
        with tarfile.open(root / "1.tar", "w") as archive:
            archive.add(root / "b", arcname="b")
        shutil.rmtree(root / "b")
    path = shutil.make_archive(str(root), "tar", root) if source == "tar" else str(root)
    images = find_images(path)
    assert labels_and_classes(images) == (theirs.targets, tuple(theirs.classes)) and images.labels is None
    assert images.labels_of(np.array([6, 0, 6])).tolist() == [theirs.targets[i] for i in (6, 0, 6)]
    assert images.labels_of([]).shape == (0,)
    again = pickle.loads(pickle.dumps(images)).with_decoding(DecodingSettings(max_pixels=9, exif_orientation=True))
    assert labels_and_classes(again) == labels_and_classes(images)


def test_labels_of_a_subset(tmp_path):
    root = write_tree(tmp_path, "b/3.jpg", "b/1.jpg", "b/2.jpg", "a/10.jpg", "a/deep/9.jpg", "c/1.jpg", "c/2.jpg")
    assert labels_and_classes(find_images(str(root), subset_per_class=2)) == ([0, 0, 1, 1, 2, 2], ("a", "b", "c"))


def test_labels_of_class_folders_and_lists_of_the_layouts(tmp_path):
    images = class_folder(str(write_tree(tmp_path, "b/1.jpg", "a/1.jpg", "b/2.jpg")))
    assert labels_and_classes(images) == ([0, 1, 1], ("a", "b")) and images.labels_of([2, 0]).tolist() == [1, 0]
    images = data.ImageSet("", ["x", "y", "z"], np.array([1, 0, 1]), ("p", "q"))
    assert images.labels_of(np.array([2, 1])).tolist() == [1, 0]


def test_sets_without_classes_have_no_labels(tmp_path):
    write_tree(tmp_path, "one/a/x.jpg", "two/b/x.jpg", "loose/a/x.jpg", "loose/y.jpg")
    (tmp_path / "list.txt").write_text("one/a/x.jpg\n")
    one, two, loose, listing = (str(tmp_path / name) for name in ("one", "two", "loose", "list.txt"))
    for sources in ([one, two], [loose], [listing], [one, listing]):
        images = find_images(sources)
        assert images.classes == () and images.labels_of([0]) is None
    assert find_images(one).classes == ("a",)


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and ":" in text  # one line: what is wrong, then what to do
    return text


def test_bad_sources_are_named_in_one_line(tmp_path):
    root = write_tree(tmp_path, "classes/a/x.jpg", "loose/x.jpg", "loose/a/y.jpg", "one.jpg")
    (root / "empty/.hidden").mkdir(parents=True)
    (root / "half/a").mkdir(parents=True)
    write_image(root / "half/b/x.jpg")
    for name, text in (("gone.txt", "# comment\none.jpg\nno such.jpg\nnor this.jpg"), ("blank.txt", "\n# nothing\n")):
        (root / name).write_text(text)
    (root / "binary.txt").write_bytes(bytes(range(256)))
    cases = [
        (FileNotFoundError, find_images, "missing", "missing does not exist"),
        (ValueError, find_images, "empty", "no images in .*empty.*jpg jpeg|no images in .*empty.*\\.jpg"),
        (FileNotFoundError, find_images, "gone.txt", "^'no such.jpg', line 3 of .*gone.txt, does not exist"),
        (ValueError, find_images, "blank.txt", "lists no images"),
        (ValueError, find_images, "binary.txt", "is not UTF-8 text"),
        (FileNotFoundError, class_folder, "missing", "missing does not exist"),
        (FileNotFoundError, class_folder, "one.jpg", "one.jpg is not a folder"),
        (ValueError, class_folder, "empty", "no class folders in .*empty"),
        (ValueError, class_folder, "classes/a", "no class folders|are not in a class folder"),
        (ValueError, class_folder, "loose", "x.jpg and 0 other images in .*loose are not in a class folder"),
        (ValueError, class_folder, "half", "class folder a has no images"),
    ]
    for kind, function, name, pattern in cases:
        with pytest.raises(kind, match=pattern) as error:
            function(str(root / name))
        message(error)
    for given in ("", [], ["", str(root)]):
        with pytest.raises(ValueError, match=r"data\.root"):
            find_images(given)
    for name, pattern in (("gone.txt", "text file, without classes"), ("loose", "are not in a class folder")):
        with pytest.raises(ValueError, match=pattern):
            find_images([str(root / name)], subset_per_class=1)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_folder_without_permission(tmp_path):
    root = write_tree(tmp_path, "a/x.jpg")
    (root / "a").chmod(0)
    try:
        with pytest.raises(PermissionError, match="a cannot be read") as error:
            find_images([str(root)])
        message(error)
    finally:
        (root / "a").chmod(0o700)


# -- any file becomes 8-bit RGB


def png(path: Path, samples: np.ndarray) -> None:
    """A PNG file of (H, W, C) samples of 8 or 16 bits, C = 1 to 4 (Pillow cannot write 16-bit
    color)."""
    height, width, channels = samples.shape
    bits = 8 * samples.itemsize
    rows = samples.astype(f">u{samples.itemsize}").reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")
    parts = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def tiff(
    path: Path, samples: np.ndarray, *, order: str = "<", white: int = 255, separate: bool = False, sample_format: int = 1
) -> None:
    """An uncompressed TIFF file of samples (H, W, bands), written as the TIFF 6.0 specification says.

    white: 0 for photometric interpretation WhiteIsZero.   separate: a strip for each band.
    """
    height, width, bands = samples.shape
    planes = np.moveaxis(samples, -1, 0) if separate else samples[None]
    strips = [plane.astype(samples.dtype.newbyteorder(order)).tobytes() for plane in planes]
    offsets = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    photometric = 2 if bands >= 3 else int(white != 0)
    extra = [0] * (bands - (3 if bands >= 3 else 1))
    fields = {256: [width], 257: [height], 258: [8 * samples.itemsize] * bands, 259: [1], 262: [photometric], 273: offsets,
              277: [bands], 278: [height], 279: [len(strip) for strip in strips], 284: [2 if separate else 1],
              338: extra, 339: [sample_format] * bands}  # fmt: skip
    directory, values = struct.pack(f"{order}H", sum(map(bool, fields.values()))), b"".join(strips)
    for tag, numbers in fields.items():
        if not numbers:
            continue
        kind, letter = (4, "I") if tag in (273, 279) else (3, "H")
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(packed) > 4:
            values, packed = values + packed, struct.pack(f"{order}I", 8 + len(values))
        directory += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(values))
    path.write_bytes(start + values + directory + struct.pack(f"{order}I", 0))


def pixels(path: Path) -> np.ndarray:
    image = read_rgb(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def test_gray_and_bilevel(tmp_path):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray).save(tmp_path / "l.png")
    np.testing.assert_array_equal(pixels(tmp_path / "l.png"), gray[..., None].repeat(3, -1))
    Image.fromarray(gray > 99).save(tmp_path / "1.png")
    np.testing.assert_array_equal(pixels(tmp_path / "1.png")[..., 0], np.where(gray > 99, 255, 0))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_scaled_and_not_clipped(tmp_path, channels):
    samples = np.random.default_rng(0).integers(0, 65536, (9, 7, channels)).astype(np.uint16)
    if channels in (2, 4):
        samples[..., -1] = 65535  # opaque
    png(tmp_path / "x.png", samples)
    colors = samples[..., : 3 if channels > 2 else 1].astype(np.float64) / 257
    assert np.abs(pixels(tmp_path / "x.png") - colors).max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_tiff_is_scaled_and_not_clipped(tmp_path, channels, order):
    samples = np.random.default_rng(0).integers(0, 65536, (9, 7, channels)).astype(np.uint16)
    tiff(tmp_path / "x.tif", samples, order=order)
    assert np.abs(pixels(tmp_path / "x.tif") - samples.astype(np.float64) / 257).max() <= 1


def test_8_bit_values_widened_to_16_bits_come_back(tmp_path):
    narrow = np.arange(256).reshape(16, 16, 1)
    png(tmp_path / "gray.png", (narrow * 257).astype(np.uint16))
    png(tmp_path / "rgb.png", (narrow * 257).repeat(3, -1).astype(np.uint16))
    for name in ("gray.png", "rgb.png"):
        np.testing.assert_array_equal(pixels(tmp_path / name), narrow.repeat(3, -1))


def test_transparent_pixels_are_composed_on_white(tmp_path):
    samples = np.zeros((2, 3, 4), np.uint8)
    samples[..., 0], samples[0, :, 3] = 200, (0, 255, 102)  # red; the second row and one pixel are fully transparent
    png(tmp_path / "rgba.png", samples)
    white = [255, 255, 255]
    expected = np.array([[white, [200, 0, 0], [233, 153, 153]], [white] * 3])
    assert np.abs(pixels(tmp_path / "rgba.png").astype(int) - expected).max() <= 1
    png(tmp_path / "la.png", np.ascontiguousarray(samples[..., [0, 3]]))
    assert np.abs(pixels(tmp_path / "la.png")[0].astype(int) - [[255] * 3, [200] * 3, [233] * 3]).max() <= 1


def test_opaque_rgba_is_its_color(tmp_path):
    color = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    png(tmp_path / "x.png", np.concatenate([color, np.full((8, 8, 1), 255, np.uint8)], -1))
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), color)


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "plain.png")
    assert pixels(tmp_path / "plain.png").tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    image.save(tmp_path / "clear.png", transparency=1)
    image.save(tmp_path / "clear.gif", transparency=1)
    for name in ("clear.png", "clear.gif"):
        assert pixels(tmp_path / name).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_transparent_color_of_an_rgb_file(tmp_path):
    image = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    image.save(tmp_path / "x.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "x.png").tolist() == [[[255, 255, 255], [9, 9, 9]]]


def test_broken_files_are_named_in_one_line(tmp_path):
    write_image(tmp_path / "whole.jpg", size=(200, 200))
    write_image(tmp_path / "whole.png", size=(200, 200))
    cases = {"empty.jpg": b"", "text.png": b"not an image"}
    for name in ("whole.jpg", "whole.png"):
        content = (tmp_path / name).read_bytes()
        cases[f"cut {name}"], cases[f"bent {name}"] = content[: len(content) // 2], content[:20] + b"\xff" * 500 + content[520:]
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        if name != "bent whole.jpg":  # a bent JPEG may still decode
            with pytest.raises(ValueError, match=f"{name} cannot be read") as error:
                read_rgb(str(tmp_path / name))
            message(error)
    Image.fromarray(np.array([[0.5, 3e9]], np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.array([[0, 70_000]], np.int32)).save(tmp_path / "int.tif")
    for name in ("float.tif", "int.tif", "missing.jpg"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_rgb(str(tmp_path / name))


# -- evaluation


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (36, 36), (28, 100), (7, 5), (257, 256)])
@pytest.mark.parametrize("image_size, resize", [(32, None), (32, 32), (112, 128), (16, 19)])
def test_evaluation_transform_equals_torchvision(size, image_size, resize):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    short = image_size * 256 // 224 if resize is None else resize
    resized = transforms.Resize(short, transforms.InterpolationMode.BICUBIC)
    normalized = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    theirs = transforms.Compose([resized, transforms.CenterCrop(image_size), transforms.ToTensor(), normalized])
    ours = EvalTransform(image_size, resize=resize, mean=IMAGENET_MEAN, std=IMAGENET_STD)(image)
    torch.testing.assert_close(ours, theirs(image), rtol=0, atol=1e-5)


def test_the_published_resize_is_256_for_224():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 256, 3), dtype=np.uint8))
    ours = EvalTransform(224, resize=None, mean=IMAGENET_MEAN, std=IMAGENET_STD)(image)
    assert torch.equal(ours, EvalTransform(224, resize=256, mean=IMAGENET_MEAN, std=IMAGENET_STD)(image))


def test_resize_below_the_crop_is_refused():
    with pytest.raises(ValueError, match="resize is 31: a center crop of 32"):
        EvalTransform(32, resize=31, mean=IMAGENET_MEAN, std=IMAGENET_STD)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> data.ImageSet:
    root = tmp_path_factory.mktemp("images")
    return find_images([str(write_tree(root, *[f"{number:02d}.png" for number in range(37)]))])


def collect(loader) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    return [(views if isinstance(views, list) else [views], index) for views, index, *_ in loader]


def assert_equal_items(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for (views, index), (other_views, other_index) in zip(ours, theirs, strict=True):
        assert torch.equal(index, other_index)
        assert all(torch.equal(a, b) for a, b in zip(views, other_views, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_index_loader_keeps_order_and_the_last_partial_batch(images, workers):
    wanted = np.array([5, 36, 5, 0, 20])
    items = collect(index_loader(images, EVALUATE, wanted, batch_size=2, workers=workers, device=CPU))
    assert [index.tolist() for _, index in items] == [[5, 36], [5, 0], [20]]
    for (batch,), index in items:
        assert torch.equal(batch, torch.stack([EVALUATE(read_rgb(images.path(i))) for i in index.tolist()]))


def test_index_loader_of_nothing(images):
    assert collect(index_loader(images, EVALUATE, [], batch_size=2, workers=0, device=CPU)) == []


# -- training


def batches(**changes) -> list[list[tuple[int, int]]]:
    settings = {"num_images": 37, "seed": 3, "batch_size": 8, "accumulate": 1, "start_step": 0, "total_steps": 10, "rank": 0,
                "world_size": 1}  # fmt: skip
    return list(TrainBatches(**settings | changes))


def test_an_epoch_is_a_permutation_without_its_remainder():
    found = batches()
    assert [epoch for batch in found for epoch, _ in batch] == [0] * 32 + [1] * 32 + [2] * 16
    for epoch in (0, 1):
        members = [index for batch in found for e, index in batch if e == epoch]
        assert len(set(members)) == 32 and set(members) <= set(range(37))
        assert members == data.epoch_order(37, seed=3, epoch=epoch)[:32].tolist()
    assert found[0] != [(0, index) for _, index in found[4]]


def test_orders_of_seeds_and_epochs_differ():
    orders = [data.epoch_order(1000, seed=seed, epoch=epoch).tolist() for seed in (-1, 0, 1, 2**63) for epoch in range(4)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_step_has_the_same_images_however_it_is_split():
    whole = batches(batch_size=8)
    for batch_size, world_size, accumulate in ((4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 8, 1)):
        split = {"batch_size": batch_size, "world_size": world_size, "accumulate": accumulate}
        ranks = [batches(rank=rank, **split) for rank in range(world_size)]
        assert all(len(part) == 10 * accumulate for part in ranks)
        for step in range(10):
            micro = range(step * accumulate, (step + 1) * accumulate)
            assert [key for m in micro for part in ranks for key in part[m]] == whole[step]


@pytest.mark.parametrize("start", [0, 1, 4, 9, 10])
def test_batches_can_start_at_any_step(start):
    assert batches(start_step=start, accumulate=2, batch_size=4) == batches(accumulate=2, batch_size=4)[2 * start :]


def load(images: data.ImageSet, **changes):
    settings = {"seed": 0, "batch_size": 3, "accumulate": 2, "start_step": 0, "total_steps": 8, "rank": 0, "world_size": 1}
    workers = changes.pop("workers", 0)
    batches = TrainBatches(num_images=len(images), **settings | changes)
    return train_loader(images, CROP, batches, workers=workers, device=CPU)


def test_train_loader_yields_views_and_indices(images):
    loader = load(images)
    items = collect(loader)
    assert len(loader) == len(items) == 16
    for views, index in items:
        assert [tuple(view.shape) for view in views] == [(3, 16, 16, 3)] * 2 + [(3, 8, 8, 3)] * 2
        assert index.dtype == torch.int64 and all(view.dtype == torch.uint8 for view in views)
    (views, index), epoch = items[13], 1  # 6 steps of 6 images an epoch
    expected = CROP(images.encoded(int(index[2])), seed=0, epoch=epoch, index=int(index[2]))
    assert all(torch.equal(view[2], other) for view, other in zip(views, expected, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_bit(images, workers):
    assert_equal_items(collect(load(images, workers=workers)), collect(load(images)))


def test_a_resumed_loader_gives_the_same_bits(images):
    assert_equal_items(collect(load(images, start_step=5, workers=2)), collect(load(images))[10:])


def test_resuming_reads_no_earlier_image(images, tmp_path):
    for number in range(37):
        (tmp_path / f"{number:02d}.png").write_bytes(Path(images.path(number)).read_bytes())
    copy = find_images([str(tmp_path)])
    rest = collect(load(copy, start_step=4, total_steps=6))
    needed = {i for _, index in rest for i in index.tolist()}
    for number in set(range(37)) - needed:
        os.remove(copy.path(number))
    assert len(needed) == 12
    assert_equal_items(collect(load(copy, start_step=4, total_steps=6)), rest)


def test_views_do_not_depend_on_the_split_over_processes(images):
    whole = collect(load(images, batch_size=6, accumulate=1))
    halves = [collect(load(images, batch_size=3, accumulate=1, rank=rank, world_size=2)) for rank in range(2)]
    for step, (views, index) in enumerate(whole):
        assert torch.equal(index, torch.cat([half[step][1] for half in halves]))
        for number, view in enumerate(views):
            assert torch.equal(view, torch.cat([half[step][0][number] for half in halves]))


def test_loaders_leave_the_global_random_state_alone(images):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(load(images, total_steps=2, workers=1))
    collect(index_loader(images, EVALUATE, [0, 1], batch_size=2, workers=1, device=CPU))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_workers_get_can_be_pickled(images):
    loader = load(images)
    dataset, start = pickle.loads(pickle.dumps((loader.dataset, loader.worker_init_fn)))
    views, index, problem, _ = dataset[1, 7]
    assert (index, problem) == (7, "") and all(torch.equal(a, b) for a, b in zip(views, loader.dataset[1, 7][0], strict=True))
    assert callable(start)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(tmp_path, workers):
    write_tree(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "b.jpg").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"b\.jpg cannot be read"):
        collect(index_loader(find_images([str(tmp_path)]), EVALUATE, range(3), batch_size=3, workers=workers, device=CPU))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX signals")
def test_workers_outlive_signals_meant_for_the_training_process(images, tmp_path):
    gc.collect()  # a loader left by another test, if freed in the worker, starts a thread there that heeds signals
    batches = TrainBatches(num_images=len(images), seed=0, batch_size=2, total_steps=3)
    items = iter(train_loader(images, SignalAtOnce(), batches, workers=1, device=CPU))
    assert len(list(items)) == 3


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="sender of a signal unknown")
def test_workers_end_when_the_training_process_says_so(images):
    # After an error the traceback keeps the iterator alive. multiprocessing terminates the workers
    # and waits for them.
    items = iter(load(images, total_steps=6, workers=1))
    next(items)
    (worker,) = items._workers
    os.kill(worker.pid, signal.SIGUSR1)
    next(items)
    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0


class SignalAtOnce:
    """Sends its own process the signals that schedulers and terminals send to all processes."""

    def __call__(self, image: Image.Image, *, seed: int, epoch: int, index: int) -> list[torch.Tensor]:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(os.getpid(), number)
        return [torch.full((3, 4, 4), float(torch.get_num_threads()))]


def test_default_workers_divides_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert data.default_workers() == 16
    monkeypatch.setattr(distributed, "local_world_size", lambda: 4)
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    assert data.default_workers() == 4
    monkeypatch.setattr(distributed, "local_world_size", lambda: 32)
    assert data.default_workers() == 1


def test_default_workers_of_a_slurm_task(monkeypatch):
    monkeypatch.setattr(distributed, "local_world_size", lambda: 8)
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    for cores, expected in ((12, 12), (96, 12), (4, 4)):  # bound to its own cores; not bound; fewer allowed
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert data.default_workers() == expected
    monkeypatch.setenv("SLURM_NTASKS", "1")  # one task in which torchrun started eight processes
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    assert data.default_workers() == 12
