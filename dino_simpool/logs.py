"""The log of a run (log.jsonl and TensorBoard), and console output: lines and progress bars.

log.jsonl holds one JSON object per line. Each has a "kind" and the "step" (number of optimizer
steps) at which it was written. Lines of kind "epoch" also have the zero-based "epoch" that ended,
and use the field names of the published SimPool training, which existing tools read: train_loss,
train_entropy, train_KL_div, train_lr, train_wd, "k-NN": {"10": {"top1": ..., "top5": ...}}
(and here "balanced", the mean over the classes). Kind "skipped" is a step that was left out, with
the "files" of its images; "restored" says that the run went back to this step after "bad_steps".

A resumed run starts at the step of its checkpoint, so later lines are dropped first. The lines of a
step are written before the checkpoint of that step, so the file equals that of an uninterrupted run
(after removing TIMING_FIELDS).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dino_simpool import distributed
from dino_simpool.files import NUMBER, Fields, full_disk_named, require_fields, write_atomically
from dino_simpool.names import shown_lines

STEP_TIMES = {"images_per_second", "data_wait_percent", "max_memory_mb", "seconds", "time"}
TIMING_FIELDS = frozenset(STEP_TIMES | {"img_per_s", "data_time", "knn_time", "max_mem"})
"""Fields of log.jsonl that differ between two otherwise equal runs."""


class RunLog:
    """Writes OUT/log.jsonl and OUT/tensorboard.

    resume_step: optimizer steps of the checkpoint; 0 starts an empty log.   resume_epoch: number of
    epochs whose lines are kept.   enabled: False on all but the main process, the only one that
    writes.   ValueError if an old line is broken.
    """

    def __init__(
        self, out: str | Path, *, resume_step: int = 0, resume_epoch: int = 0, tensorboard: bool = True, enabled: bool = True
    ) -> None:
        self._file = self._tensorboard = None
        if not enabled:
            return
        path = Path(out) / "log.jsonl"
        self._events = path.parent / "tensorboard"
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(path, step=resume_step, epoch=resume_epoch)
        self._file = open(path, "ab")  # noqa: SIM115 (open until close())
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and most processes do not need it

            purge = resume_step + 1 if resume_step else 0  # hides what an interrupted run wrote after its checkpoint
            with full_disk_named(self._events):
                self._tensorboard = SummaryWriter(str(self._events), purge_step=purge)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line, and send its numbers to TensorBoard as kind/name.

        record: plain values, including "kind" and "step". NaN and infinity become null.
        """
        if self._file is None:
            return
        line = json.dumps(_finite({"kind": record["kind"], "step": record["step"]} | record), allow_nan=False)
        with full_disk_named(Path(self._file.name)):
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # a checkpoint on disk must never be ahead of the log
        if self._tensorboard is not None:
            with full_disk_named(self._events):  # an error of its thread is raised at the next event
                for name, value in _numbers(record):
                    self._tensorboard.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def image(self, tag: str, image: Any, step: int) -> None:
        """Send an image to TensorBoard: (3, H, W) array or tensor, uint8, or float in 0..1."""
        if self._tensorboard is not None:
            with full_disk_named(self._events):
                self._tensorboard.add_image(tag, image, step)

    def close(self) -> None:
        """Close both files. A new RunLog may open them again."""
        if self._tensorboard is not None:
            with full_disk_named(self._events):
                self._tensorboard.flush()  # raises what its thread could not write
                self._tensorboard.close()
        if self._file is not None:
            self._file.close()
        self._file = self._tensorboard = None


@contextlib.contextmanager
def writer_errors_raised_once() -> Iterator[None]:
    """No traceback of TensorBoard's thread while a log is open: RunLog raises its error."""
    before = threading.excepthook

    def failed(of_thread: threading.ExceptHookArgs) -> None:
        if type(of_thread.thread).__name__ != "_AsyncWriterThread" or os.environ.get("DINO_SIMPOOL_TRACEBACK"):
            before(of_thread)

    threading.excepthook = failed
    try:
        yield
    finally:
        threading.excepthook = before


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl. A last line that a crash left incomplete is skipped.

    ValueError if any other line is not a JSON object with a kind and a step.
    """
    return [record for _, record in _lines(Path(path))]


def say(text: str) -> None:
    """Print a line on stderr, on the main process only and without breaking a progress bar."""
    if distributed.is_main():
        tqdm.write(shown_lines(text), file=sys.stderr)


def text_table(rows: Sequence[Sequence[str]], *, rule: bool = False) -> str:
    """Lines of left-aligned columns, each as wide as its longest cell.

    rule: draw a line under the first row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if rule:
        lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(lines)


