"""Parameters and multiply-adds of an encoder for one image, as in Table 8 of the paper and in full.

Source: "Keep It SimPool", Table 8, whose figures are those of a hook counter like THOP. One
multiply-add is one "FLOP". It counts convolutions and linear layers without bias, and 4 per number
that enters a stock BatchNorm or LayerNorm. It does not count the norms of ConvNeXt (which were a
class of their own), attention products, powers and minima. Columns:

    params          trainable parameters, with a classifier of num_classes
    macs_thop       as above; for SimPool (N + 1) D^2, its keys being a linear layer, and its norm
    macs_full       also 2 n^2 D for each attention layer of n tokens, and 2 N D for SimPool
    macs_executed   the same with W_k folded into SimPool's query, as this package computes it

The forward pass runs on torch's meta device, which computes sizes only and so takes no time and
memory. Letters: N pooled positions, D width.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dino_simpool import distributed
from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import ModelConfig, ResourcesConfig, TrainConfig, parse, to_dict
from dino_simpool.features.encode import try_sizes
from dino_simpool.models.encoder import Encoder, build_encoder
from dino_simpool.models.pooling.simpool import SimPool, as_tokens
from dino_simpool.models.trunk import find_arch
from dino_simpool.results import model_record, results_folder, write_record


def resources(encoder: Encoder, *, image_size: int | None = None, num_classes: int = 1000) -> dict[str, int]:
    """params, macs_thop, macs_full and macs_executed of an encoder for one square image.

    image_size: pixels a side, None for that of its config.   num_classes: of a linear classifier on
    top, 0 for none.   ValueError if the image is too small or the kind of attention is unknown.
    """
    dim, params = encoder.embed_dim, sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    parts = count_multiply_adds(encoder.config, image_size or encoder.config.image_size)
    thop = parts["layers"] + parts["norms"] + parts["pool_layers"] + dim * num_classes
    full = thop + parts["attention"] + parts["pool_attention"]
    return {
        "params": params + (dim + 1) * num_classes,
        "macs_thop": thop,
        "macs_full": full,
        "macs_executed": full - parts["pool_layers"] - parts["pool_attention"] + parts["pool_executed"],
    }


def count_multiply_adds(cfg: ModelConfig, image_size: int) -> Counter[str]:
    """Multiply-adds for one square image: layers, norms (SimPool's included) and attention.

    For SimPool also pool_layers and pool_attention, and pool_executed, which replaces both when the
    keys are folded.
    """
    with torch.device("meta"):
        encoder = build_encoder(cfg).eval()
        image = torch.empty(1, 3, image_size, image_size)
    try_sizes(encoder, [image_size])
    blocks = encoder.trunk.blocks if cfg.is_vit else ()
    if unknown := [block for block in blocks if not isinstance(getattr(block, "attn", None), Attention)]:
        raise ValueError(f"{cfg.arch} has {type(unknown[0]).__name__}, whose attention is not counted: use a standard ViT")
    is_convnext = find_arch(cfg.arch)[0] == "convnext"
    parts: Counter[str] = Counter()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(module, _ConvNd):
            parts["layers"] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            parts["layers"] += output.numel() * module.in_features
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)) and not is_convnext:
            parts["norms"] += 4 * inputs[0].numel()
        elif isinstance(module, Attention):
            tokens = inputs[0].shape[1]
            parts["attention"] += 2 * tokens**2 * module.num_heads * module.head_dim
        elif isinstance(module, SimPool):  # it uses the weights of its layers in functions, without a hook
            _, positions, dim = as_tokens(inputs[0]).shape
            parts["norms"] += 4 * positions * dim
            parts["pool_layers"] += (positions + 1) * dim**2
            parts["pool_attention"] += 2 * positions * dim
            parts["pool_executed"] += 2 * dim**2 + (module.num_heads + 1) * positions * dim

    for module in encoder.modules():
        module.register_forward_hook(hook)
    with torch.no_grad():
        encoder(image)
    return parts


def main(cfg: ResourcesConfig) -> None:
    """The command `dino-simpool resources`."""
    distributed.setup("cpu")
    encoder, source = encoder_of(cfg)
    folder = results_folder(cfg.out, cfg.checkpoint) if cfg.out or cfg.checkpoint else None
    image_size = cfg.image_size or encoder.config.image_size
    metrics = resources(encoder, image_size=image_size, num_classes=cfg.num_classes)
    if not distributed.is_main():
        return
    print(describe(encoder.config, metrics, image_size=image_size, num_classes=cfg.num_classes))
    if folder is None:
        print("  not written: no --out DIR and no checkpoint")
        return
    record = {
        "evaluator": "resources",
        "dataset": None,
        "split": None,
        "metrics": metrics,
        "units": "parameters, multiply-adds",
        "image_size": image_size,
        "num_classes": cfg.num_classes,
        "model": source,
    }
    write_record(folder / "resources.json", record, cfg)
    print(f"  written to {folder / 'resources.json'}")


def encoder_of(cfg: ResourcesConfig) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of the checkpoint, recipe or model options, and its record. ValueError if more
    than one of them is given."""
    given = {"checkpoint": cfg.checkpoint, "recipe": cfg.recipe, "model": cfg.model != ModelConfig()}
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names)} are given: an encoder comes from one of --checkpoint, --recipe and --model.arch"
        )
    if cfg.checkpoint:
        encoder = load_encoder(cfg.checkpoint)
        return encoder, model_record(encoder, cfg.checkpoint, "teacher")
    model = parse(TrainConfig, ["--config", cfg.recipe]).model if cfg.recipe else cfg.model
    with torch.device("meta"):
        return build_encoder(model), to_dict(model)


def describe(model: ModelConfig, metrics: dict[str, int], *, image_size: int, num_classes: int) -> str:
    """The printed text: the counts, in full and in millions or billions."""
    head = f"with a classifier of {num_classes} classes" if num_classes else "without a classifier"
    exponent = f", gamma {model.gamma}" if model.pool == "simpool" else ""
    lines = [f"resources: {model.arch}, {model.pool}{exponent}, 1 x 3 x {image_size} x {image_size}, {head}"]
    names = {
        "params": "parameters",
        "macs_thop": "multiply-adds, as Table 8 counts them",
        "macs_full": "  with the products of attention",
        "macs_executed": "  as executed, SimPool's keys folded",
    }
    for name, count in metrics.items():
        short = f"{count / 1e6:.3f} M" if name == "params" else f"{count / 1e9:.3f} G"
        lines.append(f"  {names[name]:<38} {count:>16,} {short:>11}")
    return "\n".join(lines)
