"""Unusual and broken image files, created here: how they are decoded, and what replaces broken
ones."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import CPU, CROP, EVALUATE, assert_equal_items, collect, message, png, tiff, write_image
from torch.utils.data import DataLoader

from dino_simpool.config import MAX_PIXELS, DecodingSettings
from dino_simpool.data import ImageSet, TrainBatches, decode, find_images, index_loader, read_or_replace, train_loader
from dino_simpool.data.decode import BrokenImage, EncodedImage, examine, read_rgb
from dino_simpool.data.loaders import MAX_ATTEMPTS, replacement

ORIENTATION = 0x0112
TRIALS = Path(__file__).resolve().parents[1] / "trials" / "images"


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Colors that a JPEG file keeps."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([40 + 4 * rows, 200 - 3 * columns, 60 + 2 * (rows + columns)], -1).astype(np.uint8)


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source: str | bytes, **options: object) -> np.ndarray:
    image = read_rgb(source, decoding=DecodingSettings(**options))
    assert image.mode == "RGB"
    return np.asarray(image)


# -- orientation

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""How to turn an image upright, from the EXIF standard: where the first row and column belong."""


@pytest.mark.parametrize("value", [0, *UPRIGHT, 9])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation_is_applied_on_request_only(kind: str, value: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    file = stored(Image.fromarray(noise(5, 7)), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    as_stored = pixels(file)
    assert as_stored.shape == (5, 7, 3)
    if kind != "JPEG":
        np.testing.assert_array_equal(as_stored, noise(5, 7))
    np.testing.assert_array_equal(pixels(file, exif_orientation=True), UPRIGHT.get(value, UPRIGHT[1])(as_stored))
    assert ("EXIF-rotated" in examine(file).kinds) == (2 <= value <= 8)


def test_an_orientation_anywhere_before_the_pixels_counts() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = stored(Image.fromarray(noise(5, 7)), "JPEG", exif=exif)
    thumbnail = b"\xff\xed" + struct.pack(">H", 60_002) + bytes(60_000)  # as Photoshop writes it, before the EXIF data
    description = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    xmp = b"\xff\xe1" + struct.pack(">H", len(description) + 2) + description
    plain = stored(Image.fromarray(noise(5, 7)), "JPEG")
    for file in (turned[:2] + 2 * thumbnail + turned[2:], plain[:2] + xmp + plain[2:]):
        image = EncodedImage(file, decoding=DecodingSettings(exif_orientation=True))
        np.testing.assert_array_equal(image.pixels(), np.asarray(image.rgb()))
        np.testing.assert_array_equal(image.pixels(), np.rot90(pixels(plain), -1))


def test_orientation_goes_with_gray_palette_and_transparency() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for mode in ("L", "P", "RGBA", "I;16", "1"):
        image = Image.fromarray(noise(5, 7)).convert("L" if mode == "I;16" else mode).convert(mode)
        file = stored(image, "PNG", exif=exif)
        np.testing.assert_array_equal(pixels(file, exif_orientation=True), np.rot90(pixels(file), -1))


def test_a_tiff_file_is_turned_by_pillow_and_not_twice() -> None:
    file = stored(Image.fromarray(noise(5, 7)), "TIFF", tiffinfo={ORIENTATION: 6})
    for option in (False, True):
        np.testing.assert_array_equal(pixels(file, exif_orientation=option), np.rot90(noise(5, 7), -1))


def test_broken_exif_data_leaves_the_image_readable() -> None:
    whole = stored(Image.fromarray(smooth(8, 8)), "JPEG")
    for text in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage and more of it"):
        file = whole[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(text)) + text + whole[2:]
        for option in (False, True):
            np.testing.assert_array_equal(pixels(file, exif_orientation=option), pixels(whole))


def test_an_image_set_reads_with_its_settings(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    Image.fromarray(noise(5, 7)).save(tmp_path / "x.png", exif=exif)
    images = find_images(str(tmp_path))
    turned = images.with_decoding(DecodingSettings(max_pixels=35, exif_orientation=True))
    assert images.read(0).size == (7, 5) and turned.read(0).size == (5, 7)
    boxed = dataclasses.replace(turned, boxes=np.array([[1.0, 2.0, 4.0, 7.0]]))
    np.testing.assert_array_equal(np.asarray(boxed.read(0)), np.rot90(noise(5, 7))[2:7, 1:4])  # in the rotated image
    with pytest.raises(BrokenImage, match=r"x\.png cannot be read .*more than max_pixels 34"):
        images.with_decoding(DecodingSettings(max_pixels=34, exif_orientation=False)).read(0)


# -- sizes


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 5000), (5000, 1), (3, 2000), (40_000, 2), (1, 65_000)])
def test_images_of_one_pixel_and_long_ones_are_processed(size: tuple[int, int]) -> None:
    """One color in, the same color out, in every crop and in evaluation; the largest array stays
    small."""
    file = EncodedImage(stored(Image.new("RGB", size, (255, 0, 102)), "PNG"))
    assert file.rgb().size == size
    parts = CROP(file, seed=0, epoch=0, index=0)
    views = [*(view[0] for view in CROP.finish([part[None] for part in parts])), EVALUATE(file.rgb())]
    assert [tuple(view.shape) for view in views] == [(3, 16, 16)] * 2 + [(3, 8, 8)] * 2 + [(3, 16, 16)]
    assert all(torch.equal(view, view[:, :1, :1].expand_as(view)) for view in views)
    expected = (np.array([1, 0, 0.4]) - EVALUATE.mean) / EVALUATE.std
    np.testing.assert_allclose(views[-1][:, 0, 0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(300, 1), (1, 301), (1000, 2), (3, 1001)])
