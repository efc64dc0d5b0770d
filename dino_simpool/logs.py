"""What a run tells while it goes: log.jsonl, TensorBoard, lines and a progress bar on the console. One writer for all of them.

log.jsonl holds one JSON object per line. Each has a "kind" and the "step" (optimiser steps done) it was written at; lines of
kind "epoch" also carry the zero-based "epoch" that ended, and use the field names of the published SimPool training, which
existing tools read: train_loss, train_entropy, train_KL_div, train_lr, train_wd, "k-NN": {"10": {"top1": ..., "top5": ...}}.

A resumed run goes back to the step of its checkpoint, so the lines beyond it are dropped first. For the file to equal that of
an uninterrupted run (after removing TIMING_FIELDS), the lines of a step are written before the checkpoint of that step.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dino_simpool import distributed

TIMING_FIELDS: frozenset[str] = frozenset(
    {
        "images_per_second",
        "data_wait_percent",
        "max_memory_mb",
        "seconds",
        "time",
        "img_per_s",
        "data_time",
        "knn_time",
        "max_mem",
    }
)
"""Fields of log.jsonl that differ between two runs that are equal otherwise."""


class RunLog:
    """Writes OUT/log.jsonl and OUT/tensorboard.

    resume_step: optimiser steps done when the run goes on; 0 starts an empty log.   resume_epoch: epochs whose line belongs to
    the log then.   enabled: False on all but the main process, which alone writes.   ValueError if an old line is broken.
    """

    def __init__(
        self, out: str | Path, *, resume_step: int = 0, resume_epoch: int = 0, tensorboard: bool = True, enabled: bool = True
    ) -> None:
        self._file = self._tensorboard = None
        if not enabled:
            return
        path = Path(out) / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(path, step=resume_step, epoch=resume_epoch)
        self._file = open(path, "ab")  # noqa: SIM115 (open until close())
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # lazy: a second of import that most processes never need

            purge = resume_step + 1 if resume_step else 0  # hides what an interrupted run wrote beyond its checkpoint
            self._tensorboard = SummaryWriter(str(path.parent / "tensorboard"), purge_step=purge)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line (NaN and infinities as null) and show its numbers in TensorBoard as kind/name.

        record: plain values, with "kind" and "step" at least.
        """
        if self._file is None:
            return
        line = json.dumps(_finite({"kind": record["kind"], "step": record["step"]} | record), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint on the disk must never be ahead of the log
        if self._tensorboard is not None:
            for name, value in _numbers(record):
                self._tensorboard.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def image(self, tag: str, image: Any, step: int) -> None:
        """Show an image in TensorBoard: (3, H, W) array or tensor, uint8, or float in 0..1."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(tag, image, step)

    def close(self) -> None:
        """End both files; the log may be opened again by a new RunLog."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._file is not None:
            self._file.close()
        self._file = self._tensorboard = None


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line that a crash left incomplete is not one.

    ValueError if another line is not a JSON object.
    """
    return [record for _, record in _lines(Path(path))]


def say(text: str) -> None:
    """Print a line on stderr, on the main process only and without tearing the progress bar."""
    if distributed.is_main():
        tqdm.write(text, file=sys.stderr)


def text_table(rows: Sequence[Sequence[str]], *, rule: bool = False) -> str:
    """Lines of left-aligned columns, each as wide as its longest cell. rule: draw a line under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if rule:
        lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(lines)


def progress(total: int, initial: int, desc: str, *, images_per_step: int = 1) -> tqdm[Any]:
    """A bar over steps with the time left and images/s; silent except on the main process.

    On a terminal it redraws in place; in a file it is a line every 10 seconds or more.
    """
    terminal = sys.stderr.isatty()
    return _Bar(
        total=total,
        initial=initial,
        desc=desc,
        images_per_step=images_per_step,
        redraws=terminal,
        disable=not distributed.is_main(),
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.2 if terminal else 10.0,
        maxinterval=10.0,
        dynamic_ncols=terminal,
        bar_format="{desc}: {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} steps, {remaining} left, {images_rate}{postfix}",
    )


class _Bar(tqdm):
    """A tqdm bar whose format may name images_rate, and that draws on its own time only where each drawing stays."""

    def __init__(self, *, images_per_step: int, redraws: bool, **options: Any):
        self.images_per_step, self.redraws = images_per_step, redraws  # before the first drawing, which super() does
        super().__init__(**options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """The fields of bar_format: those of tqdm and images_rate."""
        fields: dict[str, Any] = dict(super().format_dict)
        done, elapsed = fields["n"] - fields["initial"], fields["elapsed"]
        rate = fields["rate"] or (done / elapsed if elapsed else 0)
        return fields | {"images_rate": f"{rate * self.images_per_step:.0f} images/s"}

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set the text at the end of the line; tqdm puts a comma before it."""
        super().set_postfix_str(s, refresh and self.redraws)


class _Lines:
    """stderr for a bar when it is a file: new lines in place of returns to the start of the line."""

    def write(self, text: str) -> None:
        line = text.replace("\r", "").strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _truncate(path: Path, *, step: int, epoch: int) -> None:
    """Drop the lines beyond the resumed step (all for step 0), all at once or not at all."""
    if not path.exists():
        return
    kept = [
        line
        for line, record in _lines(path)
        if step and record["step"] <= step and (record["kind"] != "epoch" or record["epoch"] < epoch)
    ]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines with their records, without a last line that is incomplete because the process died while writing it."""
    lines = path.read_bytes().splitlines()
    for i, line in enumerate(lines):
        record = _parse(line)
        if record is not None:
            yield line, record
        elif i < len(lines) - 1:
            raise ValueError(f"{path}, line {i + 1}: not a JSON object. Repair or remove this line")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _finite(value: Any) -> Any:
    """The value with null for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a record with their names, nested ones as outer/inner."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and name != "step":
            yield prefix + name, value
