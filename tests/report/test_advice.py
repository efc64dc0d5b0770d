"""The commands that a report advises work as they stand, on its data."""

from __future__ import annotations

import html
import re
import shlex
import shutil
from pathlib import Path

import pytest

from dino_simpool import cli
from dino_simpool.synthetic import write_dataset

RUN = Path(__file__).parents[1] / "release_0_1" / "run"


def advised(out: Path) -> list[list[str]]:
    """Arguments of every command on the page that has no placeholder."""
    text = html.unescape((out / "report.html").read_text())
    commands = re.findall(r"dino-simpool ((?:knn|linear|masks|report) [^<\n]*)", text)
    return [shlex.split(command) for command in commands if "DIR" not in command]


def test_advised_commands_work_on_that_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with spaces. Each command adds a result, until there is none to advise; of linear, one epoch is run."""
    out, data = tmp_path / "my run", tmp_path / "my data"
    shutil.copytree(RUN, out)
    shutil.rmtree(out / "results", ignore_errors=True)
    write_dataset(data, classes=2, train_per_class=6, val_per_class=3)
    rounds = []
    for _ in range(3):
        assert cli.main(["report", str(out), "--data", str(data), "--device", "cpu"]) == 0
        commands = advised(out)
        rounds.append([command[0] for command in commands])
        for command in commands:
            more = ["--epochs", "1"] if command[0] == "linear" else ["--k", "[3]"] if command[0] == "knn" else []
            assert cli.main([*command, "--device", "cpu", "--workers", "0", *more]) == 0, command
        capsys.readouterr()
    assert rounds == [["knn", "linear", "masks"], ["knn", "masks", "knn"], []]


def test_what_the_data_cannot_give_is_not_advised(tmp_path: Path) -> None:
    out, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(RUN, out)
    shutil.rmtree(out / "results", ignore_errors=True)
    write_dataset(tmp_path / "all", classes=2, train_per_class=2, val_per_class=2)
    shutil.copytree(tmp_path / "all" / "val", data / "val")
    assert cli.main(["report", str(out), "--data", str(data), "--device", "cpu"]) == 0
    text = html.unescape((out / "report.html").read_text())
    assert advised(out) == [] and f"it needs train in {data}" in text and f"it needs masks/val in {data}" in text
