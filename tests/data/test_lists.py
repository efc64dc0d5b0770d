"""Text files of paths, as people have them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dino_simpool.data import find_images
from dino_simpool.data.lists import as_line

NAMES = ("000.jpg", "#sunset.jpg", " padded .jpg", "a\u2028b.jpg", "new\nline.jpg", "tab\t.jpg", '"q".jpg', "a,b.jpg",
         "back\\s.jpg", "file:x.jpg", "red\x1b[31m.jpg", "ü.jpg", os.fsdecode(b"caf\xe9.jpg"), "x y.jpg", "\x85.jpg",
         "{1}.jpg")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes(b"\xff\xd8\0")
    return tmp_path


def listed(folder: Path, text: str | bytes) -> list[str]:
    """The names that a list with this text gives."""
    (folder / "list.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return list(find_images(str(folder / "list.txt")).index)


def test_every_name_comes_back_from_its_line(folder: Path) -> None:
    """Ours, in which odd names are JSON strings; and, but for newlines, as it is."""
    assert listed(folder, "".join(f"{as_line(name)}\n" for name in NAMES)) == list(NAMES)
    assert as_line("a b ü.jpg") == "a b ü.jpg" and as_line("#a.jpg") == '"#a.jpg"'
    plain = [name for name in NAMES if "\n" not in name and "\udce9" not in name]
    for end in ("\n", "\r\n"):
        assert listed(folder, end.join(plain)) == plain


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\ufeff000.jpg\n", ""),
        ("000.jpg\n".encode("utf-16"), ""),
        ("# a comment\n\n  \n000.jpg\n", ""),
        ('"000.jpg"', "1 line(s) read as JSON strings"),
        ("'000.jpg'", "read as paths in quotes"),
        ("path,label\n000.jpg,hat\n", "'path,label' in the first line is taken for a header"),
        ("path,label\n000.jpg,hat\n", "read as the first column of CSV"),
        ("000.jpg 3\n", "read as paths with a label"),
        ("000.jpg\thigh heels\n", "read as the first column of columns"),
        (".\\000.jpg\r\n", "read as paths with backslashes"),
        ("  000.jpg  \n", "read as paths with spaces around them"),
    ],
)
def test_other_forms(folder: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, said: str) -> None:
    assert [os.path.normpath(name) for name in listed(folder, text)] == ["000.jpg"]
    assert said in capsys.readouterr().err


def test_addresses(folder: Path) -> None:
    for name in ("000.jpg", "ü.jpg", "x y.jpg", os.fsdecode(b"caf\xe9.jpg")):
        assert listed(folder, (folder / name).as_uri()) == [str(folder / name)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("000.jpg\nmissing.jpg\n", "'missing.jpg', line 2 of .*list.txt, does not exist in .*: correct or remove the line"),
        ("\n\nmissing.jpg", "line 3"),
        ("path label\nmissing.jpg 1\n", r"\(nor does 'path label' in the first line\)"),
        ("\n# nothing\n", "lists no images: write one path per line"),
        (b"\xff\xfe\xfd\0", "is not UTF-8 text|lists no images|does not exist"),
        (b"caf\xe9.jpg", "is not UTF-8 text"),
        (b"\0\1\2", "is not UTF-8 text"),
        ("000.jpg\nsub\n", "'sub', line 2 of .*list.txt, is a folder: list the images in it"),
        ("a.tar/x/1.jpg", "is inside an archive: give .*a.tar itself"),
        ("pipe", "is a pipe or a device, not a file"),
        ("gone.jpg", "is a broken link, not a file"),
    ],
)
def test_a_list_that_cannot_be_read_is_named(folder: Path, text: str | bytes, said: str) -> None:
    (folder / "sub").mkdir()
    (folder / "a.tar").touch()
    os.mkfifo(folder / "pipe")
    (folder / "gone.jpg").symlink_to("nowhere")
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        listed(folder, text)
    assert "\n" not in str(error.value)


def test_as_line_is_one_line() -> None:
    for name in NAMES:
        assert as_line(name).isprintable() and (as_line(name) == name or json.loads(as_line(name)) == name)
