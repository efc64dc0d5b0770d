"""What goes wrong: numbers that are not finite, OUT/error.txt, and errors of torch in a line."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MISSING_COMPILER = "run.compile needs a C++ compiler, and none is found: install g++, set CXX, or train without run.compile"


class NonFiniteLoss(FloatingPointError):
    """Too many steps in a row had a loss or gradients that are not finite, or a weight is not.

    All processes raise it at once.
    """


class UnequalGradients(FloatingPointError):
    """Two computations of the same gradients differ (run.verify_every). All processes raise it."""


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


def norms_by_module(names: Sequence[str], norms: Sequence[float]) -> dict[str, float]:
    """The L2 norm of the gradient of each module, from the names and norms of its parameters."""
    squares: dict[str, float] = {}
    for name, norm in zip(names, norms, strict=True):
        module = name.rpartition(".")[0]
        squares[module] = squares.get(module, 0.0) + norm * norm
    return {module: math.sqrt(square) for module, square in squares.items()}


def first_difference(ours: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """The first name whose two tensors differ in a bit, None if there is none."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as whole numbers NaN equals itself, and -0 is not 0
    for name, tensor in ours.items():
        kind = kinds[tensor.element_size()]
        if not torch.equal(tensor.view(kind), other[name].view(kind)):
            return name
    return None


def write_failure(path: str | Path, record: dict[str, Any]) -> None:
    """Append a record as one JSON line. Numbers that JSON lacks become "nan", "inf" and "-inf"."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(record), allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Tensors and tuples as lists, non-finite numbers as text, for JSON."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
