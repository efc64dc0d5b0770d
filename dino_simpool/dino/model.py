"""The DINO head, and encoder and head together as student and teacher.

Source: facebookresearch/dino, vision_transformer.py (DINOHead) and utils.py (MultiCropWrapper).

Letters: B images, V views, D width, K prototypes, S side of a view in pixels.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from dino_simpool.models.encoder import Encoder


class DinoHead(nn.Module):
    """DINO's projection: linear layers with GELU, normalization to unit length, and the prototypes.

    The head owns the prototypes (`last_layer`), but the loss applies them.

    dim: width D of the features. out_dim: number K of prototypes. layers: number of linear layers
    fc1, fc2, ... before the normalization. batch_norm: BatchNorm bn1, bn2, ... after each of them
    but the last. norm_last_layer: the prototypes keep the norm 1.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.layers = layers
        widths = [dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        for i, (wide_in, wide_out) in enumerate(itertools.pairwise(widths), 1):
            linear = nn.Linear(wide_in, wide_out)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            self.add_module(f"fc{i}", linear)
            if batch_norm and i < layers:
                self.add_module(f"bn{i}", nn.BatchNorm1d(wide_out))
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        scale = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(scale)
        scale.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Unit features (rows, bottleneck) of features (rows, D); float32, or float64 if given."""
        for i in range(1, self.layers + 1):
            x = self.get_submodule(f"fc{i}")(x)
            if i < self.layers:
                x = F.gelu(self.get_submodule(f"bn{i}")(x) if hasattr(self, f"bn{i}") else x)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class DinoModel(nn.Module):
    """Encoder and head: the student. `make_teacher` copies it to make the teacher."""

    def __init__(self, encoder: Encoder, head: DinoHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Unit features (V, B, bottleneck) of V views (B, 3, S, S), the global ones first.

        The trunk sees each run of views of one size at once, and the head all V * B rows, view by
        view. So BatchNorm in the trunk sees one resolution at a time, and BatchNorm in the head
        sees everything, as published.
        """
        runs = itertools.groupby(views, key=lambda view: view.shape[-2:])
        features = self.encoder.features_of_sizes([torch.cat(list(run)) for _, run in runs])
        return self.head(features).unflatten(0, (len(views), -1))


def make_teacher(student: DinoModel, drop_path: float = 0.0) -> DinoModel:
    """A copy of the student without gradients, in training mode, with its own stochastic depth.

    drop_path: rate of the last block; the other blocks keep their share of it. ValueError for a
    rate above 0 if the student has none.
    """
    rate = student.encoder.config.drop_path
    if drop_path and not rate:
        raise ValueError(f"teacher.drop_path is {drop_path}, but the student has no stochastic depth: set model.drop_path too")
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = module.drop_prob * drop_path / rate if drop_path else 0.0
    return teacher