def progress(
    total: int | None, initial: int, desc: str, *, images_per_step: int | None = None, shown: bool | None = None
) -> tqdm[Any]:
    """A progress bar with images/s and the time left. In a file it prints a line now and then.

    total: None if it is unknown.   initial: done before this start; not counted for the speed.
    images_per_step: the bar counts steps of this many images, and stays. None: it counts images,
    appears only if the work takes a while, and disappears at the end.
    shown: whether this process shows the bar. None: only the main process does.
    """
    terminal, steps = sys.stderr.isatty(), images_per_step is not None
    interval = (0.2 if steps else 0.5) if terminal else (10.0 if steps else 30.0)
    counted = f"{{percentage:3.0f}}% |{{bar:20}}| {{n_fmt}}/{{total_fmt}} {'steps' if steps else 'images'}, {{remaining}} left"
    return _Bar(
        total=total,
        initial=initial,
        desc=desc,
        images_per_step=images_per_step or 1,
        redraws=terminal,
        disable=not (distributed.is_main() if shown is None else shown),
        file=sys.stderr if terminal else _Lines(),
        delay=0 if steps else interval,
        mininterval=interval,
        maxinterval=max(interval, 10.0),
        leave=steps,
        dynamic_ncols=terminal,
        bar_format=f"{{desc}}: {counted if total is not None else '{n_fmt} images'}, {{images_rate}}{{postfix}}",
    )


class _Bar(tqdm):
    """A tqdm bar whose format may contain images_rate.

    In a file, where every drawing is a line, a new text does not make it draw.
    """

    def __init__(self, *, images_per_step: int, redraws: bool, **options: Any):
        self.images_per_step, self.redraws = images_per_step, redraws  # before the first drawing, in super()
        super().__init__(**options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """The fields of bar_format: those of tqdm, and images_rate."""
        fields: dict[str, Any] = dict(super().format_dict)
        done, elapsed = fields["n"] - fields["initial"], fields["elapsed"]
        rate = fields["rate"] or (done / elapsed if elapsed else 0)
        return fields | {"images_rate": f"{rate * self.images_per_step:.0f} images/s"}

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set the text at the end of the line, after a comma."""
        super().set_postfix_str(s, refresh and self.redraws)


class _Lines:
    """Writes a bar to stderr as separate lines, without carriage returns."""

    def write(self, text: str) -> None:
        line = text.replace("\r", "").strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _truncate(path: Path, *, step: int, epoch: int) -> None:
    """Drop the lines after the resumed step (all lines for step 0), atomically."""
    if not path.exists():
        return
    kept = [
        line
        for line, record in _lines(path)
        if step and record["step"] <= step and (record["kind"] != "epoch" or record["epoch"] < epoch)
    ]
    write_atomically(path, lambda file: file.write_bytes(b"".join(line + b"\n" for line in kept)))


_RECORD: Fields = {
    "kind": str, "step": int, "epoch?": int, "k-NN?.10.top1": NUMBER, "data_wait_percent?": NUMBER, "seconds?": NUMBER,
    "loss_over_lnK?": NUMBER,
}  # fmt: skip


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines with their records, without a last line that a dying process left incomplete."""
    lines = path.read_bytes().splitlines()
    for i, line in enumerate(lines):
        where = f"{path}, line {i + 1}"
        try:
            record = require_fields(json.loads(line), _RECORD, path=where, what="a record", remedy="repair or remove this line")
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            if i == len(lines) - 1:
                return
            raise ValueError(f"{where}: not a JSON object. Repair or remove this line") from None
        if record["kind"] == "epoch" and "epoch" not in record:
            raise ValueError(f"{path}, line {i + 1}: a line of kind epoch without epoch. Repair or remove this line")
        yield line, record


def _finite(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a record with their names; nested names are outer/inner."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and name != "step":
            yield prefix + name, value
