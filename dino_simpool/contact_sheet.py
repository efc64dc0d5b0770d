"""A contact sheet: rows of small pictures with captions on white, as one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, GREY, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
GAP = 12
"""Pixels between tiles and around all of them."""


@dataclass(frozen=True)
class Tile:
    """A picture with its caption."""

    image: Image.Image
    caption: tuple[str, ...] = ()
    """Lines below the picture, the first one dark and the others grey; too long ones lose their beginning."""
    frame: tuple[int, int, int] | None = None
    """Colour of a frame around the picture, None for none."""


def contact_sheet(rows: Sequence[Sequence[Tile]], *, size: int = 160, lead: int = 0, font_size: int = 13) -> Image.Image:
    """The rows below each other, on white: RGB.

    size: side in pixels of the square that each picture is fitted into, in its own shape and centred. lead: the first so many
    tiles of each row stand apart from the others.
    ValueError without a tile.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError("a contact sheet needs one picture at least")
    font = ImageFont.load_default(font_size)
    lines = [max((len(tile.caption) for tile in row), default=0) for row in rows]
    line_height = font_size + 4
    tops = [GAP]
    for count in lines:
        tops.append(tops[-1] + size + count * line_height + (4 if count else 0) + GAP)
    lefts = [GAP + column * (size + GAP) + (2 * GAP if 0 < lead <= column else 0) for column in range(columns)]
    sheet = Image.new("RGB", (lefts[-1] + size + GAP, tops[-1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, tops, strict=False):
        for tile, left in zip(row, lefts, strict=False):
            picture = _fitted(tile.image, size)
            x, y = left + (size - picture.width) // 2, top + (size - picture.height) // 2
            sheet.paste(picture, (x, y))
            if tile.frame:
                draw.rectangle((x - 3, y - 3, x + picture.width + 2, y + picture.height + 2), outline=tile.frame, width=3)
            for number, line in enumerate(tile.caption):
                place = (left, top + size + 4 + number * line_height)
                draw.text(place, shortened(line, size, font), fill=GREY if number else INK, font=font)
    if lead and columns > lead:
        x = lefts[lead] - 3 * GAP // 2
        draw.line((x, GAP, x, tops[-1] - GAP), fill=(200, 200, 200))
    return sheet


def shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, or dots and as much of its end as fits into `width` pixels: the end tells files apart."""
    text = text.encode("utf-8", "replace").decode()  # a file name need not be text
    if font.getlength(text) <= width:
        return text
    starts = (start for start in range(1, len(text)) if font.getlength(f"...{text[start:]}") <= width)
    return f"...{text[next(starts, len(text)) :]}"


def _fitted(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(shape, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
