"""log.jsonl after any crash and resume, TensorBoard, and what the console shows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from dino_simpool import logs
from dino_simpool.logs import TIMING_FIELDS, RunLog, read_log, text_table


def run(out, *, start: int = 0, stop: int, per_epoch: int = 4) -> None:
    """Like a trainer: a line every second step and one per epoch, before the checkpoint of that
    step."""
    log = RunLog(out, resume_step=start, resume_epoch=start // per_epoch, tensorboard=False)
    for step in range(start + 1, stop + 1):
        if step % 2 == 0:
            log.write({"kind": "step", "step": step, "loss": 1 / step, "seconds": start + 0.5})
        if step % per_epoch == 0:
            log.write(
                {
                    "kind": "epoch",
                    "epoch": step // per_epoch - 1,
                    "step": step,
                    "k-NN": {"10": {"top1": step / 7}},
                    "img_per_s": start,
                }
            )
    log.close()


def without_timing(path) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMING_FIELDS} for record in read_log(path)]


@pytest.mark.parametrize("checkpoint", range(13))
@pytest.mark.parametrize("died_after", [0, 1, 3, 5])
def test_resumed_log_equals_the_uninterrupted_one(tmp_path, checkpoint, died_after):
    run(tmp_path / "whole", stop=12)
    run(tmp_path / "halves", stop=min(12, checkpoint + died_after))
    run(tmp_path / "halves", start=checkpoint, stop=12)
    assert without_timing(tmp_path / "halves/log.jsonl") == without_timing(tmp_path / "whole/log.jsonl")
    assert len(read_log(tmp_path / "whole/log.jsonl")) == 9
    assert os.listdir(tmp_path / "halves") == ["log.jsonl"]  # nothing temporary is left


def test_epoch_line_of_an_unfinished_epoch_is_dropped(tmp_path):
    run(tmp_path, stop=4)
    RunLog(
        tmp_path, resume_step=4, resume_epoch=0, tensorboard=False
    ).close()  # saved after step 4, before the epoch was closed
    assert [record["kind"] for record in read_log(tmp_path / "log.jsonl")] == ["step", "step"]


@pytest.mark.parametrize("cut", range(1, 40))
def test_torn_last_line_is_dropped(tmp_path, cut):
    run(tmp_path, stop=6)
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    before = whole.splitlines(keepends=True)
    kept = len(before) if cut == 1 else len(before) - 1  # only its newline is missing: the line is complete
    assert len(read_log(path)) == kept
    run(tmp_path, start=4, stop=6)
    assert without_timing(path)[-1] == {"kind": "step", "step": 6, "loss": 1 / 6}
    assert len(read_log(path)) == len(before)


def test_broken_line_inside_is_an_error_and_the_file_stays(tmp_path):
    path = tmp_path / "log.jsonl"
    text = '{"kind": "step", "step": 1}\n{"kind": \n{"kind": "step", "step": 2}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match="line 2"):
        read_log(path)
    with pytest.raises(ValueError, match="line 2"):
        RunLog(tmp_path, resume_step=2, tensorboard=False)
    assert path.read_text() == text
    path.write_text('3\n{"kind": "step", "step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_log(path)


def test_empty_log(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    assert read_log(tmp_path / "log.jsonl") == []
    RunLog(tmp_path, resume_step=3, tensorboard=False).close()
    assert read_log(tmp_path / "log.jsonl") == []


def test_truncation_is_all_or_nothing(tmp_path, monkeypatch):
    run(tmp_path, stop=8)
    before = (tmp_path / "log.jsonl").read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(logs.os, "fsync", crash)  # dies while the shortened file is being written
    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path, resume_step=4, resume_epoch=1, tensorboard=False)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_lines_are_strict_json_and_exact(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.write(
        {
            "loss": math.nan,
            "nested": {"values": (1.5, math.inf, None), "third": 1 / 3},
            "step": 7,
            "kind": "step",
            "text": "ü\n",
        }
    )
    line = (tmp_path / "log.jsonl").read_text()  # before close: every line is flushed
    log.close()

    def refuse(name):
        raise AssertionError(name)

    record = json.loads(line, parse_constant=refuse)
    expected = {"kind": "step", "step": 7, "loss": None, "nested": {"values": [1.5, None, None], "third": 1 / 3}, "text": "ü\n"}
    assert record == expected and list(record)[:2] == ["kind", "step"] and line.count("\n") == 1


def test_a_disabled_log_writes_nothing(tmp_path):
    log = RunLog(tmp_path / "none", enabled=False)
    log.write({"kind": "step", "step": 1, "loss": 2.0})
    log.image("crops", np.zeros((3, 4, 4), np.uint8), 1)
    log.close()
    assert not (tmp_path / "none").exists()


def test_tensorboard_shows_every_number_once_after_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, range(1, 7)), (4, range(5, 9))):  # two steps were done after the checkpoint
        log = RunLog(tmp_path, resume_step=start, resume_epoch=0)
        for step in steps:
            log.write({"kind": "step", "step": step, "loss": step + start, "bad": math.nan, "k-NN": {"10": {"top1": 50.0}}})
        log.image("crops", np.full((3, 4, 4), 255, np.uint8), 8)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"step/loss", "step/k-NN/10/top1"} and events.Tags()["images"] == ["crops"]
    shown = [(event.step, event.value) for event in events.Scalars("step/loss")]
    assert shown == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 9), (6, 10), (7, 11), (8, 12)]


SHOW = """
from dino_simpool.logs import progress, say
bar = progress(100, 40, "train", images_per_step=32)
for _ in range(60):
    bar.update(1)
    bar.set_postfix_str("data wait 3 %")
