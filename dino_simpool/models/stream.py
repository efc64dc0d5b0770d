"""The blocks of a ViT on images of several sizes at once.

Linear layers, norms and MLPs treat all tokens alike, so tokens of all sizes run through them as one
stream, and only the attention takes them apart. The numbers are those of one size after the other,
except that stochastic depth draws its random numbers in another order. One function serves all
blocks, so compiled it is one graph, not one for each block.

Letters: T tokens of all sizes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.layers import Attention, DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

Shapes = tuple[tuple[int, int], ...]
"""Images and tokens of each image, for each size."""
RunBlock = Callable[[Any, Tensor, Shapes, tuple[Tensor | None, Tensor | None]], Tensor]


def can_stream(blocks: Iterable[Any]) -> bool:
    """Whether these are timm's standard blocks with fused attention, which `run_block` computes."""
    return all(
        type(block) is Block
        and type(block.attn) is Attention
        and block.attn.fused_attn
        and block.attn.gate is None
        and not block.attn.attn_drop.p
        for block in blocks
    )


def run_blocks(blocks: Iterable[Any], sizes: Sequence[Tensor], run: RunBlock) -> list[Tensor]:
    """Tokens (images, tokens, D) of each size, after all blocks.

    run: `run_block`, which may be compiled.
    """
    shapes = tuple((x.shape[0], x.shape[1]) for x in sizes)
    stream = torch.cat([x.flatten(0, 1) for x in sizes]) if len(sizes) > 1 else sizes[0].flatten(0, 1)
    for block in blocks:
        stream = run(block, stream, shapes, (_kept(block.drop_path1, stream, shapes), _kept(block.drop_path2, stream, shapes)))
    return _apart(stream, shapes)


def run_block(block: Any, x: Tensor, shapes: Shapes, kept: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """One block on a stream (T, D). kept: the two factors (T, 1) of stochastic depth, if any."""
    attention = block.attn
    parts = []
    for tokens in _apart(block.norm1(x), shapes):
        query, key, value = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value)
        parts.append(seen.transpose(1, 2).flatten(2).flatten(0, 1))
    y = torch.cat(parts) if len(parts) > 1 else parts[0]
    y = block.ls1(attention.proj_drop(attention.proj(attention.norm(y))))
    x = x + (y if kept[0] is None else y * kept[0])
    y = block.ls2(block.mlp(block.norm2(x)))
    return x + (y if kept[1] is None else y * kept[1])


def _apart(stream: Tensor, shapes: Shapes) -> list[Tensor]:
    """Views (images, tokens, D) of a stream, for each size."""
    parts = stream.split([images * tokens for images, tokens in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _kept(drop: nn.Module, stream: Tensor, shapes: Shapes) -> Tensor | None:
    """The factors (T, 1) of stochastic depth, one draw for each image. None: nothing is dropped."""
    if not (isinstance(drop, DropPath) and drop.training and drop.drop_prob):
        return None
    return torch.cat([drop(stream.new_ones(images, 1)).expand(-1, tokens).flatten() for images, tokens in shapes])[:, None]
