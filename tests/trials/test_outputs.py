"""What goes out: names in terminals and lists, damaged and foreign files."""

from __future__ import annotations

import json
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness import Ended, Tool

RUN = Path(__file__).resolve().parents[1] / "release_0_1" / "run"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800-\udfff]")


def refused(ended: Ended, *words: str) -> None:
    """One line that names the file, a status that is no success, and no traceback."""
    lines = [line for line in ended.err.splitlines() if "error:" in line]
    assert ended.status in (1, 2) and len(lines) == 1 and "Traceback" not in ended.text, ended.text
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture
def names(folders: Path, images: Path, tmp_path: Path) -> Path:
    """A folder whose images cannot be read, and have the names of the trials."""
    root = tmp_path / "names"
    root.mkdir()
    for path in (folders / "lists").glob("*.jpg"):
        (root / path.name).write_bytes(b"no image")
    (root / "turned\u202egnp.jpg").write_bytes(b"no image")
    shutil.copy(images / "ref.png", root)
    return root


def test_no_name_reaches_the_terminal_as_it_is(names: Path, tool: Tool, tmp_path: Path) -> None:
    """0.1 printed escape sequences and newlines from names, also into its list of broken files."""
    ended = tool("check-data", "--data", names, "--workers", 0, "--out", tmp_path / "bad.txt")
    listed = (tmp_path / "bad.txt").read_bytes().decode("utf-8", "surrogateescape")
    for text in (ended.text, listed):
        assert not CONTROL.search(text), ascii(text)
    assert len(listed.rstrip("\n").split("\n")) == len(list(names.iterdir())) - 1


def test_a_strict_terminal_shows_names(names: Path, process: Tool) -> None:
    """0.1 ended with UnicodeEncodeError where a message had a name that the terminal lacks."""
    ended = process("extract", "--checkpoint", RUN / "backbone.safetensors", "--data", names / ("山" * 80 + ".jpg"),
                    "--out", names / "out", "--workers", 0, env={"PYTHONIOENCODING": "ascii:strict"})  # fmt: skip
    refused(ended, "u5c71", "cannot be read as an image")


def test_names_of_pictures_fit_into_a_file_system(images: Path, model: Path, tool: Tool, tmp_path: Path) -> None:
    """0.1 cut names to 80 characters, which may be 240 bytes, and then added to them."""
    (tmp_path / "in").mkdir()
    for number in range(11):
        shutil.copy(images / "ref.png", tmp_path / "in" / f"{number:02}{'山' * 80}.png")
    ended = tool("attention", "--checkpoint", model, "--data", tmp_path / "in", "--out", tmp_path / "out", "--workers", 0)
    assert ended.status == 0, ended.text
    assert len(list((tmp_path / "out" / "attention").glob("*.npy"))) == 11
    assert max(len(path.name.encode()) for path in (tmp_path / "out" / "attention").iterdir()) < 200


def test_pictures_of_two_runs_are_not_mixed(images: Path, model: Path, tool: Tool, tmp_path: Path) -> None:
    """0.1 left those of the first among those of the second."""
    options = ("attention", "--checkpoint", model, "--out", tmp_path / "out", "--workers", 0, "--data")
    for name in ("ref.png", "ref_grey.png"):
        (tmp_path / name).mkdir()
        shutil.copy(images / name, tmp_path / name)
    assert tool(*options, tmp_path / "ref.png").status == 0
    assert tool(*options, tmp_path / "ref.png").status == 0
    refused(tool(*options, tmp_path / "ref_grey.png"), "pictures of another run", "give another --out")


