"""What is read of an image file, and what is said of one that is not.

Run as conftest.py says, on version 0.1 these tests fail for the reasons that they name.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from harness import Features, Tool
from PIL import Image


def checked(tool: Tool, images: Path, folder: Path, *names: str, options: tuple[object, ...] = ()) -> str:
    """What check-data says of these files."""
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(images / name, folder / name)
    return tool("check-data", "--data", folder, "--workers", 0, *options).text


@pytest.mark.parametrize("name", ["png_bad_crc_text.png", "png_big_text.png"])
def test_metadata_do_not_make_an_image_unreadable(
    name: str, features: Features, tool: Tool, images: Path, tmp_path: Path
) -> None:
    """0.1 calls a file broken whose pixels are intact, if a text chunk is damaged or large."""
    said = checked(tool, images, tmp_path / "checked", name)
    assert "broken          0" in said and "metadata skipped 1" in said
    ours, reference = features(name, "ref.png")
    assert ours @ reference > 0.999


@pytest.mark.parametrize(
    "name, kind, package", [("iphone.jpg", "HEIC", "pillow-heif"), ("jxl_as.png", "JPEG XL", "pillow-jxl-plugin")]
)
def test_files_that_need_a_plug_in_are_read_or_named(
    name: str, kind: str, package: str, tool: Tool, images: Path, tmp_path: Path
) -> None:
    """0.1 says that they are not images of a known format, and reads them nowhere."""
    said = checked(tool, images, tmp_path, name)
    assert "broken          0" in said or (f"it is {kind}" in said and f"pip install {package}" in said)


@pytest.mark.parametrize(
    "name, kind, remedy", [("webpage.jpg", "a web page", "download"), ("lfs.jpg", "a Git LFS pointer", "git lfs pull")]
)
def test_files_that_are_no_images_are_named(
    name: str, kind: str, remedy: str, tool: Tool, images: Path, tmp_path: Path
) -> None:
    """0.1 says that they are not images of a known format, and not what to do."""
    said = checked(tool, images, tmp_path, name)
    assert f"it is {kind}" in said and remedy in said


# -- samples and bands


@pytest.mark.parametrize(
    "name, reference, properties",
    [
        ("planar16.tif", "ref.png", ("separate planes",)),
        ("miniswhite16.tif", "ref_grey.png", ("0 is white",)),
        ("grey_alpha16.tif", "ref_grey.png", ("2 x 16 bits",)),
        ("int32.tif", "ref_grey.png", ("32-bit", "signed")),
        ("int16.tif", "ref_grey.png", ("signed",)),
        ("float32rgb.tif", "ref.png", ("floating-point",)),
    ],
)
def test_files_that_pillow_misreads_are_right_or_refused_by_the_property(
    name: str, reference: str, properties: tuple[str, ...], features: Features, tool: Tool, images: Path, tmp_path: Path
) -> None:
    """0.1 scrambles separate planes, inverts 0 as white, turns 32-bit integers black, and gives wrong reasons for the rest."""
    said = checked(tool, images, tmp_path / "checked", name)
    if "broken          1" in said:
        assert any(words in said for words in properties)
    else:
        ours, expected = features(name, reference)
        assert ours @ expected > 0.999


def test_a_fourth_band_is_a_choice(features: Features, tool: Tool, images: Path, tmp_path: Path) -> None:
    """0.1 leaves out the near infrared band without a word."""
    said = checked(tool, images, tmp_path / "checked", "rgbn8_unspec.tif")
    assert "fourth band" in said and "extra_band" in said and "broken          1" in said
    ours, expected = features("rgbn8_unspec.tif", "ref.png", options=("--extra_band", "ignore"))
    assert ours @ expected > 0.999
    other, expected = features("rgbn8_unspec.tif", "ref.png", options=("--extra_band", "alpha"))
    assert other @ expected < 0.999


def test_more_bands_are_refused_by_their_count(tool: Tool, images: Path, tmp_path: Path) -> None:
    """0.1 says that the file is not an image of a known format."""
    said = checked(tool, images, tmp_path, "bands5.tif")
    assert "it has 5 bands" in said and "other than three channels" in said


def test_blank_images_are_counted_and_the_background_is_a_choice(
    features: Features, tool: Tool, images: Path, tmp_path: Path
) -> None:
    """0.1 makes both images white, hence one feature, and does not say so. check-data calls them transparent only."""
    names = ("white_logo.png", "alpha0.png", "ref.png")
    assert "blank           2" in checked(tool, images, tmp_path / "checked", *names)
    on_black = checked(tool, images, tmp_path / "checked", *names, options=("--transparency", "black"))
    assert "blank           1" in on_black  # the logo shows
    logo, clear = features(*names[:2], options=("--transparency", "black"))
    assert logo @ clear < 0.999


# -- the range of 16-bit samples


@pytest.mark.parametrize("name", ["grey12.png", "grey10.png"])
@pytest.mark.parametrize("choice", ["data", "percentiles", "numbers"])
def test_few_bits_in_files_of_16_get_their_contrast_by_a_choice(name: str, choice: str, features: Features) -> None:
    """0.1 leaves 14 or 4 gray levels, without a choice."""
    value = {"numbers": "[0, 4095]" if "12" in name else "[0, 1023]"}.get(choice, choice)
    ours, expected = features(name, "ref_grey.png", options=("--value_range", value))
    assert ours @ expected > (0.99 if choice == "percentiles" else 0.999)


@pytest.mark.parametrize("name", ["grey12.png", "grey10.png"])
def test_few_bits_in_files_of_16_are_said(name: str, tool: Tool, images: Path, tmp_path: Path) -> None:
    """0.1 says nothing, neither in check-data nor before hours of training."""
    said = checked(tool, images, tmp_path / "data", name)
    assert "warning: the 16-bit samples lie between" in said and "value_range" in said
    trained = train(tool, images, tmp_path, name)
    assert "warning: the 16-bit samples lie between" in trained and "data.value_range" in trained


def train(tool: Tool, images: Path, folder: Path, name: str, *options: object) -> str:
    """One step of a tiny ViT on four copies of a file, into folder/run; what was said."""
    (folder / "four").mkdir()
    for number in range(4):
        shutil.copy(images / name, folder / "four" / f"{number}.png")
    tiny = ("--model.patch_size", 8, "--model.image_size", 16, "--crops.global_size", 16, "--crops.local_size", 8,
            "--model.width", 64, "--model.depth", 1, "--head.out_dim", 8, "--crops.num_local", 0, "--run.batch_size", 4,
            "--run.epochs", "1it", "--run.device", "cpu", "--data.workers", 0)  # fmt: skip
    ended = tool("train", "--data.root", folder / "four", "--run.out", folder / "run", *tiny, *options)
    assert ended.status == 0, ended.text
    return ended.text


@pytest.mark.parametrize("file", ["last.pth", "backbone.safetensors"])
def test_evaluators_use_the_range_of_training(file: str, tool: Tool, images: Path, tmp_path: Path) -> None:
    """0.1 has no choice of the range, in training or after it."""
    said = train(tool, images, tmp_path, "grey10.png", "--data.value_range", "data", "--data.transparency", "black")
    assert "the 16-bit samples lie between" not in said
    with Image.open(images / "grey10.png") as image:
        low, high = map(int, image.getextrema())
    extract = ("extract", "--checkpoint", tmp_path / "run" / file, "--data", tmp_path / "four", "--workers", 0)
    for options, expected in (((), ([low, high], "black")), (("--value_range", "full"), ("full", "black"))):
        out = tmp_path / f"out_{len(options)}"
        assert tool(*extract, "--out", out, "--index", "true", *options).status == 0
        used = json.loads((out / "meta.json").read_text())["settings"]["images"]
        assert (used["value_range"], used["transparency"]) == expected
    full, own = (np.load(tmp_path / name / "features.npy") for name in ("out_2", "out_0"))
    assert not np.array_equal(full, own)
    query = ("--query", tmp_path / "four" / "1.png", "--out", tmp_path / "found", "--k", 1, "--workers", 0, "--device", "cpu")
    assert tool("search", "--index", tmp_path / "out_0", *query).status == 0  # decoded like the index
    found = json.loads((tmp_path / "found" / "results.json").read_text())["queries"][0]["neighbors"][0]
    assert found["similarity"] == 1.0


# -- other programs


def test_no_file_starts_another_program(process: Tool, images: Path, tmp_path: Path) -> None:
    """0.1 lets Pillow start Ghostscript to draw PostScript, whatever the ending of the file."""
    started, ghostscript = tmp_path / "started", tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch '{started}'\n")
    ghostscript.chmod(0o755)
    (tmp_path / "data").mkdir()
    shutil.copy(images / "postscript.png", tmp_path / "data")
    path = {"PATH": f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}"}
    said = process("check-data", "--data", tmp_path / "data", "--workers", 0, env=path).text
    assert not started.exists() and "it is PostScript" in said
