"""Non-finite numbers: the error that stops a run, and what OUT/error.txt says about it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class NonFiniteLoss(FloatingPointError):
    """The loss (before the optimizer's step) or a weight (when saving) is not finite.

    All processes raise it at once.
    """


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
