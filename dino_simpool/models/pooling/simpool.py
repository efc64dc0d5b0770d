"""SimPool, attention-based pooling. (attach.py puts it into other models.)

Source: Psomas et al., "Keep It SimPool: Who Said Supervised Transformers Suffer from Attention
Deficit?", ICCV 2023, Algorithm 2, with X the tokens of one image, X' = LayerNorm(X) and m the
minimum of X' over the image:

    q = W_q mean_j x_j,   a_j = softmax_j(q . W_k x'_j / sqrt(D)),
    u = (sum_j a_j (x'_j - m + eps)^gamma)^(1/gamma)

Deviations, none of which changes a number of the published single-head module: W_k is folded into
the query, q . W_k x'_j = (W_k^T q) . x'_j, which saves its (N, D) x (D, D) product; a batch of one
stays a batch; the outputs of several heads are always concatenated. The published code takes the
minimum over the whole batch, here `min_over="batch"`.

Letters: B images, N tokens, D width; (H, W) positions.   This module needs torch only.
"""

from __future__ import annotations

import contextlib
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ReturnAttention = bool | Literal["heads"]
"""Whether a pooling returns its attention too: True for the mean over heads, "heads" for each."""


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context in which products on the device of x keep their dtype. (Meta has no autocast.)"""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def as_tokens(x: Tensor) -> Tensor:
    """Tokens (B, N, D) of tokens or maps (B, D, H, W), row by row. ValueError for other shapes."""
    if x.ndim == 3:
        return x
    if x.ndim == 4:
        return x.flatten(2).transpose(1, 2)
    raise ValueError(f"pooling got a tensor of shape {tuple(x.shape)}: give tokens (B, N, D) or maps (B, D, H, W)")


class SimPool(nn.Module):
    """Attention pooling: the query is the mean of the tokens; pools by a generalized mean.

    dim: width D of the tokens and of the result.
    gamma: exponent, None for the plain average (paper: 1.25 for ViT, 2 for CNN).
    beta: add a learnable scalar after pooling, as in the published ViT weights. It needs a gamma.
    min_over: range of the minimum, the image (paper) or the whole batch (published training code).
    """

    def __init__(
        self,
        dim: int,
        *,
        gamma: float | None = None,
        num_heads: int = 1,
        beta: bool = False,
        min_over: Literal["image", "batch"] = "image",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"SimPool(num_heads={num_heads}): the width {dim} must be a multiple of it, give another number")
        if gamma is not None and not 0 < gamma < math.inf:
            raise ValueError(f"SimPool(gamma={gamma}): give a number above 0, or None for the plain average")
        # Normalized values lie within sqrt(dim) of 0, so their distance from the minimum is at most
        # twice that.
        largest = math.floor(10 * math.log(torch.finfo(torch.float32).max) / math.log(2 * math.sqrt(dim) + 1)) / 10
        if gamma is not None and gamma > largest:
            raise ValueError(f"SimPool(gamma={gamma}): its power overflows float32 for width {dim}, give at most {largest}")
        if beta and gamma is None:
            raise ValueError("SimPool(beta=True) needs a gamma: give one, or leave beta False")
        if min_over not in ("image", "batch"):
            raise ValueError(f"SimPool(min_over={min_over!r}): allowed are image (paper) and batch (published training)")
        self.out_dim, self.gamma, self.num_heads, self.min_over, self.eps = dim, gamma, num_heads, min_over, eps
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.beta = nn.Parameter(torch.zeros(1)) if beta else None

    def forward(self, x: Tensor, return_attention: ReturnAttention = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pools tokens (B, N, D) or maps (B, D, H, W) to (B, D).

        return_attention: True also returns the mean attention over heads, (B, N), or (B, H, W) for
        maps; "heads" that of each head, (B, heads, N) or (B, heads, H, W). It sums to 1. Half
        precision is computed in float32, also under autocast; results have the parameters' dtype.
        """
        with without_autocast(x):
            tokens = as_tokens(x).to(self._precision())
            values = self._normalize(tokens)
            attention = self._attention(tokens, values)
            pooled = self._pool(values, attention).to(self.norm.weight.dtype)
        if not return_attention:
            return pooled
        weights = (attention if return_attention == "heads" else attention.mean(1)).to(pooled.dtype)
        return pooled, weights.unflatten(-1, x.shape[2:]) if x.ndim == 4 else weights

    def keys(self, x: Tensor) -> Tensor:
        """Keys (B, N, D), K = W_k LayerNorm(x) of eq. 14, of tokens or maps x."""
        with without_autocast(x):
            values = self._normalize(as_tokens(x).to(self._precision()))
            return F.linear(values, self.k.weight.to(values.dtype)).to(self.k.weight.dtype)

    def _precision(self) -> torch.dtype:
        # For softmax, power and root: 1e-6^1.25 is already the smallest number of float16.
        return torch.float64 if self.norm.weight.dtype == torch.float64 else torch.float32

    def _normalize(self, tokens: Tensor) -> Tensor:
        weight, bias = self.norm.weight.to(tokens.dtype), self.norm.bias.to(tokens.dtype)
        return F.layer_norm(tokens, self.norm.normalized_shape, weight, bias, self.norm.eps)

    def _attention(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Attention (B, heads, N) of the mean of raw tokens (B, N, D) to normalized ones."""
        dim = tokens.shape[-1]
        query = F.linear(tokens.mean(1), self.q.weight.to(tokens.dtype)).unflatten(1, (self.num_heads, -1))
        keys = self.k.weight.to(tokens.dtype).unflatten(0, (self.num_heads, -1))
        folded = torch.einsum("bhc,hcd->bhd", query, keys) / math.sqrt(dim // self.num_heads)
        return (folded @ values.transpose(1, 2)).softmax(-1)

    def _pool(self, values: Tensor, attention: Tensor) -> Tensor:
        """Generalized mean (B, D) of values (B, N, D); head h weighs the h-th slice of D."""
        if self.gamma is None:
            return self._average(values, attention)
        # The minimum stays in the graph, since the published gradients flow through it.
        minimum = values.amin((1, 2), keepdim=True) if self.min_over == "image" else values.amin()
        powers = self._average((values - minimum + self.eps) ** self.gamma, attention)
        # A large gamma may make the power underflow to 0, where the root has an infinite slope.
        pooled = powers.clamp_min(torch.finfo(powers.dtype).tiny) ** (1 / self.gamma)
        return pooled if self.beta is None else pooled + self.beta.to(pooled.dtype)

    def _average(self, values: Tensor, attention: Tensor) -> Tensor:
        by_head = values.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return (attention.unsqueeze(2) @ by_head).flatten(1)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, num_heads={self.num_heads}, min_over={self.min_over}"
