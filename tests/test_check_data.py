"""The command check-data on folders of intact, unusual and broken files."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from miniatures import BUILDERS
from PIL import Image
from test_data import write_image
from test_distributed import group, run_processes

from dino_simpool import check_data, cli
from dino_simpool.check_data import Summary, check, describe
from dino_simpool.config import CheckDataConfig, DecodingSettings
from dino_simpool.data import find_images
from dino_simpool.data.decode import Examined
from dino_simpool.layouts import LAYOUTS, check_layout

NUM_IMAGES = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty images in two folders: one CMYK, two gray, one rotated, all of these blank, three
    broken, the others ordinary and tiny."""
    root = tmp_path_factory.mktemp("checked")
    for number in range(NUM_IMAGES):
        write_image(root / "ab"[number % 2] / f"{number:02}.jpg", seed=number)
    Image.new("CMYK", (64, 48)).save(root / "a" / "00.jpg")
    Image.new("L", (40, 50)).save(root / "b" / "01.jpg")
    Image.new("L", (100, 3)).save(root / "b" / "03.jpg")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (40, 40)).save(root / "b" / "05.jpg", exif=exif)
    (root / "a" / "02.jpg").write_bytes(b"")
    (root / "b" / "49.jpg").write_text("not an image")
    whole = (root / "a" / "48.jpg").read_bytes()
    (root / "a" / "48.jpg").write_bytes(whole[:-100])
    return root


BROKEN = ["a/02.jpg\tit is empty", "a/48.jpg\timage file is truncated", "b/49.jpg\tit is not an image of a known format"]


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str], str]:
    """The exit status, the lines of the result, and the last line on stderr."""
    status = cli.main(["check-data", *options])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()[-1]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_broken_files_are_found_and_unusual_ones_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    bad = tmp_path / "bad.txt"
    status, lines, last = run(capsys, str(folder), "--workers", workers, "--out", str(bad))
    assert status == 1 and lines[0].startswith("check-data: 50 images in ")
    assert [" ".join(line.split()) for line in lines[1:-3]] == [
        "width 24 to 100 pixels", "height 3 to 50 pixels", "tiny 44", "blank 4", "gray 2", "CMYK 1",
        "long 1", "EXIF-rotated 1", "broken 3",
    ]  # fmt: skip
    assert all(line.startswith(expected) for line, expected in zip(lines[-3:], BROKEN, strict=True))
    assert bad.read_text().splitlines() == lines[-3:]
    assert last == f"dino-simpool check-data: error: 3 of 50 images cannot be read ({bad} lists them): repair or remove them"


def test_a_folder_without_broken_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{folder}/a/{number:02}.jpg\n" for number in (0, 4, 6)))
    bad = tmp_path / "bad.txt"
    status, lines, last = run(capsys, "--data", str(tmp_path / "list.txt"), "--workers", "0", "--out", str(bad))
    assert status == 0 and lines[0].startswith("check-data: 3 images") and lines[-1].split() == ["broken", "0"]
    assert bad.read_text() == "" and "100%" in last and "3/3" not in last and "images/s" in last


def test_several_sources_and_a_limit_of_the_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--workers", "0", "--max_pixels", "2000")
    status, lines, last = run(capsys, f"{folder}/a", f"{folder}/b", *options)
    named = run(capsys, "--data", f"[{folder}/a, {folder}/b]", *options)
    assert (named[0], named[1][1:], named[2]) == (status, lines[1:], last)
    assert (
        status == 1
        and f"{folder}/a/00.jpg\tit has more than max_pixels 2,000; raise max_pixels if the file is" in "\n".join(lines)
    )
    assert last.endswith("error: 4 of 50 images cannot be read: repair or remove them")  # 64 x 48 is more, 40 x 50 is not


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--data", str(tmp_path / "none")], "none does not exist"),
        ([], "no images are given"),
        ([str(folder), "--out", str(tmp_path / "no" / "bad.txt")], "its folder does not exist: give another --out"),
    ):
        status, lines, last = run(capsys, *options)
        assert status == 1 and lines == [] and said in last
    for options, said in (
        (["--workers", "-1"], "workers is -1: allowed is 0 to"),
        (["--max_pixels", "0"], "max_pixels is 0: allowed is 1 to"),
    ):
        status, lines, last = run(capsys, str(folder), *options)
        assert status == 2 and lines == [] and said in last


def test_two_processes_share_the_work(folder: Path, tmp_path: Path) -> None:
    command = ["check-data", str(folder), "--workers", "0", "--out", str(tmp_path / "bad.txt")]
    outcomes = run_processes(cli.main, command, environments=group())
    assert [outcome.value for outcome in outcomes] == [1, 1]
    assert all("3 of 50 images cannot be read" in outcome.stderr.splitlines()[-1] for outcome in outcomes)
    assert [line.split("\t")[0] for line in (tmp_path / "bad.txt").read_text().splitlines()] == [
        line.split("\t")[0] for line in BROKEN
    ]


