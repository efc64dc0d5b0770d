"""The two poolings that SimPool replaces: the class token and the global average.

Letters: B images, N tokens, D width; (H, W) positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_simpool.models.pooling.simpool import ReturnAttention, as_tokens


class GapPool(nn.Module):
    """Global average pooling, the baseline of CNNs: every position has the same weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Tensor, return_attention: ReturnAttention = False) -> Tensor | tuple[Tensor, Tensor]:
        """Mean (B, D) over the positions of tokens or maps; the attention is 1/N everywhere."""
        tokens = as_tokens(x)
        # Under autocast the result is float32, as from the other poolings and their norm.
        dtype = torch.float32 if not x.is_meta and torch.is_autocast_enabled(x.device.type) else x.dtype
        pooled = tokens.mean(1, dtype=torch.promote_types(x.dtype, torch.float32)).to(dtype)
        if not return_attention:
            return pooled
        weights = pooled.new_full(tokens.shape[:2], 1 / tokens.shape[1])
        return pooled, weights.unflatten(1, x.shape[2:]) if x.ndim == 4 else weights


class ClsPool(nn.Module):
    """The class token, the baseline of ViTs: takes the first token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Tensor, return_attention: ReturnAttention = False) -> Tensor | tuple[Tensor, None]:
        """First token (B, D) of (B, 1 + N, D). Its attention is None here: it is that of the last
        block, which `Encoder.attention` computes."""
        if x.ndim != 3:
            raise ValueError(f"class-token pooling got a tensor of shape {tuple(x.shape)}: give tokens (B, 1 + N, D)")
        return (x[:, 0], None) if return_attention else x[:, 0]