def test_evaluation_of_a_long_image_equals_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    cut = EVALUATE(image)
    monkeypatch.setattr("dino_simpool.data.loaders.LONGEST", 10**6)
    whole = EVALUATE(image)
    assert not torch.equal(whole[:, :1, :1].expand_as(whole), whole)
    torch.testing.assert_close(cut, whole, rtol=0, atol=0 if min(size) == 1 else 0.03)  # 0.03: two gray levels


def claims(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header claims a large size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT5\xaf\x06\x1e"
    )


@pytest.mark.parametrize("size", [(60_000, 60_000), (13_378, 13_378), (MAX_PIXELS + 1, 1)])
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BrokenImage, match=r"bomb cannot be read as an image \(it has more than max_pixels 178,956,970; raise"):
        read_rgb(claims(*size), name="bomb")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_max_pixels_is_the_largest_that_is_read() -> None:
    file = stored(Image.fromarray(noise(5, 7)), "PNG")
    limit = Image.MAX_IMAGE_PIXELS
    assert read_rgb(file, decoding=DecodingSettings(max_pixels=35)).size == (7, 5)
    with pytest.raises(BrokenImage, match="more than max_pixels 34"):
        read_rgb(file, decoding=DecodingSettings(max_pixels=34))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_pillows_own_limit_gives_way_to_a_larger_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With both limits made small. Pillow refuses more than twice its own limit, for crops too."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(decode, "MAX_PIXELS", 200)
    file = stored(Image.fromarray(noise(30, 10)), "PNG")
    for limit in (100, 200):
        with pytest.raises(BrokenImage, match=f"more than max_pixels {limit}"):
            read_rgb(file, decoding=DecodingSettings(max_pixels=limit))
        assert Image.MAX_IMAGE_PIXELS == 100
    image = read_rgb(file, decoding=DecodingSettings(max_pixels=300))
    np.testing.assert_array_equal(np.asarray(image.crop((0, 0, 10, 29))), noise(30, 10)[:29])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # the user wants none
    assert read_rgb(file, decoding=DecodingSettings(max_pixels=300)).size == (10, 30) and Image.MAX_IMAGE_PIXELS is None


# -- kinds of files


def test_a_progressive_jpeg_has_the_same_pixels() -> None:
    image = Image.fromarray(smooth(33, 21))
    progressive = stored(image, "JPEG", progressive=True)
    assert Image.open(io.BytesIO(progressive)).info["progressive"]
    np.testing.assert_array_equal(pixels(progressive), pixels(stored(image, "JPEG")))


