"""The encoder (timm trunk, pooling, final norm), the DINO head on it, and the two together as student and teacher.

Source: the self-supervised models of "Keep It SimPool" (ICCV 2023) and facebookresearch/dino. Order of an encoder:

    ViT        blocks -> pool -> norm   (norm_order norm_then_pool: blocks -> norm -> pool, the published supervised ViTs)
    ResNet     stages -> pool           ConvNeXt   stages -> pool -> norm

Without the class-token pooling a ViT has no class token at all. Position embeddings go from grid to grid by a constant matrix,
which repeats the published interpolation to the last digits and costs one small product.

Letters: B images, V views, N tokens, D width, K prototypes; (H, W) pixels, (h, w) positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from dino_simpool.config import ModelConfig
from dino_simpool.models.pooling.basic import ClsPool, GapPool
from dino_simpool.models.pooling.simpool import SimPool, as_tokens, without_autocast
from dino_simpool.models.trunk import build_trunk

Grid = tuple[int, int]


@lru_cache(maxsize=32)
def position_matrix(native: Grid, grid: Grid, rule: str, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Matrix (h * w, rows) that takes a position embedding from its native grid to another by bicubic interpolation.

    native, grid: positions (down, across).   rule: "size" resamples from grid to grid, antialiased like timm; "dino" (and
    "dino_always") is the published rule, scale (h + 0.1) / native, not antialiased; "dino_legacy" divides by the square root of
    (rows + 1) instead, an early version of the published code that took the missing class token for a position (ValueError for
    grids that it cannot make: 40 positions and more from 14).
    """
    rows = native[0] * native[1]
    with torch.inference_mode(False), torch.no_grad():
        one_hot = torch.eye(rows, dtype=torch.float64, device="cpu").view(1, rows, *native)
        if rule == "size":
            matrix = F.interpolate(one_hot, size=grid, mode="bicubic", antialias=True)
        else:
            base = (math.sqrt(rows + 1),) * 2 if rule == "dino_legacy" else native
            scale = ((grid[0] + 0.1) / base[0], (grid[1] + 0.1) / base[1])
            matrix = F.interpolate(one_hot, scale_factor=scale, mode="bicubic")
        if matrix.shape[-2:] != grid:  # only dino_legacy, whose scale is a little too small for large grids
            raise ValueError(f"model.pos_interp {rule} has no positions for {grid[0]} x {grid[1]} patches: use smaller images")
        return matrix.view(rows, -1).T.contiguous().to(dtype).to(device)


