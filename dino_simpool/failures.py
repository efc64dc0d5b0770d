"""What goes wrong: numbers that are not finite, OUT/error.txt, and errors of torch in a line."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MISSING_COMPILER = "run.compile needs a C++ compiler, and none is found: install g++, set CXX, or train without run.compile"


class NonFiniteLoss(FloatingPointError):
    """The loss (before the optimizer's step) or a weight (when saving) is not finite.

    All processes raise it at once.
    """


def in_a_line(error: BaseException) -> str | None:
    """What an error of torch means and what to do; None for one that is not known.

    For memory that runs out, other processes that end or do not answer, a port in use, a dead
    loader process, and a missing compiler. None of these has a class of its own everywhere.
    """
    said = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator: " in said:
        return (
            "out of memory: give a smaller batch size (in training: more run.accumulate, which keeps run.batch_size), "
            f"or a shorter precision ({said.splitlines()[0] if said else 'MemoryError'})"
        )
    if "EADDRINUSE" in said or "address already in use" in said.lower():
        return f"port {os.environ.get('MASTER_PORT')} is in use, perhaps by another run: set MASTER_PORT to a free one"
    if isinstance(error, RuntimeError) and re.search(r"Timed out waiting|timed? ?out after|wait timeout", said, re.IGNORECASE):
        return (
            "another process did not answer in time: it hangs, or its machine is gone. To resume, run the same command again "
            "on all; DINO_SIMPOOL_TIMEOUT=SECONDS sets how long to wait (600)"
        )
    if isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset|refused)|Broken pipe|recvValue failed", said):
        return "another process ended: its own error line, or error.txt in the folder of the run, says why"
    if "DataLoader worker" in said:  # raised anywhere in this process when the system has killed a loader process
        return (
            "a loader process died; out of memory, or too little shared memory (docker run --shm-size): give fewer workers. "
            "To resume training, run the same command again"
        )
    if "C++ compiler" in said or type(error).__name__ == "InvalidCxxCompiler":
        return MISSING_COMPILER
    return None


def non_finite_names(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters with infinite or NaN values, and of those with such gradients."""
    named = list(model.named_parameters())
    return {
        "parameters": [name for name, p in named if not p.isfinite().all()],
        "gradients": [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()],
    }


def write_failure(path: str | Path, record: dict[str, Any]) -> None:
    """Append a record as one JSON line. Numbers that JSON lacks become "nan", "inf" and "-inf"."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(_plain(record), allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Tensors and tuples as lists, non-finite numbers as text."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
