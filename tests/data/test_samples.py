"""Every kind of TIFF, PNG, PNM, WebP and JPEG 2000 file: its samples, known here, or a refusal by name.

The files are written by tifffile and imagecodecs, or byte by byte, and not by a library that reads them afterwards. The
expected pixels are computed from the samples in float64.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from test_decode import chunk, pixels, stored

from dino_simpool.config import DecodingSettings
from dino_simpool.data.decode import BrokenImage, examine, has_more_than_8_bits, read_rgb, samples_in_16_bits
from dino_simpool.data.samples import range_of

HEIGHT, WIDTH = 37, 53
ROWS, COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH]
COLORS = np.stack([40 + 4 * ROWS, 200 - 3 * COLUMNS, 60 + ROWS + 2 * COLUMNS], -1) / 255
"""(H, W, 3) in 0..1, smooth enough for JPEG."""
OPACITY = np.clip(5 * COLUMNS, 0, 255)[..., None] / 255
"""(H, W, 1), from clear to opaque."""


def whole(values: np.ndarray, bits: int) -> np.ndarray:
    """Values in 0..1 as samples. Those of 16 bits have a low byte of their own."""
    return np.round(values * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def shown(samples: np.ndarray, bits: int, *, inks: bool = False, premultiplied: bool = False, white: float = 1.0) -> np.ndarray:
    """(H, W, 3) float64 in 0..255: what the samples (H, W, bands) look like on a background."""
    values = samples / (2**bits - 1)
    if inks:
        return 255 * (1 - values[..., :3]) * (1 - values[..., 3:])
    colors, opacity = values, np.ones((HEIGHT, WIDTH, 1))
    if values.shape[-1] in (2, 4):
        colors, opacity = values[..., :-1], values[..., -1:]
    return 255 * np.broadcast_to((colors if premultiplied else colors * opacity) + white * (1 - opacity), (HEIGHT, WIDTH, 3))


def difference(file: bytes, expected: np.ndarray, **options: Any) -> float:
    """The largest, in levels of 255, between what is read and what is expected."""
    return float(np.abs(pixels(file, **options).astype(int) - np.round(expected)).max())


def reason(file: bytes, **options: Any) -> str:
    """Why a file is refused, by both ways of reading it."""
    with pytest.raises(BrokenImage) as caught:
        read_rgb(file, decoding=DecodingSettings(**options))
    with pytest.raises(BrokenImage) as examined:
        examine(file, decoding=DecodingSettings(**options))
    assert caught.value.reason == examined.value.reason
    return caught.value.reason


# -- TIFF

KINDS: dict[str, tuple[str, str | None, Callable[[int], np.ndarray]]] = {
    "gray": ("minisblack", None, lambda bits: whole(COLORS[..., :1], bits)),
    "0 is white": ("miniswhite", None, lambda bits: whole(1 - COLORS[..., :1], bits)),
    "gray, alpha": ("minisblack", "unassalpha", lambda bits: whole(np.dstack([COLORS[..., :1], OPACITY]), bits)),
    "gray, premultiplied": (
        "minisblack", "assocalpha", lambda bits: whole(np.dstack([COLORS[..., :1] * OPACITY, OPACITY]), bits),
    ),
    "gray, other": ("minisblack", "unspecified", lambda bits: whole(np.dstack([COLORS[..., :1], OPACITY]), bits)),
    "RGB": ("rgb", None, lambda bits: whole(COLORS, bits)),
    "RGB, alpha": ("rgb", "unassalpha", lambda bits: whole(np.dstack([COLORS, OPACITY]), bits)),
    "RGB, premultiplied": ("rgb", "assocalpha", lambda bits: whole(np.dstack([COLORS * OPACITY, OPACITY]), bits)),
    "RGB, other": ("rgb", "unspecified", lambda bits: whole(np.dstack([COLORS, OPACITY]), bits)),
    "CMYK": ("separated", None, lambda bits: whole(np.dstack([COLORS, 0.2 + 0 * OPACITY]), bits)),
}  # fmt: skip
"""Photometric interpretation, meaning of the extra band, and samples of a number of bits."""
LAYOUTS = [  # compression, predictor, tiles, separate planes, byte order, BigTIFF
    (None, False, False, False, "<", False),
    (None, False, False, False, ">", False),
    (None, False, True, True, "<", False),
    (None, False, False, True, ">", False),
    ("lzw", False, False, False, "<", True),
    ("lzw", True, False, False, ">", False),
    ("deflate", True, True, False, "<", False),
    ("deflate", False, False, True, ">", False),
    ("packbits", False, False, False, ">", False),
    ("packbits", False, True, False, "<", False),
    ("zstd", True, False, False, "<", False),
    ("lzma", False, True, False, ">", False),
    ("zstd", False, False, True, "<", True),
]


def tiff(samples: np.ndarray, photometric: str, extra: str | None, layout: tuple[Any, ...], **more: Any) -> bytes:
    compression, predictor, tiles, separate, order, big = layout
    samples = np.moveaxis(samples, -1, 0) if separate and samples.shape[-1] > 1 else samples
    file = io.BytesIO()
    tifffile.imwrite(
        file, samples[..., 0] if samples.shape[-1] == 1 else samples, photometric=photometric, extrasamples=extra,
        compression=compression, predictor=predictor or None, tile=(16, 16) if tiles else None,
        rowsperstrip=None if tiles else 10,
        planarconfig=None if samples.shape[-1] == 1 else "separate" if separate else "contig", byteorder=order, bigtiff=big,
        metadata=None, **more,
    )  # fmt: skip
    return file.getvalue()


def refusal_of(kind: str, bits: int, layout: tuple[Any, ...]) -> str:
    """What the reason must say; empty for a file that is read."""
    compression, _, _, separate, order, _ = layout
    simple = kind in ("RGB", "CMYK", "RGB, alpha") and bits == 8
    if separate and kind not in ("gray", "0 is white") and not simple:
        return f"it has {bits}-bit samples in separate planes"
    if bits == 16 and kind.startswith("gray, "):
        return "2 x 16 bits, 0 is black" + {"gray, alpha": ", alpha", "gray, premultiplied": ", premultiplied"}.get(kind, "")
    if bits == 16 and kind == "0 is white" and order == ">":
        return "1 x 16 bits, 0 is white, big-endian"
    if kind.endswith("other"):
        return f"its {'second' if 'gray' in kind else 'fourth'} band is not declared as alpha; set extra_band to ignore, or"
    if bits == 16 and kind in ("RGB, alpha", "RGB, premultiplied") and compression in ("zstd", "lzma"):
        return "its 16-bit samples cannot be read exactly"
    return ""


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(map(str, layout)))
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_tiff_files_are_read_right_or_refused_by_their_property(kind: str, bits: int, layout: tuple[Any, ...]) -> None:
    photometric, extra, make = KINDS[kind]
    samples = make(bits)
    file = tiff(samples, photometric, extra, layout)
    expected = shown(samples, bits, inks=kind == "CMYK", premultiplied="premultiplied" in kind)
    if said := refusal_of(kind, bits, layout):
        assert said in reason(file)
    else:
        expected = 255 - expected if kind == "0 is white" else expected
        assert difference(file, expected) <= 1
        assert ("16-bit" in examine(file).kinds) == (bits == 16)
    if kind.endswith("other") and said.startswith("its"):
        bare = shown(samples[..., :-1], bits)
        assert difference(file, bare, extra_band="ignore") <= 1
        if bits == 8 or layout[0] not in ("zstd", "lzma"):
            assert difference(file, expected, extra_band="alpha") <= 1


def directory(fields: dict[int, list[int]], data: bytes, order: str = "<") -> bytes:
    """A TIFF file of one strip, as the specification says. Numbers above 65535 are given as pairs of 32 bits (rationals)."""
    height, width, bands = HEIGHT, WIDTH, fields.get(277, [1])[0]
    fields = {256: [width], 257: [height], 259: [1], 273: [8], 277: [bands], 278: [height], 279: [len(data)], **fields}
    values, entries = data + b"\0" * (len(data) % 2), b""
    for tag, numbers in sorted(fields.items()):
        letter, kind, count = {532: ("I", 5, len(numbers) // 2), 273: ("I", 4, len(numbers)), 279: ("I", 4, len(numbers))}.get(
            tag, ("H", 3, len(numbers))
        )
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(packed) > 4:
            values, packed = values + packed, struct.pack(f"{order}I", 8 + len(values))
        entries += struct.pack(f"{order}HHI", tag, kind, count) + packed.ljust(4, b"\0")
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(values))
    return head + values + struct.pack(f"{order}H", len(fields)) + entries + bytes(4)


def packed_rows(levels: np.ndarray, bits: int) -> bytes:
    """Rows of (H, W) levels of 1, 2, 4 or 8 bits, each from a new byte on."""
    single = np.unpackbits(levels.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
    return np.packbits(single.reshape(len(levels), -1), axis=1).tobytes()


def reversed_bits(data: bytes) -> bytes:
    return np.packbits(np.unpackbits(np.frombuffer(data, np.uint8))[::-1]).tobytes()[::-1]


ENCODE: dict[int, Callable[[bytes], bytes]] = {
    1: bytes,
    5: imagecodecs.lzw_encode,
    8: zlib.compress,
    32946: zlib.compress,
    32773: imagecodecs.packbits_encode,
}


@pytest.mark.parametrize("compression", ENCODE)
@pytest.mark.parametrize("colors", [0, 1, 3])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tiff_files_of_few_bits(bits: int, colors: int, compression: int) -> None:
    """0 is white, 0 is black, palette; in both byte orders and both orders of the bits in a byte."""
    levels = (COLORS[..., 0] * (2**bits - 1)).round().astype(int)
    palette = np.random.default_rng(0).integers(0, 65536, (3, 2**bits))
    palette[:, 0] = 65535  # 16-bit values
    for order in "<>":
        for fill in (1, 2):
            stored_levels = 2**bits - 1 - levels if colors == 0 else levels
            data = ENCODE[compression](packed_rows(stored_levels, bits))
            data = reversed_bits(data) if fill == 2 else data
            fields = {258: [bits], 259: [compression], 262: [colors], 266: [fill]}
            file = directory(fields | ({320: palette.ravel().tolist()} if colors == 3 else {}), data, order)
            expected = np.repeat(255 * levels[..., None] / (2**bits - 1), 3, -1)
            if colors == 3:
                expected = np.moveaxis(palette[:, levels], 0, -1) / 257
            if fill == 2 and compression == 1 and ((colors == 3 and bits < 8) or (colors == 0 and bits == 8)):
                kind = "palette" if colors == 3 else "0 is white"
                assert f"(1 x {bits} bits, {kind}, {'big' if order == '>' else 'little'}-endian, fill order 2)" in reason(file)
            else:
                assert difference(file, expected) <= 1


@pytest.mark.parametrize("kind", ["group3", "group4", "tiff_ccitt", "tiff_thunderscan"])
def test_tiff_files_of_fax_machines(kind: str) -> None:
    """Pillow writes these; a bilevel image has only one reading."""
    black = COLORS[..., 0] < 0.5
    if kind == "tiff_thunderscan":
        file = directory({258: [4], 259: [32809], 262: [1]}, bytes(900))
        assert reason(file)
        return
    file = stored(Image.fromarray(~black), "TIFF", compression=kind)
    assert difference(file, np.repeat(255.0 * ~black[..., None], 3, -1)) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_files_are_turned_alike_by_both_libraries(bits: int, orientation: int) -> None:
    samples = whole(COLORS, bits)
    file = directory({258: [bits] * 3, 262: [2], 277: [3], 274: [orientation]}, samples.astype(f"<u{bits // 8}").tobytes())
    plain = directory({258: [bits] * 3, 262: [2], 277: [3]}, samples.astype(f"<u{bits // 8}").tobytes())
    turn = {2: np.fliplr, 3: lambda a: a[::-1, ::-1], 4: np.flipud, 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
            7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}.get(orientation, lambda a: a)  # fmt: skip
    for options in ({}, {"value_range": (0, 65535)}):  # Pillow, OpenCV
        np.testing.assert_array_equal(pixels(file, **options), turn(pixels(plain, **options)))


@pytest.mark.parametrize(
    "fields, kind, said",
    [
        ({258: [32], 262: [1], 339: [1]}, "u4", "it has 32-bit samples"),
        ({258: [32], 262: [1], 339: [2]}, "i4", "it has signed samples"),
        ({258: [32], 262: [1], 339: [3]}, "f4", "it has floating-point samples"),
        ({258: [64], 262: [1], 339: [3]}, "f8", "it has floating-point samples"),
        ({258: [32] * 3, 262: [2], 277: [3], 339: [3] * 3}, "f4", "it has floating-point samples"),
        ({258: [16], 262: [1], 339: [3]}, "f2", "it has floating-point samples"),
        ({258: [16] * 3, 262: [2], 277: [3], 339: [2] * 3}, "i2", "it has signed samples"),
        ({258: [8], 262: [1], 339: [2]}, "i1", "it has signed samples"),
        ({258: [8] * 5, 262: [2], 277: [5], 338: [0, 0]}, "u1", "it has 5 bands; at most 4 are supported"),
        ({258: [8] * 5, 262: [5], 277: [5], 338: [0]}, "u1", "it has 5 bands"),
        ({258: [16] * 8, 262: [1], 277: [8], 338: [0] * 7}, "u2", "it has 8 bands"),
        ({258: [8] * 3, 262: [8], 277: [3]}, "u1", "it has CIELAB colors"),
        ({258: [8] * 3, 262: [9], 277: [3]}, "u1", "it has CIELAB colors"),
        ({258: [16], 262: [3], 320: [65535] * 3 * 65536}, "u2", "1 x 16 bits, palette"),
        ({258: [8], 262: [3], 320: [7] * 768}, "u1", "its palette has 8-bit colors"),
        ({258: [8], 262: [4]}, "u1", "1 x 8 bits, mask"),
        ({258: [8] * 3, 259: [50001], 262: [2], 277: [3]}, "u1", "it has WebP compression"),
        ({258: [12], 262: [1]}, "u2", "it has 12-bit samples"),
        ({258: [8] * 3, 262: [6], 277: [3], 530: [2, 2]}, "u1", "it has YCbCr colors at a lower resolution"),
        ({258: [8] * 3, 262: [6], 277: [3]}, "u1", "it has YCbCr colors at a lower resolution"),
        ({258: [8] * 3, 262: [6], 277: [3], 530: [1, 1], 532: [16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1]}, "u1",
         "it has YCbCr colors of a limited range"),
    ],
)  # fmt: skip
def test_tiff_files_of_other_kinds_are_refused_by_name(fields: dict[int, list[int]], kind: str, said: str) -> None:
    for order in "<>":
        data = np.zeros((HEIGHT, WIDTH, fields.get(277, [1])[0]), kind).tobytes()
        assert said in reason(directory(fields, data, order))


def test_tiff_files_with_ycbcr_colors() -> None:
    ycc = np.asarray(Image.fromarray(whole(COLORS, 8)).convert("YCbCr"))
    luma, blue, red = (ycc[..., i].astype(float) for i in range(3))
    expected = np.stack([luma + 1.402 * (red - 128), luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
                         luma + 1.772 * (blue - 128)], -1)  # fmt: skip
    full = {532: [0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1]}
    for more in ({}, full):
        file = directory({258: [8] * 3, 262: [6], 277: [3], 530: [1, 1], **more}, ycc.tobytes())
        assert difference(file, np.clip(expected, 0, 255)) <= 1
    small = np.ascontiguousarray(whole(COLORS, 8)[:32, :48])
    photograph = io.BytesIO()
    tifffile.imwrite(photograph, small, photometric="rgb", compression="jpeg", compressionargs={"level": 98}, metadata=None)
    ours = pixels(photograph.getvalue()).astype(int)
    assert np.abs(ours - tifffile.imread(io.BytesIO(photograph.getvalue())).astype(int)).max() <= 2


# -- PNG


def png(samples: np.ndarray, bits: int, color: int, *, interlaced: bool, chunks: dict[bytes, bytes]) -> bytes:
    """A PNG file of samples (H, W, bands), as the specification says."""
    every = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = [samples[top::down, left::right] for left, top, right, down in (every if interlaced else ((0, 0, 1, 1),))]
    rows = [
        row.astype(">u2").tobytes() if bits == 16 else packed_rows(row.reshape(1, -1), bits) for part in parts for row in part
    ]
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, color, 0, 0, interlaced)
    body = [(b"IHDR", header), *chunks.items(), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in body)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    "color, bits, keyed",
    [
        *((0, bits, keyed) for bits in (1, 2, 4, 8, 16) for keyed in (False, True)),
        *((3, bits, keyed) for bits in (1, 2, 4, 8) for keyed in (False, True)),
        *((2, bits, keyed) for bits in (8, 16) for keyed in (False, True)),
        *((color, bits, False) for color in (4, 6) for bits in (8, 16)),  # these have alpha already
    ],
)
def test_png_files_of_every_kind(color: int, bits: int, keyed: bool, interlaced: bool) -> None:
    """keyed: with a tRNS chunk, which makes one color, or entries of the palette, transparent."""
    parts = {
        0: COLORS[..., :1],
        2: COLORS,
        3: COLORS[..., :1],
        4: np.dstack([COLORS[..., :1], OPACITY]),
        6: np.dstack([COLORS, OPACITY]),
    }
    samples = whole(parts[color], bits)
    chunks: dict[bytes, bytes] = {}
    expected = shown(samples, bits)
    if color == 3:
        palette = np.random.default_rng(1).integers(0, 256, (2**bits, 3))
        opacity = np.random.default_rng(2).integers(0, 256, 2**bits) if keyed else np.full(2**bits, 255)
        chunks = {b"PLTE": palette.astype(np.uint8).tobytes()} | (
            {b"tRNS": opacity.astype(np.uint8).tobytes()} if keyed else {}
        )
        entries = np.concatenate([palette, opacity[:, None]], -1)
        expected = shown(entries[samples[..., 0]], 8)
    elif keyed:
        key = samples[5, 5]
        chunks = {b"tRNS": key.astype(">u2").tobytes()}
        clear = (samples == key).all(-1, keepdims=True)
        assert 0 < clear.mean() < 1
        expected = np.where(clear, 255, expected)
    file = png(samples, bits, color, interlaced=interlaced, chunks=chunks)
    assert difference(file, expected) <= 1
    assert ("transparent" in examine(file).kinds) == (keyed or color in (4, 6))
    assert ("16-bit" in examine(file).kinds) == (bits == 16)


# -- PNM


@pytest.mark.parametrize("maximum", [1, 15, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("magic", ["P2", "P3", "P5", "P6"])
def test_pnm_files_of_every_maximum(magic: str, maximum: int) -> None:
    """In text and in bytes, gray and color."""
    bands = 1 if magic in ("P2", "P5") else 3
    samples = (COLORS[..., :bands] * maximum).round().astype(int)
    body = (
        " ".join(map(str, samples.ravel())).encode()
        if magic in ("P2", "P3")
        else samples.astype(">u2" if maximum > 255 else "u1").tobytes()
    )
    file = f"{magic}\n# a comment\n{WIDTH} {HEIGHT}\n{maximum}\n".encode() + body
    expected = np.broadcast_to(255 * samples / maximum, (HEIGHT, WIDTH, 3))
    assert difference(file, expected) <= 1
    assert ("16-bit" in examine(file).kinds) == (maximum > 255)


def test_pnm_files_of_one_bit_and_refused_ones() -> None:
    black = COLORS[..., 0] < 0.5
    expected = np.repeat(255.0 * ~black[..., None], 3, -1)
    size = f"{WIDTH} {HEIGHT}\n".encode()
    assert difference(b"P1\n" + size + b" ".join(b"%d" % bit for bit in black.ravel()), expected) == 0
    assert difference(b"P4\n" + size + packed_rows(black, 1), expected) == 0
    assert "PAM" in reason(b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n\0\0\0")
    assert "floating-point" in reason(b"PF\n" + size + b"-1.0\n" + bytes(12 * HEIGHT * WIDTH))
    assert "32-bit samples" in reason(b"Pf\n" + size + b"-1.0\n" + bytes(4 * HEIGHT * WIDTH))


# -- WebP and JPEG 2000


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("animated", [False, True])
def test_webp_files(alpha: bool, animated: bool) -> None:
    samples = whole(np.dstack([COLORS, OPACITY]) if alpha else COLORS, 8)
    lossless = imagecodecs.webp_encode(samples, lossless=True, method=0)
    if animated:
        more = [Image.fromarray(255 - samples)]
        lossless = stored(Image.fromarray(samples), "WEBP", lossless=True, exact=True, save_all=True, append_images=more)
    assert difference(lossless, shown(samples, 8)) <= 1
    lossy = imagecodecs.webp_encode(samples, level=90)
    assert np.abs(pixels(lossy) - shown(imagecodecs.webp_decode(lossy), 8)).max() <= 1


@pytest.mark.parametrize("form", ["jp2", "j2k"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_jpeg_2000_files(bands: int, bits: int, form: str) -> None:
    """Fewer bits than 16 are declared, and white is the highest of them. These files do not declare alpha."""
    parts = {1: COLORS[..., :1], 2: np.dstack([COLORS[..., :1], OPACITY]), 3: COLORS, 4: np.dstack([COLORS, OPACITY])}
    samples = whole(parts[bands], bits)
    samples[:3, :3] = 2**bits - 1  # white, which must not overflow
    file = imagecodecs.jpeg2k_encode(
        samples[..., 0] if bands == 1 else samples, bitspersample=bits, reversible=True, codecformat=form, level=0
    )
    if bands == 2 and bits > 8:
        assert "band is not declared as alpha" in reason(file)
        assert "its 16-bit samples cannot be read exactly" in reason(file, extra_band="ignore")
    elif bands in (2, 4):
        assert "band is not declared as alpha" in reason(file)
        assert difference(file, shown(samples, bits), extra_band="alpha") <= 1
        assert difference(file, shown(samples[..., :-1], bits), extra_band="ignore") <= 1
    else:
        assert difference(file, shown(samples, bits)) <= 1
        assert ("16-bit" in examine(file).kinds) == (bits > 8)


def test_jpeg_2000_files_with_signs_and_with_alpha() -> None:
    gray, color = whole(COLORS[..., 0], 8), whole(COLORS, 8)
    for samples, offset, kind, scale in ((gray, 128, np.int8, 1), (gray, 32768, np.int16, 257), (color, 128, np.int8, 1)):
        file = imagecodecs.jpeg2k_encode((samples.astype(int) * scale - offset).astype(kind), reversible=True)
        assert difference(file, np.broadcast_to(samples.reshape(HEIGHT, WIDTH, -1), (HEIGHT, WIDTH, 3))) <= 1
    samples = whole(np.dstack([COLORS, OPACITY]), 8)
    declared = stored(Image.fromarray(samples), "JPEG2000", irreversible=False)
    assert b"cdef" in declared and difference(declared, shown(samples, 8)) <= 1


# -- choices: transparency and the range of 16-bit samples


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("transparency, level", [("white", 1.0), ("black", 0.0), ("gray", 128 / 255)])
def test_the_background_of_transparent_pixels(bits: int, transparency: str, level: float) -> None:
    samples = whole(np.dstack([COLORS, OPACITY]), bits)
    for file in (png(samples, bits, 6, interlaced=False, chunks={}), tiff(samples, "rgb", "unassalpha", LAYOUTS[0])):
        assert difference(file, shown(samples, bits, white=level), transparency=transparency) <= 1
        assert difference(file, shown(samples[..., :3], bits), transparency="ignore") <= 1


DEEP: dict[str, Callable[[np.ndarray], bytes]] = {
    "gray PNG": lambda samples: png(samples[..., :1], 16, 0, interlaced=False, chunks={}),
    "gray TIFF": lambda samples: tiff(samples[..., :1], "minisblack", None, LAYOUTS[1]),
    "0 is white": lambda samples: tiff(65535 - samples[..., :1], "miniswhite", None, LAYOUTS[0]),
    "RGB PNG": lambda samples: png(samples, 16, 2, interlaced=True, chunks={}),
    "RGB TIFF": lambda samples: tiff(samples, "rgb", None, LAYOUTS[4]),
    "RGB PNM": lambda samples: f"P6 {WIDTH} {HEIGHT} 65535\n".encode() + samples.astype(">u2").tobytes(),
    "gray JPEG 2000": lambda samples: imagecodecs.jpeg2k_encode(samples[..., 0], reversible=True, level=0),
    "RGB JPEG 2000": lambda samples: imagecodecs.jpeg2k_encode(samples, reversible=True, level=0),
}


@pytest.mark.parametrize("kind", DEEP)
def test_the_range_of_16_bit_samples(kind: str) -> None:
    """12 bits in a file of 16 leave 16 levels; the choices show all of them."""
    samples = whole(COLORS, 12)
    file, bands = DEEP[kind](samples), 1 if "RGB" not in kind else 3
    used = samples[..., :bands].astype(float)
    np.testing.assert_array_equal(samples_in_16_bits(file), samples[..., :bands])
    assert has_more_than_8_bits(file) and examine(file).samples == range_of(samples[..., :bands], 1)
    assert len(np.unique(pixels(file))) <= 16
    low, high = np.percentile(used, (1, 99))
    for value_range, (black, white) in {(0, 4095): (0, 4095), (1000, 3000): (1000, 3000), "percentiles": (low, high)}.items():
        expected = np.clip((used - black) / (white - black), 0, 1) * 255
        ours = pixels(file, value_range=value_range).astype(float)
        assert np.abs(ours - expected).max() <= 1.5
        assert len(np.unique(ours)) > 30


def test_percentiles_leave_out_what_is_transparent_and_survive_flat_images() -> None:
    samples = np.full((HEIGHT, WIDTH, 2), 65535, np.uint16)
    samples[:, :20, 0], samples[:, :20, 1] = 0, 0
    samples[:, 20:, 0] = 1000 + 10 * COLUMNS[:, 20:]
    low, high = range_of(samples, 0)
    assert (low, high) == (1200, 1520)
    file = png(samples, 16, 4, interlaced=False, chunks={})
    assert pixels(file, value_range="percentiles", transparency="black")[:, :20].max() == 0
    flat = np.full((HEIGHT, WIDTH, 1), 4000, np.uint16)
    flat[3, 4] = 4200  # less than 1 %
    shown_flat = pixels(png(flat, 16, 0, interlaced=False, chunks={}), value_range="percentiles")
    assert shown_flat[3, 4, 0] == 255 and shown_flat.sum() == 3 * 255
    flat[3, 4] = 4000
    assert pixels(png(flat, 16, 0, interlaced=False, chunks={}), value_range="percentiles").max() == 0


def test_files_of_8_bits_do_not_depend_on_the_range() -> None:
    for kind in ("PNG", "JPEG", "TIFF"):
        file = stored(Image.fromarray(whole(COLORS, 8)), kind)
        assert not has_more_than_8_bits(file) and examine(file).samples is None
        np.testing.assert_array_equal(pixels(file, value_range=(0, 100)), pixels(file))
    assert not has_more_than_8_bits(b"no image")
