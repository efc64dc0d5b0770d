"""Poolings: many tokens in, one feature out. A pooling is a module with

    pool.out_dim                       width of the feature
    pool(x)                            feature (B, out_dim) of tokens (B, N, D) or maps (B, D, H, W)
    pool(x, return_attention=True)     feature and attention: (B, N) or (B, H, W), sum 1
    pool(x, return_attention="heads")  the same for each head: (B, heads, ...); one may be left out

The attention is None if the pooling has none. Importing this package needs torch only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from dino_simpool.models.pooling.basic import ClsPool, GapPool
from dino_simpool.models.pooling.simpool import SimPool

if TYPE_CHECKING:
    from dino_simpool.config import ModelConfig


def build_pool(cfg: ModelConfig, dim: int) -> Any:
    """The pooling that cfg asks for, on a trunk of width dim. Poolings are chosen only here."""
    if cfg.pool == "cls":
        return ClsPool(dim)
    if cfg.pool == "gap":
        return GapPool(dim)
    assert cfg.pool == "simpool", f"ModelConfig allows {cfg.pool}, and no pooling was built for it"
    from dino_simpool.models.trunk import find_arch  # not at the top: it needs timm

    pool = SimPool(dim, gamma=cfg.gamma, num_heads=cfg.num_heads, beta=cfg.beta, min_over=cfg.min_over)
    if find_arch(cfg.arch)[0] != "resnet":  # ResNets keep the initialization of nn.Linear, as published
        for linear in (pool.q, pool.k):
            nn.init.trunc_normal_(linear.weight, std=0.02)
    return pool
