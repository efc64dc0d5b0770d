"""The two poolings that SimPool replaces: the class token and the global average.

Letters: B images, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_simpool.models.pooling.simpool import as_tokens


class GapPool(nn.Module):
    """Global average pooling, the baseline of CNNs: every position has the same weight."""

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Mean (B, D) over the positions of tokens (B, N, D) or maps (B, D, H, W); the attention is 1/N everywhere."""
        tokens = as_tokens(x)
        # Under autocast float32 comes out, as from the other poolings and their norm.
        dtype = torch.float32 if not x.is_meta and torch.is_autocast_enabled(x.device.type) else x.dtype
        pooled = tokens.mean(1, dtype=torch.promote_types(x.dtype, torch.float32)).to(dtype)
        if not return_attention:
            return pooled
        weights = pooled.new_full(tokens.shape[:2], 1 / tokens.shape[1])
        return pooled, weights.unflatten(1, x.shape[2:]) if x.ndim == 4 else weights


class ClsPool(nn.Module):
    """The class token, the baseline of ViTs: the first of the tokens is taken."""

    def forward(
        self, x: Tensor, return_attention: bool = False, *, attention: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """First token (B, D) of tokens (B, 1 + N, D).

        The weights of the positions are in the self-attention of the last block and not in the tokens, so that whoever has them
        hands them in: attention (B, N). return_attention without it is a ValueError.
        """
        if x.ndim != 3:
            raise ValueError(f"class-token pooling got a tensor of shape {tuple(x.shape)}: give tokens (B, 1 + N, D)")
        if not return_attention:
            return x[:, 0]
        if attention is None:
            raise ValueError("class-token pooling cannot see attention in the tokens: hand it in, or call encoder.attention")
        return x[:, 0], attention