class Encoder(nn.Module):
    """A timm trunk with a pooling and a final norm: images in, one feature an image out.

    Images are (B, 3, H, W), normalised with config.mean and config.std, of any size; a ViT drops the pixels beyond a multiple
    of its patch. An image smaller than a patch, or a CNN map under 2 x 2, is a ValueError.
    """

    trunk: Any  # of one of timm's classes
    least_map: int = 2
    """Smallest side of a CNN's map that is taken, in positions. 1 while images come as they are (`thin_images`)."""

    epochs: float | None = None
    """Of pre-training behind the weights, where a checkpoint says so (`load_encoder`)."""

    def __init__(self, trunk: nn.Module, pool: nn.Module, *, norm: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.trunk, self.pool, self.norm, self.config = trunk, pool, norm, config
        self.embed_dim: int = self.trunk.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D)."""
        pooled = self.pool(self._pooled_input(images)[0])
        return pooled if self._norm_first else self.norm(pooled)

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens (B, N, D) that are pooled, row by row, without class token or registers; for a CNN its last map."""
        x, _ = self._pooled_input(images)
        return x[:, self._prefix :] if isinstance(self.pool, ClsPool) else as_tokens(x)

    def attention(self, images: Tensor, *, per_head: bool = False) -> Tensor:
        """Attention maps (B, h, w), each with the sum 1; per_head: (B, heads, h, w), each head with the sum 1.

        SimPool: its own attention, mean over its heads. Class token: its self-attention in the last block, mean over the heads,
        patches only. Global average: uniform, as this pooling weighs them; it counts as one head.
        """
        if not isinstance(self.pool, ClsPool):
            x, grid = self._pooled_input(images)
            if per_head and isinstance(self.pool, SimPool):
                return self.pool.attention(x).unflatten(2, grid)
            maps = self.pool(x, return_attention=True)[1].reshape(-1, *grid)
            return maps[:, None] if per_head else maps
        tokens, grid = self._embed(images)
        for block in self.trunk.blocks[:-1]:
            tokens = block(tokens)
        weights = class_attention(self.trunk.blocks[-1], tokens, num_prefix=self._prefix)
        weights = weights if per_head else weights.mean(1)
        return (weights / weights.sum(-1, keepdim=True)).unflatten(-1, grid)

    @property
    def _norm_first(self) -> bool:
        return self.config.norm_order == "norm_then_pool"

    @property
    def _prefix(self) -> int:
        return self.trunk.num_prefix_tokens

    def _pooled_input(self, images: Tensor) -> tuple[Tensor, Grid]:
        """What the pooling sees, tokens or a map, and the grid (h, w) of its positions."""
        if not hasattr(self.trunk, "patch_embed"):
            x = self.trunk.forward_features(images)
            grid = tuple(x.shape[-2:])
            if min(grid) < self.least_map:
                raise ValueError(
                    f"{self.config.arch} turns images of {images.shape[-2]} x {images.shape[-1]} pixels into a {grid[0]} x "
                    f"{grid[1]} map, 2 x 2 is the least: set model.stem small, fewer stages in model.depth, or larger images"
                )
            return x, grid
        tokens, grid = self._embed(images)
        tokens = self.trunk.blocks(tokens)
        if self._norm_first:
            tokens = self.norm(tokens)
        return tokens if isinstance(self.pool, ClsPool) else tokens[:, self._prefix :], grid

    def _embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens (B, prefix + N, D) that enter the first block of a ViT, and their grid."""
        trunk, (height, width), patch = self.trunk, images.shape[-2:], self.config.patch_size
        grid = (height // patch, width // patch)
        if not all(grid):
            raise ValueError(
                f"images of {height} x {width} pixels are smaller than a patch of {self.config.arch}: give at "
                f"least {patch} pixels a side, or set a smaller model.patch_size"
            )
        x = trunk.patch_embed(images[..., : grid[0] * patch, : grid[1] * patch]).flatten(1, 2)
        prefix = [token.expand(len(x), -1, -1) for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        if trunk.pos_embed is not None:
            rows = 0 if trunk.no_embed_class else self._prefix
            for_prefix, for_patches = trunk.pos_embed[0].split([rows, trunk.pos_embed.shape[1] - rows])
            x = x + self._positions(for_patches, grid, square=height == width)
            if rows:
                prefix = [torch.cat(prefix, 1) + for_prefix]
        return trunk.norm_pre(trunk.pos_drop(torch.cat([*prefix, x], 1))), grid

    def _positions(self, embedding: Tensor, grid: Grid, *, square: bool) -> Tensor:
        """Position embedding (h * w, D) for a grid from the stored one (rows, D)."""
        native, rule = self.trunk.patch_embed.grid_size, self.config.pos_interp
        # The published shortcut asks for a square image too. parity: test_model.py::test_positions_match_the_published_ones
        if grid == native and (rule == "size" or (rule == "dino" and square)):
            return embedding
        matrix = position_matrix(native, grid, rule, device=embedding.device, dtype=embedding.dtype)
        with without_autocast(embedding):
            return matrix @ embedding


def class_attention(block: Any, tokens: Tensor, *, num_prefix: int) -> Tensor:
    """Attention (B, heads, N) of the first token to the patches in a ViT block; what a head gives to prefix tokens is left out.

    tokens: (B, num_prefix + N, D) before the block. It is computed here because the fused kernels do not return it.
    """
    layer = getattr(block, "attn", None)
    if not isinstance(layer, Attention):
        raise ValueError(f"{type(block).__name__} has no plain self-attention to show: use pool simpool, or a standard ViT")
    query, key, _ = layer.qkv(block.norm1(tokens)).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = layer.q_norm(query[:, :, :1]) * layer.scale @ layer.k_norm(key).transpose(-2, -1)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)[:, :, 0, num_prefix:]


def build_encoder(cfg: ModelConfig) -> Encoder:
    """A freshly initialised encoder; a ValueError if the options do not go together. The one place where encoders are made."""
    trunk, norm = build_trunk(cfg)
    if cfg.pool != "simpool":
        return Encoder(trunk, ClsPool() if cfg.pool == "cls" else GapPool(), norm=norm, config=cfg)
    pool = SimPool(trunk.num_features, gamma=cfg.gamma, num_heads=cfg.num_heads, beta=cfg.beta, min_over=cfg.min_over)
    if not isinstance(norm, nn.Identity):  # ResNets keep the initialisation of nn.Linear, as published
        for linear in (pool.q, pool.k):
            nn.init.trunc_normal_(linear.weight, std=0.02)
    return Encoder(trunk, pool, norm=norm, config=cfg)


@contextmanager
def thin_images(encoder: Encoder) -> Iterator[None]:
    """Let a CNN take images whose map has a single row or column, as published CNNs do; elsewhere that is a mistake."""
    least = encoder.least_map
    encoder.least_map = 1
    try:
        yield
    finally:
        encoder.least_map = least