def test_cmyk_and_ycck_as_adobe_writes_them() -> None:
    """Both hold inverted samples.

    YCCK is made from CMYK by hand, because Pillow cannot write it.
    """
    inks = np.concatenate([smooth(16, 16), np.full((16, 16, 1), 30, np.uint8)], -1)
    expected = (255 - inks[..., :3].astype(float)) * (255 - 30) / 255
    cmyk = stored(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    assert np.abs(pixels(cmyk) - expected).max() <= 4
    # In a YCCK file Y, Cb and Cr are those of the inks as if they were R, G and B, and K is
    # inverted. The encoder inverts all four, and its Adobe marker must be 2 (YCCK) instead of 0 (CMYK).
    luma = 255 - np.asarray(Image.fromarray(smooth(16, 16)).convert("YCbCr"))
    file = stored(Image.fromarray(np.concatenate([luma, inks[..., 3:]], -1), "CMYK"), "JPEG", quality=100)
    marker = file.index(b"Adobe") + 11
    assert file[marker] == 0
    ycck = file[:marker] + b"\2" + file[marker + 1 :]
    assert np.abs(pixels(ycck) - expected).max() <= 4
    assert "CMYK" in examine(cmyk).kinds and "CMYK" in examine(ycck).kinds


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_frames(kind: str) -> None:
    first, second = (Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 0, 250)))
    file = stored(first, kind, save_all=True, append_images=[second])
    assert np.abs(pixels(file).astype(int) - [250, 0, 0]).max() <= 4
    assert "several frames" in examine(file).kinds
    assert "several frames" not in examine(stored(first, "JPEG" if kind == "MPO" else kind)).kinds


def test_the_file_extension_is_ignored(tmp_path: Path) -> None:
    for kind, name in (("PNG", "x.jpg"), ("BMP", "x.png"), ("GIF", "x.tif")):
        image = Image.new("RGB", (4, 3), (9, 99, 199))
        (tmp_path / name).write_bytes(stored(image, kind))
        np.testing.assert_array_equal(pixels(str(tmp_path / name)), np.asarray(image))


def test_bytes_are_read_like_the_file(tmp_path: Path) -> None:
    write_image(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    np.testing.assert_array_equal(pixels(content), pixels(str(tmp_path / "x.jpg")))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["png", "tif <", "tif >"])
