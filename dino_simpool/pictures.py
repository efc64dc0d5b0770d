"""Small pictures of tensors: what the encoder saw, and where it looked. Images are (3, H, W) float in 0..1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def unnormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation of (3, H, W) or (B, 3, H, W): floats in 0..1, on the CPU."""
    shape = (3, 1, 1)
    return (images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)


def overlay(image: Tensor, attention: Tensor) -> Tensor:
    """An image (3, H, W) under its attention (h, w), scaled from its lowest value (blue) to its highest (red)."""
    heat = F.interpolate(attention.float()[None, None], image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    # The classic blue-cyan-yellow-red ramp: each channel is a tent over a quarter of the scale.
    ramp = torch.stack([1.5 - (4 * heat - center).abs() for center in (3.0, 2.0, 1.0)]).clamp(0, 1)
    return 0.5 * image + 0.5 * ramp


def strip(images: Sequence[Tensor]) -> Tensor:
    """Images side by side on white, smaller ones at the top: (3, greatest height, sum of widths + gaps)."""
    height = max(image.shape[1] for image in images)
    padded = [F.pad(image, (0, 2, 0, height - image.shape[1]), value=1.0) for image in images]
    return torch.cat(padded, dim=2)
