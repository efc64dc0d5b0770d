"""What is written when a run has to stop, and what is said of errors of torch."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dino_simpool.failures import first_difference, in_a_line, non_finite_names, norms_by_module, write_failure


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


def test_norms_of_a_module_are_those_of_its_parameters_together() -> None:
    names = ["head.fc1.weight", "encoder.norm.weight", "head.fc1.bias", "scale"]
    found = norms_by_module(names, [3.0, math.inf, 4.0, 2.0])
    assert found == {"head.fc1": 5.0, "encoder.norm": math.inf, "": 2.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_first_difference_is_one_of_bits(dtype: torch.dtype) -> None:
    """In any memory format; NaN equals itself, and -0 differs from 0."""
    image = torch.randn(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    ours = {"a": torch.tensor([math.nan, 0.0], dtype=dtype), "b": image, "c": torch.ones((), dtype=dtype)}
    other = {name: tensor.clone() for name, tensor in ours.items()}
    assert first_difference(ours, other) is None
    other["c"] -= torch.finfo(dtype).eps
    assert first_difference(ours, other) == "c"
    other["b"][1, 2, 3, 4] *= 1 + torch.finfo(dtype).eps
    assert first_difference(ours, other) == "b"
    other["a"][1] = -0.0
    assert first_difference(ours, other) == "a"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            "out of memory: give a smaller batch size",
        ),
        (MemoryError(), "out of memory: give a smaller batch size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (
            RuntimeError("The server socket has failed to listen on any local network address. EADDRINUSE"),
            "port 29511 is in use",
        ),
        (RuntimeError("[gloo/transport] Timed out waiting 10000ms for recv operation"), "did not answer in time: it hangs"),
        (RuntimeError("[gloo/transport] Connection closed by peer [127.0.0.1]:4"), "another process ended"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a loader process died"),
        (RuntimeError("No working C++ compiler found in torch._inductor"), "install g\\+\\+"),
    ],
)
def test_known_errors_of_torch_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    monkeypatch.setenv("MASTER_PORT", "29511")
    said = in_a_line(error)
    assert said is not None and re.search(line, said) and "\n" not in said


def test_mistakes_of_ours_are_not_explained_away() -> None:
    for error in (RuntimeError("shapes (3, 4) and (5,) do not match"), KeyError("step"), TypeError("timed out")):
        assert in_a_line(error) is None