say("epoch 1 done")
bar.close()
"""


def test_console_of_the_main_process_is_lines_of_plain_text():
    shown = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert shown.stdout == "" and "\r" not in shown.stderr
    lines = shown.stderr.splitlines()
    assert "epoch 1 done" in lines
    assert any(line.startswith("train:  40%") for line in lines)
    assert any("100/100 steps" in line and "images/s, data wait 3 %" in line for line in lines)
    assert len(lines) <= 5  # one every 10 seconds, not one for each new text


def test_console_of_other_processes_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(logs.distributed, "is_main", lambda: False)
    bar = logs.progress(10, 0, "train")
    bar.update(10)
    bar.close()
    logs.say("hidden")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_rate_counts_images_of_this_start_only(monkeypatch):
    bar = logs.progress(100, 40, "train", images_per_step=32)
    bar.update(10)
    monkeypatch.setattr(bar, "_time", lambda: bar.start_t + 5)
    bar._ema_dt._last, bar._ema_dt.calls = 0, 0  # no smoothed rate yet: the mean of this start counts
    assert bar.format_dict["images_rate"] == "64 images/s"  # 10 steps of 32 images in 5 s
    bar.close()


def test_seconds_between_the_lines_of_a_bar(monkeypatch):
    """In a file 10 for steps and 30 for images, of which a bar of images waits for the first; on a terminal it moves."""
    for terminal, steps, images in ((False, 10, 30), (True, 0.2, 0.5)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        with logs.progress(4, 0, "x", images_per_step=2) as bar, logs.progress(4, 0, "x") as other:
            assert (bar.mininterval, bar.delay) == (steps, 0) and (other.mininterval, other.delay) == (images, images)


def test_text_table():
    rows = [["way", "s", ""], ["longer", "10.0", "x"], ["", "", ""]]
    assert text_table(rows) == "way     s\nlonger  10.0  x\n"
    assert text_table(rows[:2], rule=True) == "way     s\n---------------\nlonger  10.0  x"
    assert text_table([("a",)]) == "a"
    with pytest.raises(ValueError):
        text_table([["a", "b"], ["a"]])


IMAGES = """
import sys, time
from dino_simpool.logs import progress
for name, total, wait in (("short", 10, 0), ("features", 10, 1), ("listing x", None, 1)):
    with progress(total, 4, name) as bar:
        bar.start_t -= 40 * wait
        bar.last_print_t -= 40 * wait
        bar.update(2)
with progress(5, 0, "asked for", shown=True) as bar:
    assert not bar.disable
with progress(5, 0, "not wanted", shown=False) as bar:
    assert bar.disable
"""


def test_bars_of_images_are_lines_in_a_file_only_if_the_work_takes_long():
    shown = subprocess.run([sys.executable, "-c", IMAGES], capture_output=True, text=True, check=True)
    assert shown.stdout == "" and "\r" not in shown.stderr and "short" not in shown.stderr
    known, unknown = shown.stderr.splitlines()
    assert known.startswith("features:  60% |") and "| 6/10 images, " in known and known.endswith(" left, 0 images/s")
    assert unknown == "listing x: 6 images, 0 images/s"
