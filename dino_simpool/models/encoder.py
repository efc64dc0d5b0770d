"""The encoder: a timm trunk, a pooling and a final norm.

Source: the self-supervised models of "Keep It SimPool" (ICCV 2023) and facebookresearch/dino.
The order within an encoder:

    ViT        blocks -> pool -> norm
               blocks -> norm -> pool   with norm_order norm_then_pool: published supervised ViTs
    ResNet     stages -> pool
    ConvNeXt   stages -> pool -> norm

A ViT has a class token only for class-token pooling. Position embeddings are resampled by a
constant matrix, which repeats the published interpolation to the last digits and costs one small
product.

Letters: B images, N tokens, D width; (H, W) pixels, (h, w) positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from dino_simpool.config import DEFAULT_DECODING, DecodingSettings, ModelConfig
from dino_simpool.models.pooling import build_pool
from dino_simpool.models.pooling.basic import ClsPool
from dino_simpool.models.pooling.simpool import as_tokens, without_autocast
from dino_simpool.models.stream import RunBlock, can_stream, run_block, run_blocks
from dino_simpool.models.trunk import build_trunk

Grid = tuple[int, int]


def position_matrix(native: Grid, grid: Grid, rule: str, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Matrix (h * w, rows) that resamples a position embedding from its native grid, bicubically.

    native, grid: positions (down, across).   rule: "size" resamples from grid to grid, antialiased
    like timm; "dino" (and "dino_always") is the published rule, scale (h + 0.1) / native, not
    antialiased; "dino_legacy" divides by sqrt(rows + 1) instead, as an early version of the
    published code did, which counted the missing class token as a position (ValueError for grids
    that it cannot make: 40 positions or more from 14).   For the native grid see
    `Encoder._positions`.
    """
    # A trace must neither fill the cache, with tensors that are not real, nor read real ones there.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(torch.empty(0)) is not Tensor
    make = _cached_position_matrix.__wrapped__ if traced else _cached_position_matrix
    return make(native, grid, rule, device, dtype)


