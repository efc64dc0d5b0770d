"""Benchmarks: ways to the same result, measured side by side in one process, and what is shared by them.

Every round runs each way once, so that whatever else the machine does meets all of them; medians over the rounds are compared.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dino_simpool.files import write_atomically
from dino_simpool.logs import say
from dino_simpool.results import versions


def interleave(
    ways: Mapping[str, Callable[[], Any]], *, repetitions: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Wall-clock seconds of each way in each round, and what each returned in the last one."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for number in range(repetitions):
        for name, way in ways.items():
            _synchronize(device)
            started = time.perf_counter()
            results[name] = way()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - started)
            say(f"round {number + 1} of {repetitions}: {name} {seconds[name][-1]:.2f} s")
    return seconds, results


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The middle one of the times of each way."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on: device, threads, load at this moment (of one minute, in processes) and library versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    settings = {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "MKL_", "OPENBLAS_"))}
    return {
        "device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "environment": settings, "versions": versions(),
    }  # fmt: skip


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of left-aligned columns, as wide as they must be; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def write(folder: str, name: str, record: Mapping[str, Any]) -> Path:
    """Write <folder>/<name>.json, in a folder that is there, and return its path."""
    path = Path(folder) / f"{name}.json"
    write_atomically(path, lambda file: file.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n"))
    return path


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    """The name of the processor, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "cpu")
