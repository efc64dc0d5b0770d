"""Pictures of attention, and the contact sheet: to the pixel."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dino_simpool.pictures import (
    GAP,
    OUTLINE,
    VIRIDIS,
    Tile,
    contact_sheet,
    enlarge,
    heat,
    mask_overlay,
    overlay,
    paint,
    shortened,
)

# -- attention


def test_heat_goes_from_lowest_to_highest() -> None:
    first, last = (torch.tensor(VIRIDIS[end]) / 255 for end in (0, -1))
    drawn = heat(torch.tensor([[0.1, 0.7], [0.1, 0.1]]), (4, 6))
    assert drawn.shape == (3, 4, 6)
    torch.testing.assert_close(drawn[:, 0, 0], first)
    torch.testing.assert_close(drawn[:, 1, 3], last)
    assert torch.equal(heat(torch.full((2, 2), 0.25), (2, 2)), first[:, None, None].expand(3, 2, 2))
    lightness = paint(torch.linspace(0, 1, 256)[None], VIRIDIS)[:, 0].T @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (lightness.diff() > 0).all(), "more attention is lighter, without colours too"


@pytest.mark.parametrize("smooth", [False, True])
def test_enlarged_cells(smooth: bool) -> None:
    cells = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    pixels = enlarge(cells, (7, 13), smooth=smooth)
    assert pixels.shape == (7, 13) and pixels.min() >= cells.min() and pixels.max() <= cells.max()
    nearest = cells[[int((y + 0.5) * 3 / 7) for y in range(7)]][:, [int((x + 0.5) * 5 / 13) for x in range(13)]]
    assert torch.equal(pixels, nearest) is not smooth
    assert torch.equal(enlarge(cells, (3, 5), smooth=smooth), cells)


def test_overlays_leave_their_input_alone() -> None:
    image, cells = torch.rand(3, 6, 6), torch.rand(3, 3)
    before = image.clone()
    overlay(image, cells), mask_overlay(image, cells > 0.5)
    assert torch.equal(image, before)


@pytest.mark.parametrize("shape", [(40, 60), (7, 900), (900, 7), (1, 1)])
def test_the_outline_is_where_the_mask_meets_what_is_outside(shape: tuple[int, int]) -> None:
    mask = torch.from_numpy(np.random.default_rng(0).random((3, 5)) > 0.4)
    drawn = mask_overlay(torch.zeros(3, *shape), mask)
    inside = np.pad(enlarge(mask.float(), shape, smooth=False).numpy() > 0, 4)
    width = 1 + max(shape) // 300
    line = torch.tensor(OUTLINE) / 255
    for row, column in np.random.default_rng(1).integers(0, shape, (300, 2)).tolist():
        around = inside[row + 4 - width : row + 5 + width, column + 4 - width : column + 5 + width]
        outlined = bool(inside[row + 4, column + 4]) and not around.all()
        assert torch.equal(drawn[:, row, column], line) == outlined


# -- the contact sheet


def solid(colour: tuple[int, int, int], size: tuple[int, int] = (10, 10)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_tiles_are_where_they_belong() -> None:
    """Two rows of three and two tiles of 50 pixels, the first of each row apart and framed."""
    red, green, blue, grey, frame = (200, 0, 0), (0, 150, 0), (0, 0, 250), (90, 90, 90), (1, 2, 3)
    rows = [
        [Tile(solid(red), ("query", "x"), frame), Tile(solid(green, (100, 50)), ("1.", "a")), Tile(solid(blue, (20, 80)))],
        [Tile(solid(grey), ("query", "y"), frame), Tile(solid(blue), ("1.", "b"))],
    ]
    sheet = contact_sheet(rows, size=50, lines=[1], font_size=13)
    lefts, tops = [GAP, 4 * GAP + 50, 5 * GAP + 100], [GAP, 2 * GAP + 50 + 4 + 34]
    assert sheet.mode == "RGB" and sheet.size == (lefts[2] + 50 + GAP, tops[1] + 50 + 4 + 34 + GAP)
    pixel = sheet.load()
    for row, colours in enumerate([(red, green, blue), (grey, blue, (255, 255, 255))]):
        for column, colour in enumerate(colours):
            assert pixel[lefts[column] + 25, tops[row] + 25] == colour
    for row, colour in enumerate((red, grey)):
        assert pixel[lefts[0], tops[row]] == pixel[lefts[0] + 49, tops[row] + 49] == colour
        assert pixel[lefts[0] - 1, tops[row] + 20] == pixel[lefts[0] + 50, tops[row] + 20] == frame
    # A wide picture is as wide as its tile and centred in its height; a high one the other way.
    at = [pixel[lefts[1] + 1, tops[0] + y] for y in (11, 13, 36, 38)]
    assert at == [(255, 255, 255), green, green, (255, 255, 255)]
    at = [pixel[lefts[2] + x, tops[0] + 1] for x in (17, 20, 29, 32)]
    assert at == [(255, 255, 255), blue, blue, (255, 255, 255)]
    # Captions: dark and grey ink below their tile, none where there is no caption.
    array = np.asarray(sheet).astype(int).max(2)
    for row in (0, 1):
        lines = [array[tops[row] + 54 + 17 * line :][:17, lefts[0] : lefts[0] + 50].min() for line in (0, 1)]
        assert lines[0] < 60 and 90 < lines[1] < 200
    assert array[tops[0] + 54 : tops[0] + 88, lefts[2] :].min() == 255
    separator = (lefts[0] + 50 + lefts[1]) // 2
    assert pixel[separator, tops[0] + 60] == (200, 200, 200)


def test_sheet_without_captions_is_tight_and_one_without_tiles_is_refused() -> None:
    assert contact_sheet([[Tile(solid((0, 0, 0)))]], size=30).size == (30 + 2 * GAP, 30 + 2 * GAP)
    for rows in ([], [[]]):
        with pytest.raises(ValueError, match="at least one picture"):
            contact_sheet(rows)


def test_long_captions_keep_their_end() -> None:
    font = ImageFont.load_default(13)
    text = "folder/" * 9 + "image_0123.jpg"
    short = shortened(text, 120, font)
    assert short.startswith("...") and text.endswith(short[3:]) and "0123.jpg" in short
    assert font.getlength(short) <= 120 < font.getlength("..." + text[-len(short) + 2 :])
    assert shortened("a.jpg", 120, font) == "a.jpg" and shortened(text, 1, font) == "..."
    assert shortened(os.fsdecode(b"caf\xe9"), 120, font) == "caf?"
