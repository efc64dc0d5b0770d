"""Image files without the metadata that no pixel depends on, where these are damaged or large.

Browsers skip such text, profiles and comments. Pillow refuses the whole file. Nothing else changes:
what is wrong with the pixels stays wrong.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
STARTS = (_PNG, _JPEG)
"""How files begin from which metadata can be left out."""
_ADOBE, _EXIF, _COMMENT, _SCAN = 0xEE, 0xE1, 0xFE, 0xDA  # markers in JPEG files


def without_metadata(file: bytes) -> Iterator[bytes]:
    """A PNG or JPEG file first without most, then without all metadata; nothing for other files."""
    if file.startswith(STARTS):
        strip = _stripped_png if file.startswith(_PNG) else _stripped_jpeg
        yield from (strip(file, True), strip(file, False))


def _stripped_png(file: bytes, keep: bool) -> bytes:
    """Critical chunks only. keep: also those of transparency and orientation, if intact."""
    parts, place = [file[:8]], 8
    while place + 12 <= len(file):
        length, kind = struct.unpack_from(">I4s", file, place)
        chunk = file[place : place + 12 + length]
        intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or (keep and intact and kind in (b"tRNS", b"eXIf")):
            parts.append(chunk)
        place += 12 + length
    return b"".join(parts)


def _stripped_jpeg(file: bytes, keep: bool) -> bytes:
    """No comments and application segments but Adobe's, which tells the colors. keep: and EXIF."""
    parts, place = [file[:2]], 2
    while place + 4 <= len(file) and file[place] == 0xFF and file[place + 1] != _SCAN:
        marker, length = file[place + 1], int.from_bytes(file[place + 2 : place + 4], "big")
        needed = (marker == _ADOBE and length >= 14) or (marker == _EXIF and keep)
        if needed or not (0xE0 <= marker <= 0xEF or marker == _COMMENT):
            parts.append(file[place : place + 2 + length])
        place += 2 + length
    return b"".join([*parts, file[place:]])