@lru_cache(maxsize=32)
def _cached_position_matrix(native: Grid, grid: Grid, rule: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    rows = native[0] * native[1]
    with torch.inference_mode(False), torch.no_grad():
        one_hot = torch.eye(rows, dtype=torch.float64, device="cpu").view(1, rows, *native)
        if rule == "size":
            matrix = F.interpolate(one_hot, size=grid, mode="bicubic", antialias=True)
        else:
            base = (math.sqrt(rows + 1),) * 2 if rule == "dino_legacy" else native
            grid = (int(grid[0]), int(grid[1])) if torch.jit.is_tracing() else grid  # they are tensors there
            scale = ((grid[0] + 0.1) / base[0], (grid[1] + 0.1) / base[1])
            matrix = F.interpolate(one_hot, scale_factor=scale, mode="bicubic")
        if matrix.shape[-2:] != grid:  # only dino_legacy, whose scale is a little too small for large grids
            raise ValueError(f"model.pos_interp {rule} has no positions for {grid[0]} x {grid[1]} patches: use smaller images")
        return matrix.view(rows, -1).T.contiguous().to(dtype).to(device)


TRAINING = ("epochs", "total_epochs", "num_images", "images", "init")
"""What an `Encoder` knows of the training behind its weights."""


class Encoder(nn.Module):
    """A timm trunk with a pooling and a final norm: images in, one feature per image out.

    Images are (B, 3, H, W), normalized with config.mean and config.std, of any size; a ViT drops
    the pixels beyond a multiple of its patch size. An image smaller than a patch is a ValueError.
    """

    trunk: Any  # of one of timm's classes
    pool: Any  # see models.pooling
    epochs: float | None = None
    """Epochs of pre-training behind the weights, if a checkpoint says so (`load_encoder`)."""
    total_epochs: float | None = None
    """Epochs of the whole run, if it says so. More than `epochs`: they are from its middle."""
    num_images: int | None = None
    """The number of images that these epochs went over, if it says so."""
    images: str | None = None
    """`ImageSet.digest` of them, if it says so."""
    init: dict[str, Any] | None = None
    """The weights that its training started from (checkpoint, sha256, epochs), if not random."""
    decoding: DecodingSettings = DEFAULT_DECODING
    """How the images of the training were decoded."""

    def __init__(self, trunk: nn.Module, pool: nn.Module, *, norm: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.trunk, self.pool, self.norm, self.config = trunk, pool, norm, config
        self.embed_dim: int = self.pool.out_dim
        # What the training step calls, so that it alone is compiled, for its few shapes.
        self.run_block: RunBlock = run_block
        self.run_pool: Callable[[Encoder, Tensor], Tensor] = Encoder.pooled
        self._matrices: dict[Grid, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, embed_dim)."""
        return self.pooled(self.pool_input(images)[0])

    def features_of_sizes(self, sizes: Sequence[Tensor]) -> Tensor:
        """Features (sum of B, embed_dim) of images of several sizes, in order.

        Those of a standard ViT run through its blocks together. Under autocast to bfloat16 what
        passes from block to block is bfloat16 too: a ViT-S reads and writes 2 of 60 ms less on an
        H200, and its gradients are 2.4 % from those in float32 instead of 2.2 %.
        """
        if not (self.config.is_vit and can_stream(self.trunk.blocks)):
            return torch.cat([self.run_pool(self, self.pool_input(images)[0]) for images in sizes])
        tokens = [self._embed(images)[0] for images in sizes]
        device = tokens[0].device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
            tokens = [x.bfloat16() for x in tokens]
        tokens = run_blocks(self.trunk.blocks, tokens, self.run_block)
        return torch.cat([self.run_pool(self, self._of_vit(x)) for x in tokens])

    def pooled(self, x: Tensor) -> Tensor:
        """Features (B, embed_dim) of what is pooled (see `pool_input`)."""
        return self.normed(self.pool(x))

    def normed(self, pooled: Tensor) -> Tensor:
        """Features of the result of the pooling, which the final norm follows, unless it came
        before."""
        return pooled if self.config.norm_order == "norm_then_pool" else self.norm(pooled)

    def _of_vit(self, tokens: Tensor) -> Tensor:
        """What is pooled, of tokens after the last block."""
        if self.config.norm_order == "norm_then_pool":
            tokens = self.norm(tokens)
        return tokens if isinstance(self.pool, ClsPool) else tokens[:, self.trunk.num_prefix_tokens :]

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens (B, N, D) that are pooled, without class token and registers; row by row."""
        x, _ = self.pool_input(images)
        return x[:, self.trunk.num_prefix_tokens :] if isinstance(self.pool, ClsPool) else as_tokens(x)

    def attention(self, images: Tensor, *, per_head: bool = False) -> Tensor:
        """Attention maps (B, h, w), means over heads; per_head: (B, heads, h, w). Each sums to 1.

        They are those of the pooling (global average: uniform, one head), or of the class token's
        self-attention in the last block. ValueError if the pooling has no attention.
        """
        if isinstance(self.pool, ClsPool):
            weights, grid = self._class_attention(images, per_head=per_head)
        else:
            x, grid = self.pool_input(images)
            weights = self.pool(x, return_attention="heads" if per_head else True)[1]
        if weights is None:
            raise ValueError(f"model.pool {self.config.pool} has no attention maps: use one that has, such as simpool")
        maps = weights.reshape(weights.shape[0], -1, *grid)
        return maps if per_head else maps[:, 0]

    def pool_input(self, images: Tensor) -> tuple[Tensor, Grid]:
        """What is pooled, tokens (B, N, D) or a map (B, D, h, w), and the grid (h, w) of positions.
        For class-token pooling the tokens begin with the class token and the registers."""
        if not self.config.is_vit:
            x = self.trunk.forward_features(images)
            return x, tuple(x.shape[-2:])
        tokens, grid = self._embed(images)
        return self._of_vit(self.trunk.blocks(tokens)), grid

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
        prefix = [token.expand(x.shape[0], -1, -1) for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        if trunk.pos_embed is not None:
            rows = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
            for_prefix, for_patches = trunk.pos_embed[0].split([rows, trunk.pos_embed.shape[1] - rows])
            x = x + self._positions(for_patches, grid)
            if rows:
                prefix = [torch.cat(prefix, 1) + for_prefix]
        return trunk.norm_pre(trunk.pos_drop(torch.cat([*prefix, x], 1))), grid

    def _positions(self, embedding: Tensor, grid: Grid) -> Tensor:
        """Position embedding (h * w, D) for a grid from the stored one (rows, D).

        At the native grid it is the stored one. The published code calls F.interpolate there too,
        without a class token always, with one for images that are not square. On the GPUs that
        trained and evaluated the published weights this copies: the CUDA kernel, as in torch 1.8,
        does so for equal sizes, whatever the scale. Newer CPU kernels resample by 14.1 / 14, and
        "dino_always" repeats that, on any device, for the golden arrays, which are of such a CPU.
        """
        native, rule = self.trunk.patch_embed.grid_size, self.config.pos_interp
        if grid == native and rule != "dino_always":
            return embedding
        matrix = position_matrix(native, grid, rule, device=embedding.device, dtype=embedding.dtype)
        if self.training:  # a CUDA graph of a step reads it there, so it must outlive the cache
            self._matrices[grid] = matrix
        with without_autocast(embedding):
            return matrix @ embedding

    def _class_attention(self, images: Tensor, *, per_head: bool) -> tuple[Tensor, Grid]:
        """Attention (B, heads or 1, N) of the class token to patches in the last block; the grid.

        Fused kernels do not return it. What goes to class token and registers is left out, the rest
        scaled to sum 1.
        """
        block = self.trunk.blocks[-1]
        layer = getattr(block, "attn", None)
        if not isinstance(layer, Attention):
            raise ValueError(f"{type(block).__name__} has no plain self-attention to show: use pool simpool, or a standard ViT")
        tokens, grid = self._embed(images)
        for each in self.trunk.blocks[:-1]:
            tokens = each(tokens)
        query, key, _ = layer.qkv(block.norm1(tokens)).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = layer.q_norm(query[:, :, :1]) * layer.scale @ layer.k_norm(key).transpose(-2, -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = scores.softmax(-1)[:, :, 0, self.trunk.num_prefix_tokens :]
        weights = weights if per_head else weights.mean(1, keepdim=True)
        return weights / weights.sum(-1, keepdim=True), grid


def build_encoder(cfg: ModelConfig) -> Encoder:
    """A new encoder, made here and nowhere else. ValueError if the options do not go together."""
    trunk, make_norm = build_trunk(cfg)
    pool = build_pool(cfg, trunk.num_features)
    width = trunk.num_features if cfg.norm_order == "norm_then_pool" else pool.out_dim
    return Encoder(trunk, pool, norm=make_norm(width), config=cfg)
