"""What the names of files and folders say: images, archives, no data; and how they are shown."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".mpo"),
    *(".avif", ".avifs", ".heic", ".heif", ".heics", ".heifs", ".hif", ".jxl", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".icb", ".vda", ".vst", ".qoi", ".psd", ".dds", ".ico", ".icns", ".cur"),
    *(".pcx", ".dcx", ".sgi", ".bw", ".rgb", ".rgba", ".ras", ".im", ".msp", ".pcd", ".pxr", ".xbm", ".xpm", ".blp", ".ftc"),
    *(".ftu", ".gbr", ".fli", ".flc", ".fit", ".fits"),
)
"""Endings of the formats that Pillow or its plug-ins read. Not of those that are no images of
pixels (PDF, PostScript, WMF, video, HDF5, GRIB, BUFR)."""
ARCHIVE_SUFFIXES = (".tar", ".zip")
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
PACKED_SUFFIXES = ARCHIVE_SUFFIXES + COMPRESSED_SUFFIXES
SYSTEM_FOLDERS = frozenset(
    ("@eadir", "__macosx", "lost+found", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin")
    + ("system volume information", ".ipynb_checkpoints", "__pycache__", ".trashes", "@tmp", "found.000", "recycler")
)
"""Folders that storage devices, file systems and tools make: no data and no classes. Lower case."""


def is_image(name: str) -> bool:
    """Whether a file has the name of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_archive(name: str) -> bool:
    """Whether a file has the name of an archive that can be read."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def is_compressed(name: str) -> bool:
    """Whether a file has the name of a compressed tar."""
    return name.lower().endswith(COMPRESSED_SUFFIXES)


def is_no_data(name: str) -> bool:
    """Whether a file or folder is hidden, or a folder of the system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def kind_left_out(name: str) -> str:
    """What a file that is not read is counted as: its ending, in lower case."""
    ending = os.path.splitext(name)[1].lower()
    return ending if re.fullmatch(r"\.\w{1,8}", ending) else "without an ending"


def annotations_among(names: Iterable[str]) -> set[str]:
    """Images that belong to another one in WebDataset's form: 01.seg.png beside 01.jpg. A number in
    place of a word, as in 01.2.png, counts images."""
    images = [name for name in names if is_image(name)]
    keys = {os.path.splitext(name)[0] for name in images}
    found = set()
    for name in images:
        folder, base = os.path.split(name)
        key, *endings = base.split(".")
        if len(endings) == 2 and key and not endings[0].isdigit() and os.path.join(folder, key) in keys:
            found.add(name)
    return found


def say_left_out(left_out: Counter[str]) -> str:
    """The counts in words, the most frequent first: 12 .txt, 3 hidden; "" if there are none."""
    return ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common())


def shown(text: str) -> str:
    """A name or message in one line for terminals, lists and pages: what does not print (escape
    sequences, newlines, marks that turn the direction, bytes that are not UTF-8) as \\x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(shown, text.split("\n")))