def dies(source: str | bytes, *, decoding: DecodingSettings) -> Examined:
    """A decoder that kills its process."""
    os.kill(os.getpid(), signal.SIGKILL)
    return Examined(1, 1, ())


def test_a_process_that_dies_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_data, "examine", dies)
    with pytest.raises(ValueError, match=r"a process died at an image shortly after a/00\.jpg"):
        check(find_images(str(folder)), workers=1)


def test_parts_of_a_summary_add_up() -> None:
    images: list[Examined | str] = [
        Examined(3, 9, ("tiny",)), "it is empty", Examined(5, 2, ("gray", "tiny")), Examined(4, 4, ()), "gone",
    ]  # fmt: skip
    whole, parts = Summary(), [Summary(), Summary(), Summary()]
    for number, found in enumerate(images):
        whole.add(number, found)
        parts[number % 2].add(number, found)
    merged = Summary()
    for part in parts:
        merged.merge(part)
    assert merged == whole
    assert (whole.readable, whole.widths, whole.heights) == (3, {3, 5}, {2, 9})
    assert whole.kinds == {"tiny": 2, "gray": 1} and whole.broken == {1: "it is empty", 4: "gone"}


def test_a_long_list_is_cut_and_any_name_is_shown() -> None:
    rows = [(f"{number}.jpg", "it is empty") for number in range(22)]
    lines = describe(Summary(broken=dict.fromkeys(range(22), "it is empty")), rows, seconds=2.0).splitlines()
    assert lines[0] == "check-data: 22 images in 2.0 s, 11 images/s" and lines[1].split() == ["broken", "22"]
    assert lines[2:] == [f"{number}.jpg\tit is empty" for number in range(20)] + ["and 2 more: --out FILE lists all"]
    assert describe(Summary(), rows[:20], seconds=2.0).splitlines()[-1] == "19.jpg\tit is empty"  # all of them are shown
    name = b"\xff.jpg".decode("utf-8", "surrogateescape")
    describe(Summary(broken={0: "x"}), [(name, "x")], seconds=1.0).encode("utf-8")


# -- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_that_a_layout_lacks_is_reported(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Miniatures lack images, because they are smaller than the data sets. Nothing is decoded."""
    root = BUILDERS[layout](tmp_path)
    for image in root.rglob("*"):
        if image.suffix.lower() in (".jpg", ".jpeg", ".png"):
            image.write_text("no image")
    expected = check_layout(layout, str(root))
    status, out, err = cli.main(["check-data", str(root), "--layout", layout]), *capsys.readouterr()
    if layout == "folder":  # there is no official number
        assert (status, out) == (0, f"check-data: folder in {root} is complete; no image was decoded\n")
        return
    assert status == 1 and out.splitlines() == expected and all("expected" in line for line in expected)
    count = f"{len(expected)} problem{'s' if len(expected) > 1 else ''}"
    assert err == f"dino-simpool check-data: error: {layout} in {root} is not as published: {count}, see above\n"


def test_a_complete_layout_and_one_without_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = BUILDERS["cub200"](tmp_path)
    miniature = dataclasses.replace(LAYOUTS["cub200"], counts={"queries": 6, "classes": 3})
    monkeypatch.setitem(LAYOUTS, "cub200", miniature)
    assert cli.main(["check-data", str(root), "--layout", "cub200"]) == 0
    assert capsys.readouterr().out == f"check-data: cub200 in {root} is complete; no image was decoded\n"
    (gone,) = (root / "CUB_200_2011" / "images").rglob("Common_Yellowthroat_0001_700.jpg")
    gone.unlink()
    assert cli.main(["check-data", str(root), "--layout", "cub200"]) == 1
    assert capsys.readouterr().out == f"queries: 1 of 6 images that images.txt names are missing, the first {gone}\n"
    assert cli.main(["check-data", str(tmp_path / "none"), "--layout", "cub200"]) == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'none' / 'CUB_200_2011' / 'images.txt'} is missing: get it with the data set\n"
    assert err.endswith("is not as published: 1 problem, see above\n")


def test_layout_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, status, said in (
        ([], 1, "no data is given: give --data DIR, the folder that holds sop"),
        ([str(folder), "--out", "bad.txt"], 2, "lists no broken images: leave out `out`"),
        (["--data", f"[{folder}]"], 2, "give one folder as data"),
    ):
        assert cli.main(["check-data", *options, "--layout", "sop"]) == status
        assert said in capsys.readouterr().err


def test_the_option_names_every_layout() -> None:
    literal, none = get_args(get_type_hints(CheckDataConfig)["layout"])
    assert none is type(None) and set(get_args(literal)) == set(LAYOUTS)
