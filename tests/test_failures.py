"""What is written when a run has to stop because a number is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dino_simpool.failures import non_finite_names, write_failure


def test_failure_is_written_as_json(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias.data[0] = math.nan
    model[1].weight.grad = torch.full((2, 2), math.inf)
    names = non_finite_names(model)
    assert names == {"parameters": ["0.bias"], "gradients": ["1.weight"]}
    path = tmp_path / "error.txt"
    record = {"step": 7, "loss": math.nan, "schedules": {"lr": 0.1}, "images": torch.tensor([3, 1]), "last": [1.0, -math.inf]}
    write_failure(path, record | names)
    write_failure(path, {"step": 8})
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())
    assert first == {
        "step": 7, "loss": "nan", "schedules": {"lr": 0.1}, "images": [3, 1], "last": [1.0, "-inf"],
        "parameters": ["0.bias"], "gradients": ["1.weight"],
    }  # fmt: skip
    assert second == {"step": 8}