def flipped(path: Path, count: int, seed: int = 0) -> None:
    """Change `count` bytes of a file, spread over the middle nine tenths."""
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(count):
        data[draw.randrange(len(data) // 20, len(data) * 19 // 20)] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run of 0.1."""
    return Path(shutil.copytree(RUN, tmp_path / "run"))


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_checkpoint_is_not_evaluated(run: Path, folders: Path, tool: Tool, seed: int) -> None:
    """0.1 evaluated the wrong weights."""
    shutil.copy(RUN.parent / "stopped" / "last.pth", run)
    with zipfile.ZipFile(run / "last.pth") as archive:
        tensors = [member for member in archive.infolist() if "/data/" in member.filename]
        largest = max(tensors, key=lambda member: member.file_size)
    start = largest.header_offset + 200  # beyond its header
    data, draw = bytearray((run / "last.pth").read_bytes()), random.Random(seed)
    for place in draw.sample(range(start, start + largest.file_size - 200), 64):
        data[place] ^= 1  # the last digit of a number
    (run / "last.pth").write_bytes(data)
    ended = tool("knn", "--checkpoint", run / "last.pth", "--data", folders / "leak", "--workers", 0, "--k", "[5]")
    refused(ended, "last.pth cannot be read")


def test_a_damaged_export_is_not_used(images: Path, model: Path, tool: Tool, tmp_path: Path, run: Path) -> None:
    """0.1 used the wrong weights. The undamaged export of 0.1 is used, with a note that it has no checksum."""
    options = ("--data", images / "ref.png", "--workers", 0, "--out")
    ended = tool("extract", "--checkpoint", model, *options, tmp_path / "0.1")
    assert ended.status == 0 and "has no checksum" in ended.err


@pytest.fixture
def index(images: Path, model: Path, tool: Tool, tmp_path: Path) -> Path:
    """A folder that extract --index wrote."""
    (tmp_path / "in").mkdir()
    for name in ("ref.png", "ref_grey.png", "rgb16.tif"):
        shutil.copy(images / name, tmp_path / "in")
    out = tmp_path / "index"
    ended = tool("extract", "--checkpoint", model, "--data", tmp_path / "in", "--out", out, "--index", "--workers", 0)
    assert ended.status == 0, ended.text
    return out


@pytest.mark.parametrize("name", ["features.npy", "ids.txt", "index.faiss"])
def test_a_damaged_index_is_not_searched(index: Path, images: Path, tool: Tool, tmp_path: Path, name: str) -> None:
    """0.1 found wrong neighbors."""
    flipped(index / name, 1)
    refused(tool("search", "--index", index, "--query", images / "ref.png", "--out", tmp_path / "found"), name, "damaged")


def mutations(text: str) -> dict[str, str]:
    """What may be in the place of a JSON file."""
    value = json.loads(text)
    first = {name: value for name, value in value.items() if isinstance(value, dict)}
    nulls = dict.fromkeys(value)
    return {
        "empty": "", "cut": text[: len(text) // 2], "list": "[]", "null": "null", "number": "1", "nothing": "{}",
        "deep": "[" * 100_000, "deep fields": '{"a":' * 100_000, "nulls": json.dumps(nulls),
        "lists": json.dumps({name: [1] for name in value}), "texts": json.dumps(dict.fromkeys(value, "x")),
        "empty fields": json.dumps(value | {name: {} for name in first}), "number of digits": '{"a": ' + "1" * 5000 + "}",
    }  # fmt: skip


KINDS = ("empty", "cut", "list", "null", "number", "nothing", "deep", "deep fields", "nulls", "lists", "texts", "empty fields",
         "number of digits")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_json_is_named(
    run: Path, index: Path, images: Path, tool: Tool, tmp_path: Path, kind: str, folders: Path
) -> None:
    """0.1 ended in about forty tracebacks."""
    calls: dict[Path, Callable[[], Ended]] = {
        run / "model.json": lambda: tool("extract", "--checkpoint", run / "backbone.safetensors", "--data", images / "ref.png",
                                         "--out", tmp_path / "new", "--workers", 0),
        index / "meta.json": lambda: tool("search", "--index", index, "--query", images / "ref.png", "--out", tmp_path / "f"),
        next((run / "results").glob("*.json")): lambda: tool("table", run),
    }  # fmt: skip
    for path, call in calls.items():
        text = path.read_text()
        mutated = mutations(text)[kind]
        path.write_text(mutated)
        if kind != "empty fields" or json.loads(mutated) != json.loads(text):
            refused(call(), path.name)
        path.write_text(text)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"x" * 100, b'{"config": 1}', b"PK\x05\x06" + bytes(18)])
def test_foreign_checkpoints_are_named(folders: Path, tool: Tool, tmp_path: Path, content: bytes) -> None:
    """Also in place of what a run resumes."""
    path = tmp_path / "last.pth"
    path.write_bytes(content)
    refused(tool("knn", "--checkpoint", path, "--data", folders / "leak", "--workers", 0), "last.pth")


def test_checkpoints_with_other_contents_are_named(folders: Path, tool: Tool, tmp_path: Path) -> None:
    """0.1: KeyError: 'config'."""
    import torch

    for state in (
        {"format": 1},
        {"format": 1, "config": [], "step": 1},
        {"format": 1, "config": {"model": 1, "run": 2}},
        [1],
        {},
    ):
        torch.save(state, tmp_path / "last.pth")
        ended = tool("knn", "--checkpoint", tmp_path / "last.pth", "--data", folders / "leak", "--workers", 0)
        refused(ended, "last.pth")


@pytest.mark.parametrize(
    "line", ['{"step": 1}', '{"kind": 1, "step": 2}', "[]", '{"kind": "epoch", "step": 3}', "x", "[" * 9999]
)
def test_foreign_logs_are_named(run: Path, tool: Tool, line: str) -> None:
    """0.1: KeyError: 'kind'."""
    log = run / "log.jsonl"
    log.write_text(f"{line}\n{log.read_text()}")
    refused(tool("report", run), "log.jsonl, line 1")


def test_numbers_of_features_are_counted(index: Path, images: Path, tool: Tool, tmp_path: Path) -> None:
    """Features of another run beside an index."""
    np.save(index / "features.npy", np.zeros((2, 3), np.float32))
    refused(tool("search", "--index", index, "--query", images / "ref.png", "--out", tmp_path / "found"), "features.npy")
