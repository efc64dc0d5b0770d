"""Files of others through `load_encoder`: the published numbers from files on disk, and damage is named."""

from __future__ import annotations

import argparse
import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden.load import GOLDEN_POSITIONS, assert_close, load, meta, sub
from test_model_golden import PRECISIONS, check_gradients, close, tensors
from torch import Tensor, nn

from dino_simpool.checkpoint import load_encoder

CLASSIFIER = ("fc.", "head.")


def published(state: dict[str, Tensor], *, prefix: str = "", **args: Any) -> dict[str, Any]:
    """What main_dino.py saves. prefix: `module.` of the teacher, which it has with BatchNorm."""
    backbone = {f"backbone.{name}": value for name, value in state.items()}
    head = {"head.mlp.0.weight": torch.zeros(4, 2), "head.mlp.0.bias": torch.zeros(4)}
    options = argparse.Namespace(gamma=2.0, epochs=100, patch_size=16, output_dir=pathlib.PosixPath("out"))
    vars(options).update(args)
    return {
        "student": {f"module.{name}": value * 0 for name, value in (backbone | head).items()},
        "teacher": {prefix + name: value for name, value in (backbone | head).items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-3), "weight_decay": np.float64(0.04), "params": [0]}]},
        "epoch": 99,
        "args": options,
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


def golden_vit(mode: str) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    golden = sub(load(f"open_vit_{mode}"), "vit")
    return golden, tensors(sub(golden, "param"), torch.float32)


def golden_cnn(name: str, mode: str) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    arrays = load(f"open_{name}_tiny")
    state = tensors(sub(arrays, "simpool/param"), torch.float32)
    return arrays, {key: value for key, value in state.items() if mode == "simpool" or not key.startswith("simpool.")}


@pytest.mark.parametrize("mode", ["simpool", "official"])
def test_vit(mode: str, tmp_path: Path) -> None:
    golden, state = golden_vit(mode)
    torch.save(published(state), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"does not say heads .*48 is no multiple of 64\): give heads=3"):
        load_encoder(tmp_path / "checkpoint.pth")
    for precision, dtype in PRECISIONS.items():
        tolerance = {"rtol": 1e-4, "atol": 5e-5}
        options: dict[str, Any] = {"heads": 3, "pos_interp": GOLDEN_POSITIONS[mode]}
        encoder = load_encoder(tmp_path / "checkpoint.pth", **options, min_over="batch").to(dtype)
        per_image = load_encoder(tmp_path / "checkpoint.pth", **options).to(dtype)
        assert encoder.config.min_over == "batch" and per_image.config.min_over == "image"
        assert encoder.config.gamma == (1.25 if mode == "simpool" else None)  # and not 2.0, as its arguments say
        assert encoder.epochs == 99 and encoder.total_epochs == 100 and not encoder.training
        for size in ("224x224", "96x96", "96x160"):
            x = torch.from_numpy(golden[f"in/x_{size}"]).to(dtype)
            close(encoder(x), golden, f"y_{size}", precision, **tolerance)
            if mode == "simpool":
                close(encoder.attention(x).flatten(1), golden, f"attn_{size}", precision, **tolerance)
                close(per_image(x), golden, f"y_per_image_{size}", precision, **tolerance)
        x = torch.from_numpy(golden["in/x_96x96"]).to(dtype).requires_grad_()
        encoder(x).backward(torch.from_numpy(golden["in/g"]).to(dtype))
        assert x.grad is not None
        assert_close(x.grad.abs().sum((1, 2, 3)), golden["grad/x_abs_sum"], rtol=1e-3)
        gradients = sum(key.startswith("grad/") for key in golden) - 1
        assert check_gradients(encoder, golden, precision, rtol=1e-3, noise=1e-5) == gradients
    plain = load_encoder(tmp_path / "checkpoint.pth", heads=3)
    assert plain.config.pos_interp == "dino" and plain.config.norm_order == "pool_then_norm"
    native = plain.trunk.patch_embed.grid_size
    assert torch.equal(plain._positions(plain.trunk.pos_embed[0, -196:], native), plain.trunk.pos_embed[0, -196:])


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("mode", ["simpool", "official"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext"])
def test_cnn(name: str, mode: str, prefix: str, tmp_path: Path) -> None:
    arrays, state = golden_cnn(name, mode)
    golden, settings, inputs = sub(arrays, mode), meta(arrays, mode), sub(arrays, "simpool/in")
    weight, bias = (value for key, value in state.items() if key.startswith(CLASSIFIER))
    encoder_only = {key: value for key, value in state.items() if not key.startswith(CLASSIFIER)}
    torch.save(published(encoder_only, prefix=prefix), tmp_path / "checkpoint.pth")
    for precision, dtype in PRECISIONS.items():
        tolerance = {"rtol": 1e-4, "atol": 2e-5 if name == "convnext" else 1e-4}
        encoder = load_encoder(tmp_path / "checkpoint.pth", min_over="batch").to(dtype)
        per_image = load_encoder(tmp_path / "checkpoint.pth").to(dtype)
        assert encoder.config.gamma == (2.0 if mode == "simpool" else None)

        def logits(x: Tensor) -> Tensor:
            return nn.functional.linear(encoder(x), weight.to(dtype), bias.to(dtype))  # noqa: B023

        for size in (f"{height}x{width}" for height, width in settings["sizes"]):
            x = torch.from_numpy(inputs[f"x_{size}"]).to(dtype)
            close(encoder(x), golden, f"feat_{size}", precision, **tolerance)
            if mode == "simpool":
                close(encoder.attention(x).flatten(1), golden, f"attn_{size}", precision, **tolerance)
                close(per_image(x), golden, f"feat_per_image_{size}", precision, **tolerance)
        x = torch.from_numpy(inputs[f"x_{'x'.join(map(str, settings['sizes'][0]))}"]).to(dtype)
        logits(x).backward(torch.from_numpy(inputs["g"]).to(dtype))
        assert check_gradients(encoder, golden, precision, rtol=1e-3) > 20