def test_16_bit_samples_keep_their_high_byte(tmp_path: Path, kind: str, channels: int) -> None:
    """Exactly, and not rounded: 0x12FF is 0x12."""
    samples = np.array([[0x0000, 0x00FF, 0x0100, 0x12FF], [0xF00F, 0x80FF, 0xFF00, 0xFFFF]], np.uint16)
    samples = samples[..., None].repeat(channels, -1)
    if kind == "png":
        png(tmp_path / "x", samples)
    else:
        tiff(tmp_path / "x", samples, order=kind[-1])
    expected = np.array([[0x00, 0x00, 0x01, 0x12], [0xF0, 0x80, 0xFF, 0xFF]], np.uint8)
    np.testing.assert_array_equal(pixels(str(tmp_path / "x")), expected[..., None].repeat(3, -1))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_gray_tiff_files_with_0_as_white_are_no_negatives(tmp_path: Path, kind: type) -> None:
    samples = np.random.default_rng(0).integers(0, 256, (9, 7, 1)).astype(kind)
    samples = samples * 257 if kind is np.uint16 else samples
    tiff(tmp_path / "x.tif", np.iinfo(kind).max - samples, white=0)
    expected = (samples // (257 if kind is np.uint16 else 1)).repeat(3, -1)
    np.testing.assert_array_equal(pixels(str(tmp_path / "x.tif")), expected)


def test_tiff_files_with_separate_planes_of_8_bits(tmp_path: Path) -> None:
    tiff(tmp_path / "x.tif", noise(9, 7), separate=True)
    np.testing.assert_array_equal(pixels(str(tmp_path / "x.tif")), noise(9, 7))


@pytest.mark.parametrize(
    "kind, bands, options, reason",
    [
        ("u2", 3, {"separate": True}, "it has 16-bit samples in separate planes"),
        ("u2", 3, {"separate": True, "order": ">"}, "it has 16-bit samples in separate planes"),
        ("u4", 1, {}, "it has 32-bit samples"),
        ("i4", 1, {"sample_format": 2}, "it has signed samples"),
        ("i2", 1, {"sample_format": 2}, "it has signed samples"),
        ("f4", 1, {"sample_format": 3}, "it has floating-point samples"),
        ("u1", 5, {}, "it has 5 bands"),
        ("u1", 6, {}, "it has 6 bands"),
    ],
)
def test_tiff_files_that_pillow_would_misread_are_refused(
    tmp_path: Path, kind: str, bands: int, options: dict[str, Any], reason: str
) -> None:
    """Values of 0 to 255 are in the range of every kind: only the declared properties tell."""
    samples = np.random.default_rng(0).integers(0, 256, (9, 7, bands)).astype(kind)
    tiff(tmp_path / "x.tif", samples, **options)
    for read in (read_rgb, examine):
        with pytest.raises(BrokenImage, match=reason):
            read(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("bits, reason", [(16, "it has signed samples"), (32, "it has 32-bit samples")])
def test_integers_of_another_format_are_refused(tmp_path: Path, bits: int, reason: str) -> None:
    """A FITS file of 32-bit integers would turn black, and one of 16 bits lose its signs."""
    cards = ("SIMPLE  = T", f"BITPIX  = {bits}", "NAXIS   = 2", "NAXIS1  = 9", "NAXIS2  = 7", "END")
    header = "".join(card.ljust(80) for card in cards)
    (tmp_path / "x.fits").write_bytes(header.ljust(2880).encode() + np.arange(63, dtype=f">i{bits // 8}").tobytes())
    with pytest.raises(BrokenImage, match=reason):
        read_rgb(str(tmp_path / "x.fits"))


def test_16_bit_pgm_files_keep_their_high_byte(tmp_path: Path) -> None:
    """Pillow opens them as 32-bit integers too."""
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 65535\n" + bytes([0, 255, 18, 255, 255, 255]))
    np.testing.assert_array_equal(pixels(str(tmp_path / "x.pgm"))[0, :, 0], [0, 18, 255])


@pytest.mark.parametrize("start", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xc5\xd0\xd3\xc6" + bytes(28)])
def test_no_image_file_starts_another_program(tmp_path: Path, ghostscript: Path, start: bytes) -> None:
    file = start + b"%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.png").write_bytes(file)
    for source in (file, str(tmp_path / "x.png")):
        with pytest.raises(BrokenImage, match="it is PostScript"):
            read_rgb(source)
    assert not ghostscript.exists()


@pytest.fixture
def no_plug_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Pillow without plug-ins and without AVIF, whatever is installed here."""
    Image.init()
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name not in ("AVIF", "HEIF", "JXL")])
    for module in ("pillow_heif", "pillow_jxl", "pillow_avif"):
        monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    decode._plugged_in.cache_clear()
    yield
    decode._plugged_in.cache_clear()


@pytest.mark.parametrize("name, brand", [("iphone.jpg", "HEIC"), ("jxl_as.png", "JPEG XL")])
def test_plug_ins_of_pillow_are_used_when_a_file_needs_them(name: str, brand: str) -> None:
    """Files under the ending of another format. They show the photograph."""
    reference = np.asarray(Image.open(TRIALS / "ref.png").convert("RGB")).astype(int)
    file = (TRIALS / name).read_bytes()
    for source in (file, str(TRIALS / name)):
        assert np.abs(pixels(source) - reference).mean() < 8
    with pytest.raises(BrokenImage, match=f"it is broken {brand}|cannot be read"):
        read_rgb(file[:200])


# -- metadata


def chunk(kind: bytes, body: bytes, *, damaged: bool = False) -> bytes:
    """A chunk of a PNG file, with a wrong checksum if it is damaged."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ damaged)


def with_chunk(png: bytes, new: bytes, *, last: bool = False) -> bytes:
    """The file with one more chunk after its header, or before its end."""
    place = len(png) - 12 if last else 33
    return png[:place] + new + png[place:]


LARGE = zlib.compress(bytes(2**27))
ANCILLARY = {
    b"tEXt": b"Comment\0text",
    b"zTXt": b"Comment\0\0" + LARGE,
    b"iTXt": b"Comment\0\1\0\0\0" + LARGE,
    b"iCCP": b"profile\0\0" + LARGE,
    b"eXIf": b"II*\0garbage",
    b"gAMA": b"\0",
    b"pHYs": b"\0\0",
    b"sRGB": b"",
    b"tIME": b"\7\xea",
    b"tRNS": b"\0",
}
"""Bodies that Pillow takes offense at in some kinds of chunk: too large, too short."""


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("kind", ANCILLARY)
def test_metadata_never_make_a_png_file_unreadable(kind: bytes, damaged: bool, last: bool) -> None:
    whole = stored(Image.fromarray(noise(40, 50)), "PNG")
    file = with_chunk(whole, chunk(kind, ANCILLARY[kind], damaged=damaged), last=last)
    np.testing.assert_array_equal(pixels(file), noise(40, 50))
    assert set(examine(file).kinds) <= {"metadata skipped"}


def test_skipped_metadata_is_counted_and_the_rest_is_kept() -> None:
    """Transparency and orientation survive damage elsewhere; damaged ones are dropped."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    whole = stored(Image.fromarray(noise(40, 50)).quantize(16), "PNG", exif=exif, transparency=3)
    file = with_chunk(whole, chunk(b"tEXt", b"Comment\0text", damaged=True))
    assert examine(whole).kinds == ("palette", "transparent", "EXIF-rotated")
    assert examine(file).kinds == ("palette", "transparent", "EXIF-rotated", "metadata skipped")
    for option in (False, True):
        np.testing.assert_array_equal(pixels(file, exif_orientation=option), pixels(whole, exif_orientation=option))
    place = whole.index(b"tRNS") + 4
    damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    assert examine(damaged).kinds == ("palette", "EXIF-rotated", "metadata skipped")


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT"])
def test_damage_to_a_critical_chunk_stays_an_error(kind: bytes) -> None:
    whole = stored(Image.fromarray(noise(40, 50)).quantize(16), "PNG")
    place = whole.index(kind) + 4
    with pytest.raises(BrokenImage):
        read_rgb(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    unknown = with_chunk(whole, chunk(b"NEWS", b"of a later standard", damaged=True))
    with pytest.raises(BrokenImage):
        read_rgb(unknown)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "GIF"])
def test_large_metadata_of_other_formats_are_no_obstacle(kind: str) -> None:
    image = Image.fromarray(smooth(40, 50))
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000  # the description
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"comment": b"x" * 65_000, "exif": exif, "icc_profile": bytes(2**21), "xmp": b"x" * 60_000},
        "WEBP": {"exif": exif, "icc_profile": bytes(2**22), "xmp": b"x" * 2**22, "lossless": True},
        "TIFF": {"icc_profile": bytes(2**22), "tiffinfo": {0x010E: "x" * 2**22, 700: b"x" * 2**22}},
        "GIF": {"comment": b"x" * 2**20},
    }
    file = stored(image, kind, **options[kind])
    assert len(file) > len(stored(image, kind)) + 1000
    expected = pixels(stored(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    np.testing.assert_array_equal(pixels(file), expected)
    assert "metadata skipped" not in examine(file).kinds


def test_damaged_metadata_of_other_formats_are_no_obstacle() -> None:
    image = Image.fromarray(smooth(40, 50))
    garbage = b"Exif\0\0II*\0\xff\xff\xff\xff"
    jpeg = stored(image, "JPEG")
    for segment in (b"ICC_PROFILE\0\7\3garbage", b"ICC_PROFILE\0", b"Photoshop 3.0\x008BIM\4\4", b"Adobe", garbage):
        for marker in (0xE1, 0xE2, 0xED, 0xEE):
            file = jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", 2 + len(segment)) + segment + jpeg[2:]
            np.testing.assert_array_equal(pixels(file), pixels(jpeg))
    webp = stored(image, "WEBP", lossless=True, exif=b"Exif\0\0" + b"x" * 100, icc_profile=b"garbage")
    np.testing.assert_array_equal(pixels(webp), smooth(40, 50))
    tiff_file = bytearray(stored(image, "TIFF", tiffinfo={0x010E: "x" * 300}))
    place = tiff_file.index(struct.pack("<HHI", 0x010E, 2, 301)) + 4
    tiff_file[place : place + 4] = b"\xff\xff\xff\0"  # its length, beyond the end of the file
    np.testing.assert_array_equal(pixels(bytes(tiff_file)), smooth(40, 50))


@pytest.mark.parametrize(
    "start, named",
    [
        (b"%PDF-1.7\n", "a PDF document"),
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "HEIC, which needs a plug-in: pip install pillow-heif, or"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "HEIC, which needs"),
        (b"\xff\x0a\x00\x10", "JPEG XL, which needs a plug-in: pip install pillow-jxl-plugin, or"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL, which needs"),
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "AVIF, which needs a plug-in: pip install pillow-avif-plugin, or"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video"),
        (b"RIFF\x0a\x0a\0\0AVI LIST", "a video"),
        (b"\x1aE\xdf\xa3\x01\0\0\0", "a video"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", "an SVG drawing"),
        (b"<?xml version='1.0'?>\n<!-- by hand -->\n<svg>", "an SVG drawing"),
        (b"<!DOCTYPE html><html><svg>", "a web page"),
        (b"\n<html lang=en>", "a web page"),
        (b"plain text", "not an image of a known format"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path: Path, no_plug_ins: None, start: bytes, named: str) -> None:
    (tmp_path / "x.jpg").write_bytes(start + bytes(400))
    for source in (start + bytes(400), str(tmp_path / "x.jpg")):
        with pytest.raises(BrokenImage, match=f"it is {named}"):
            read_rgb(source)


def test_examine_names_what_is_unusual(tmp_path: Path) -> None:
    ordinary = Image.fromarray(noise(32, 40))
    samples = noise(32, 40).astype(np.uint16) * 257
    png(tmp_path / "gray.png", np.ascontiguousarray(samples[..., :1]))
    png(tmp_path / "rgb.png", samples)
    cases = [
        (stored(ordinary, "JPEG"), ()),
        (stored(ordinary, "PNG"), ()),
        (stored(ordinary.convert("L"), "JPEG"), ("gray",)),
        (stored(ordinary.convert("1"), "PNG"), ("gray",)),
        (stored(ordinary.convert("LA"), "PNG"), ("gray", "transparent")),
        (stored(ordinary.convert("P"), "PNG"), ("palette",)),
        (stored(ordinary.convert("RGBA"), "PNG"), ("transparent",)),
        ((tmp_path / "gray.png").read_bytes(), ("gray", "16-bit")),
        ((tmp_path / "rgb.png").read_bytes(), ("16-bit",)),
        (stored(Image.fromarray(noise(31, 31)), "PNG"), ("tiny",)),
        (stored(Image.new("RGB", (32, 320)), "PNG"), ("blank",)),
        (stored(Image.new("RGB", (32, 321)), "PNG"), ("long", "blank")),
    ]
    for file, kinds in cases:
        assert examine(file).kinds == kinds
    found = examine(stored(ordinary, "PNG"))
    assert (found.width, found.height) == (40, 32)


def test_examine_says_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "HUGE", 40 * 32 - 1)
    assert examine(stored(Image.new("RGB", (40, 32)), "PNG")).kinds == ("huge", "blank")


# -- broken files

TEXT = b"<!DOCTYPE html><html>404 not found</html>"


def whole_files() -> dict[str, bytes]:
    image = Image.fromarray(noise(64, 64))
    files = {kind.lower(): stored(image, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")}
    return {**files, "progressive": stored(image, "JPEG", progressive=True), "cmyk": stored(image.convert("CMYK"), "JPEG")}


@pytest.mark.parametrize("kind", whole_files())
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_a_truncated_file_is_broken(kind: str, share: float) -> None:
    file = whole_files()[kind]
    assert read_rgb(file).size == (64, 64)
    with pytest.raises(BrokenImage) as caught:
        read_rgb(file[: int(share * len(file))], name="cut.jpg")
    assert caught.value.name == "cut.jpg" and caught.value.reason and message(caught).startswith("cut.jpg cannot be read as")
    with pytest.raises(BrokenImage):
        examine(file[: int(share * len(file))])


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it is empty"),
        (TEXT, "it is a web page, probably a failed download; download the image again"),
        (b"\xff\xd8\xff", "it is not an image of a known format"),
    ],
)
def test_what_is_no_image(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for source, name in ((str(path), str(path)), (content, "an image")):
        with pytest.raises(BrokenImage) as caught:
            read_rgb(source)
        assert (caught.value.name, caught.value.reason) == (name, reason)
        assert message(caught) == f"{name} cannot be read as an image ({reason}): repair or remove it"


def test_what_is_no_file(tmp_path: Path) -> None:
    """A folder with the name of an image is not listed as one, and cannot be read as one."""
    write_image(tmp_path / "x.jpg" / "y.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    images = find_images(str(tmp_path))
    assert [images.name(i) for i in range(len(images))] == ["gone.jpg", "x.jpg/y.jpg"]
    for name, reason in (
        ("x.jpg", "Is a directory"),
        ("missing.jpg", "No such file or directory"),
        ("gone.jpg", "No such file"),
    ):
        with pytest.raises(BrokenImage, match=f"{name} cannot be read as an image \\({reason}"):
            read_rgb(str(tmp_path / name))


def test_a_broken_image_can_be_pickled() -> None:
    error = BrokenImage("a/b.jpg", "it is empty")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is BrokenImage and (again.name, again.reason, str(again)) == (error.name, error.reason, str(error))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_process_raises_the_same_error(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "x.jpg"
    path.touch()
    items = iter(index_loader(find_images(str(tmp_path)), EVALUATE, [0], batch_size=1, workers=workers, device=CPU))
    with pytest.raises(BrokenImage) as caught:
        next(items)
    assert str(caught.value).strip().endswith(f"{path} cannot be read as an image (it is empty): repair or remove it")


# -- replacements of broken images


def test_a_replacement_is_any_other_image_and_always_the_same() -> None:
    """Uniform: 3-sigma bounds on each of 6 others, over epochs.

    Attempts, seeds and images are independent.
    """
    drawn = [replacement(2, total=7, seed=3, epoch=epoch, attempt=0) for epoch in range(3000)]
    counts = Counter(drawn)
    assert set(counts) == {0, 1, 3, 4, 5, 6} and all(abs(n - 500) < 3 * (3000 * 5 / 36) ** 0.5 for n in counts.values())
    assert drawn == [replacement(2, total=7, seed=3, epoch=epoch, attempt=0) for epoch in range(3000)]
    for change in ({"seed": 4}, {"attempt": 1}, {"seed": -1}):
        other = [replacement(2, **{"total": 7, "seed": 3, "epoch": epoch, "attempt": 0, **change}) for epoch in range(3000)]
        assert 400 < sum(a == b for a, b in zip(drawn, other, strict=True)) < 600
    assert replacement(1, total=2, seed=0, epoch=0, attempt=0) == 0


def read_unless(broken: set[int]) -> Callable[[int], int]:
    def read(index: int) -> int:
        if index in broken:
            raise BrokenImage(f"{index}.jpg", f"reason {index}")
        return index

    return read


def test_read_or_replace_tries_one_after_the_other() -> None:
    order = [replacement(0, total=9, seed=0, epoch=5, attempt=attempt) for attempt in range(MAX_ATTEMPTS)]
    assert read_or_replace(read_unless({4}), 0, total=9, seed=0, epoch=5) == (0, "")
    broken = {0}
    while len(broken) < 9:
        first = next(index for index in order if index not in broken)
        assert read_or_replace(read_unless(broken), 0, total=9, seed=0, epoch=5) == (first, "reason 0")
        broken.add(first)
    with pytest.raises(BrokenImage, match=r"0\.jpg cannot be read as an image \(reason 0; 100 others"):
        read_or_replace(read_unless(broken), 0, total=9, seed=0, epoch=5)
    with pytest.raises(BrokenImage, match=r"^0\.jpg cannot be read as an image \(reason 0\): repair or remove it$"):
        read_or_replace(read_unless({0}), 0, total=1, seed=0, epoch=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, ImageSet, set[int]]:
    """Forty images, the same with some of them broken, and the numbers of these."""
    root = tmp_path_factory.mktemp("pair")
    for number in range(40):
        for name in ("whole", "spoilt"):
            write_image(root / name / f"{number:02}.jpg", seed=number)
    broken = {0, 7, 19, 20, 39}
    for number, content in zip(sorted(broken), (b"", TEXT, b"\xff\xd8\xff", b"GIF89a", TEXT), strict=True):
        (root / "spoilt" / f"{number:02}.jpg").write_bytes(content)
    return find_images(str(root / "whole")), find_images(str(root / "spoilt")), broken


def load(images: ImageSet, **changes: int) -> DataLoader:
    workers = changes.pop("workers", 0)
    batches = TrainBatches(num_images=len(images), **{"seed": 5, "batch_size": 4, "total_steps": 20} | changes)
    return train_loader(images, CROP, batches, workers=workers, device=CPU)


def test_intact_images_keep_their_crops(pair: tuple[ImageSet, ImageSet, set[int]]) -> None:
    """A broken one has crops of another image, with the random numbers of the broken one."""
    whole, spoilt, broken = pair
    for step, (ours, theirs) in enumerate(zip(load(spoilt), load(whole), strict=True)):
        views, indices, problems, shown = ours
        assert torch.equal(indices, theirs[1]) and not any(theirs[2])
        for place, index in enumerate(indices.tolist()):
            epoch = step // 10
            source = index
            if index in broken:
                attempts = (replacement(index, total=40, seed=5, epoch=epoch, attempt=a) for a in range(MAX_ATTEMPTS))
                source = next(other for other in attempts if other not in broken)
            assert shown[place] == source
            expected = CROP(whole.encoded(source), seed=5, epoch=epoch, index=index)
            assert all(torch.equal(view[place], other) for view, other in zip(views, expected, strict=True))
            assert bool(problems[place]) == (index in broken) and shown[place] == source
            if index not in broken:
                assert all(torch.equal(view[place], other[place]) for view, other in zip(views, theirs[0], strict=True))


def test_replacements_depend_on_no_worker_process_or_start(pair: tuple[ImageSet, ImageSet, set[int]]) -> None:
    _, spoilt, broken = pair
    items = collect(load(spoilt))
    problems = [each for _, _, problems, _ in load(spoilt) for each in problems]
    assert sum(map(bool, problems)) == 2 * len(broken)
    assert_equal_items(collect(load(spoilt, workers=2)), items)
    assert [each for _, _, problems, _ in load(spoilt, workers=2) for each in problems] == problems
    assert_equal_items(collect(load(spoilt, start_step=7)), items[7:])
    halves = [collect(load(spoilt, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    for step, (views, index) in enumerate(items):
        assert torch.equal(index, torch.cat([half[step][1] for half in halves]))
        assert all(torch.equal(view, torch.cat([half[step][0][v] for half in halves])) for v, view in enumerate(views))


def test_evaluation_replaces_nothing(pair: tuple[ImageSet, ImageSet, set[int]]) -> None:
    _, spoilt, _ = pair
    with pytest.raises(BrokenImage, match=r"07\.jpg cannot be read as an image \(it is a web page, [^)]*\)"):
        collect(index_loader(spoilt, EVALUATE, [5, 6, 7], batch_size=3, workers=0, device=CPU))


def test_a_removed_folder_stops_the_loader(pair: tuple[ImageSet, ImageSet, set[int]], tmp_path: Path) -> None:
    whole, _, _ = pair
    gone = dataclasses.replace(whole, root=os.path.join(tmp_path, "unmounted"))
    with pytest.raises(BrokenImage, match=r"No such file or directory; 100 others"):
        next(iter(load(gone)))
