"""The range that the 16-bit samples of a set use."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import png, tiff, write_image

from dino_simpool.config import DEFAULT_DECODING, DecodingSettings
from dino_simpool.data import ImageSet, find_images
from dino_simpool.data.decode import BrokenImage
from dino_simpool.data.value_range import narrow_range, shorter_sides, used_range, with_range_of


def write_gray(path: Path, low: int, high: int) -> None:
    """A 16-bit gray image of samples from low to high, evenly."""
    samples = np.linspace(low, high, 800).round().astype(np.uint16).reshape(20, 40, 1)
    (tiff if path.suffix == ".tif" else png)(path, samples)


@pytest.fixture
def mixed(tmp_path: Path) -> ImageSet:
    """Of 12 bits: two gray images and a colored one; of 8 bits: two; and a broken one."""
    write_gray(tmp_path / "a.png", 200, 3000)
    write_gray(tmp_path / "b.tif", 100, 2000)
    png(tmp_path / "c.png", np.full((9, 9, 3), (700, 900, 4000), np.uint16))
    for name in ("d.jpg", "e.png"):
        write_image(tmp_path / name)
    (tmp_path / "f.png").write_bytes((tmp_path / "a.png").read_bytes()[:90])
    return find_images(str(tmp_path))


def test_the_range_of_a_set_is_that_of_its_16_bit_images(mixed: ImageSet) -> None:
    assert used_range(mixed, share=0) == (100, 4000)
    assert used_range(mixed, share=0, most=1) == (200, 3000)  # the first
    low, high = used_range(mixed, share=1)
    assert 100 < low < 130 and high == 4000
    settings = DecodingSettings(value_range="data", transparency="gray")
    assert with_range_of(mixed, settings) == DecodingSettings(value_range=(100, 4000), transparency="gray")
    shown = np.asarray(mixed.with_decoding(with_range_of(mixed, settings)).read(1))
    assert (shown.min(), shown.max()) == (0, round((2000 - 100) * 255 / 3900))


def test_other_ranges_are_kept_and_sets_without_16_bits_are_full(mixed: ImageSet, tmp_path: Path) -> None:
    for settings in (DEFAULT_DECODING, DecodingSettings(value_range="percentiles"), DecodingSettings(value_range=(3, 9))):
        assert with_range_of(mixed, settings) is settings
    eight = ImageSet(str(tmp_path), ["d.jpg", "e.png"])
    assert used_range(eight, share=0) is None
    assert with_range_of(eight, DecodingSettings(value_range="data")) == DEFAULT_DECODING


def test_advice_below_an_eighth_only() -> None:
    assert narrow_range(None, "x") == "" and narrow_range((0, 8191), "x") == "" and narrow_range((30_000, 38_191), "x") == ""
    said = narrow_range((112, 3882), "data.value_range")
    assert "lie between 112 and 3882 of 0 to 65535, so 16 of 256 gray levels are used" in said
    assert "give data.value_range data, percentiles, or two numbers such as [0, 4095]" in said
    assert "so 4 of 256 gray levels" in narrow_range((28, 971), "x") and narrow_range((0, 8190), "x")


def test_files_without_end_are_not_opened_for_their_headers(tmp_path: Path) -> None:
    """Neither a pipe, for whose writer a reader waits, nor a device, nor a file beyond the limit."""
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "b.png").symlink_to(tmp_path / "pipe")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    with open(tmp_path / "d.tif", "wb") as file:
        file.write(b"II*\0")
        file.truncate(2**40)
    images = find_images(str(tmp_path))
    assert len(images) == 4 and images.header_source(0) == str(tmp_path / "a.png")
    for number, said in enumerate(("a pipe, a device", "a pipe, a device", "it has 1,099,511,627,776 bytes"), 1):
        with pytest.raises(BrokenImage, match=said):
            images.header_source(number)
    assert shorter_sides(images, most=9) == [20]
    assert used_range(images, share=0) is None
