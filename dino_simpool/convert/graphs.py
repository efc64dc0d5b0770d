"""Encoders as graphs that run without this tool: ONNX and torch.export.

A graph takes `images` (B, 3, H, W), normalized, and returns `feature` (B, D), `tokens` (B, N, D)
and `attention` (B, h, w). B is free. H and W are free for CNNs; for ViTs they are those of the
export, for which the position embedding is resampled then.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dino_simpool.models.encoder import Encoder
from dino_simpool.models.foreign import TimmEncoder
from dino_simpool.models.pooling.basic import ClsPool
from dino_simpool.models.pooling.simpool import as_tokens

BATCHES = (1, 3)
"""Batch sizes for which an export is compared."""


class Outputs(nn.Module):
    """What an encoder has to say about images, in one pass over its trunk; names are in `names`."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.plain = isinstance(encoder, TimmEncoder)  # how timm's last attention is read cannot be traced
        self.names = ("feature", "tokens") if self.plain else ("feature", "tokens", "attention")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        if self.plain:
            return encoder(images), encoder.tokens(images)
        x, grid = encoder.pool_input(images)
        if isinstance(encoder.pool, ClsPool):
            pooled, tokens, attention = encoder.pool(x), x[:, encoder.trunk.num_prefix_tokens :], encoder.attention(images)
        else:
            pooled, weights = encoder.pool(x, return_attention=True)
            tokens, attention = as_tokens(x), weights.reshape(-1, *grid)
        return encoder.normed(pooled), tokens, attention


def is_dynamic(encoder: Encoder) -> bool:
    """Whether a graph of this encoder takes images of any size."""
    return not (encoder.config.is_vit or isinstance(encoder, TimmEncoder))


def at_size(encoder: Encoder, size: tuple[int, int]) -> Encoder:
    """A copy of an encoder; a ViT of ours has the position embedding of this size as its own."""
    encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
    if is_dynamic(encoder) or isinstance(encoder, TimmEncoder):
        return encoder
    trunk, patch = encoder.trunk, encoder.config.patch_size
    grid = (size[0] // patch, size[1] // patch)
    if trunk.pos_embed is not None:
        rows = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        embedding = trunk.pos_embed[0]
        resampled = torch.cat([embedding[:rows], encoder._positions(embedding[rows:], grid)])
        trunk.pos_embed = nn.Parameter(resampled[None], requires_grad=False)
    trunk.patch_embed.grid_size = grid
    encoder.config = dataclasses.replace(encoder.config, pos_interp="size")  # which leaves its own grid as it is
    return encoder


def trace(outputs: Outputs, size: tuple[int, int]) -> ExportedProgram:
    """The graph of the outputs."""
    free: dict[int, Any] = {0: Dim("batch")}
    if is_dynamic(outputs.encoder):
        free |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}  # torch finds the smallest size itself
    return torch.export.export(outputs, (torch.zeros(2, 3, *size),), dynamic_shapes={"images": free})


def write_onnx(program: ExportedProgram, names: tuple[str, ...], path: Path) -> None:
    """Write an ONNX file. ValueError if the packages for it are missing."""
    _need_onnx()
    onnx = torch.onnx.export(program, input_names=["images"], output_names=list(names), verbose=False)
    assert onnx is not None
    onnx.save(path)


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    """The outputs of an ONNX file under onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]


def write_program(program: ExportedProgram, path: Path) -> None:
    """Write a file of torch.export."""
    torch.export.save(program, path)


def run_program(path: Path, images: Tensor) -> list[Tensor]:
    """The outputs of a file of torch.export."""
    return list(torch.export.load(path).module()(images))


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any output, relative to the largest value of that output.

    ValueError for other shapes."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise ValueError(f"shapes {[tuple(x.shape) for x in found]}, expected {[tuple(x.shape) for x in expected]}")
    relative = [((a - b).abs().max() / b.abs().max()).nan_to_num(torch.inf) for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(relative).max())


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--to onnx needs {', '.join(missing)}: pip install dino-simpool[onnx]")
