"""Text files of paths: one a line, split at newlines only, and the other forms that people have.

A line is taken as it is if such a file exists, whatever its characters. If not, it may be a JSON
string or in quotes, a file:// address, a path with backslashes, a path with spaces at its edges, or
the first column of `path label` or of a CSV file. What was read so is said.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import unquote

from dino_simpool.logs import say

TEXT_SUFFIXES = (".txt", ".csv", ".tsv", ".lst", ".list")
"""Endings of lists. A file with another one that is no text is taken for an image."""
LARGEST = 2**31
"""Bytes of a list: 20 million paths."""
_FORM = "write one path per line, relative to the file or absolute"


def is_binary(file: str) -> bool:
    """Whether a file is no text, such as an image without an ending."""
    with open(file, "rb") as opened:
        start = opened.read(1024)
    return b"\0" in start and not start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def read_list(file: str, exist: Callable[[Sequence[str]], Sequence[bool]]) -> list[str]:
    """The paths in a text file, as they are written there or as they have to be.

    exist: for paths relative to the folder of the list, whether they are files.
    FileNotFoundError, with the number of the line, for a path that is none. ValueError if the file
    is no text in UTF-8 or UTF-16, is too large, or lists nothing.
    """
    size = os.path.getsize(file)
    if size > LARGEST:
        raise ValueError(f"{file} has {size:,} bytes, too many for a list of paths: give its folder, or a shorter list")
    with open(file, "rb") as opened:
        content = opened.read()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in content and not utf16:
        raise ValueError(f"{file} is not UTF-8 text: give a folder, or a text file with one path per line")
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: give a folder, or a text file with one path per line") from error
    # Not str.splitlines, which takes characters for ends of lines that file names may have.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    paths, forms, header = [], Counter[str](), ""
    for number, (line, exists) in enumerate(zip(lines, exist(lines), strict=True), 1):
        if exists:
            paths.append(line)
            continue
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        for form, path in _other_forms(line):
            if exist([path])[0]:
                forms[form] += 1
                paths.append(path)
                break
        else:
            if not paths and not header and re.fullmatch(r"\w+([ ,;\t]+\w+)+|(file|image|path|name)\w*", line.strip()):
                header = line
                continue
            first = f" (nor does {header!r} in the first line)" if header else ""
            wrong = _what_is(line.strip(), os.path.dirname(file) or ".", first)
            raise FileNotFoundError(f"{line[:200]!r}, line {number} of {file}, {wrong}")
    if not paths:
        raise ValueError(f"{file} lists no images: {_FORM}")
    if header:
        say(f"{file}: {header!r} in the first line is taken for a header")
    for form, count in forms.items():
        say(f"{file}: {count:,} line(s) read as {form}")
    return paths


def _what_is(line: str, folder: str, first: str) -> str:
    """What a line is that is not the path of a file, and what to do."""
    path = os.path.join(folder, line)
    if "\0" not in line and os.path.isdir(path):
        return "is a folder: list the images in it, or give the folder itself"
    if "\0" not in line and os.path.lexists(path):
        what = "a pipe or a device" if os.path.exists(path) else "a broken link"
        return f"is {what}, not a file: correct or remove the line"
    archive = re.match(r"(.*\.(tar|zip))/", path, re.IGNORECASE | re.DOTALL)
    if archive and os.path.isfile(archive[1]):
        return f"is inside an archive: give {archive[1]} itself, or unpack it"
    return f"does not exist in {folder}{first}: correct or remove the line; paths start at the folder of the list"


def _other_forms(line: str) -> Iterator[tuple[str, str]]:
    """What a line may be that is no path as it stands, in words, and the path then."""
    stripped = line.strip()
    yield "paths with spaces around them", stripped
    if stripped.startswith('"'):
        try:
            path = json.loads(stripped)
        except ValueError:
            path = None
        if isinstance(path, str) and "\0" not in path:
            yield "JSON strings", path
    if len(stripped) > 2 and stripped[0] == stripped[-1] and stripped[0] in "\"'":
        yield "paths in quotes", stripped[1:-1]
    if address := re.match(r"file://(localhost)?(?=/)", stripped):
        yield "file:// addresses", unquote(stripped[address.end() :], errors="surrogateescape")
    if "\\" in stripped:
        yield "paths with backslashes", stripped.replace("\\", "/")
    for form, separator in (("CSV", ","), ("CSV", ";"), ("columns", "\t")):
        if separator in stripped:
            yield f"the first column of {form}", stripped.split(separator)[0].strip().strip("\"'")
    if " " in stripped:
        yield "paths with a label", stripped.rsplit(None, 1)[0]


def as_line(path: str) -> str:
    """A path as one line of a list: a JSON string if it would be read as something else."""
    plain = path.isprintable() and path == path.strip() and not path.startswith(("#", '"', "'", "file://")) and "\\" not in path
    return path if plain else json.dumps(path)
