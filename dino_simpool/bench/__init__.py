"""Benchmarks: methods with the same result, measured side by side in one process, and what the
benchmarks share.

Every round runs each method once, so that other load on the machine affects all of them alike.
Medians over the rounds are compared.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dino_simpool import distributed
from dino_simpool.files import write_json
from dino_simpool.logs import say
from dino_simpool.results import results_folder, versions


def run(
    name: str, cfg: Any, out: str, measure: Callable[[torch.device], dict[str, Any]], describe: Callable[[dict[str, Any]], str]
) -> None:
    """Measure on the device, write the record to out/<name>.json, and print its description."""
    device = distributed.setup(cfg.device)
    path = results_folder(out, "") / f"{name}.json"  # fails before the measurements if it cannot write there
    record = {"benchmark": name, "config": dataclasses.asdict(cfg), "machine": machine(device)} | measure(device)
    write_json(path, record)
    print(f"{describe(record)}\nwritten to {path}")


def interleave(
    ways: Mapping[str, Callable[[], Any]], *, repetitions: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Wall-clock seconds of each method per round, and what each returned in the last round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for number in range(repetitions):
        for name, way in ways.items():
            synchronize(device)
            started = time.perf_counter()
            results[name] = way()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
            say(f"round {number + 1} of {repetitions}: {name} {seconds[name][-1]:.2f} s")
    return seconds, results


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median time of each method."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on. `load` is the one-minute average, in processes, None on Windows."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "MKL_", "OPENBLAS_"))},
        "versions": versions(),
    }


def synchronize(device: torch.device) -> None:
    """Wait for the work that is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    """The processor's name on Linux, elsewhere `cpu`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "cpu")
