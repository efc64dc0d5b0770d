"""SimPool in models of timm and torchvision: in place of their global pooling, for training of any
kind, with their classifier as it is. And the attention maps of such models.

What a model pools, in which layout, and whether it uses what was put in, is seen in two passes of
one black image through it. So a model that this does not fit is refused, and stays what it was.

Letters: B images, N tokens, D width; (H, W) pixels, (h, w) positions.   This needs torch only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dino_simpool.models.pooling.simpool import SimPool


def attach_simpool(
    model: Any,
    *,
    gamma: float | None = None,
    num_heads: int = 1,
    beta: bool = False,
    min_over: Literal["image", "batch"] = "image",
) -> SimPool:
    """Replaces the global pooling of a model with a new SimPool, in place, and returns the SimPool.

    Options as in `SimPool`; paper: gamma 1.25 for ViT, 2 for CNN. timm: ViTs and EVAs, whose class
    token and registers stay but are not pooled, and models with one global pooling over a map
    (ResNet, ConvNeXt, Swin, ...). torchvision: ViTs, and models that average the last map. All
    other weights, the classifier too, keep their names and values. A saved state is loaded into a
    model that got its SimPool first. ValueError for any other model, which is then unchanged.
    """
    if any(isinstance(module, SimPool) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has a SimPool already: give a new model")
    try:
        before = _probe(model)
        owner, name, width = _place(model)
    except ValueError as error:
        raise ValueError(_refused(model, str(error))) from error
    pool = SimPool(width, gamma=gamma, num_heads=num_heads, beta=beta, min_over=min_over).to(next(model.parameters()))
    old, prefix = getattr(owner, name), getattr(model, "pool_include_prefix", None)
    setattr(owner, name, _adapted(model, name, old, pool).train(model.training))
    if prefix is not None:
        model.pool_include_prefix = False
    try:
        _watch(model, pool)
        after = _probe(model)
        if after.shape != before.shape:
            raise ValueError(f"the output was {tuple(before.shape)} and would be {tuple(after.shape)}")
    except ValueError as error:
        if old is None:
            delattr(owner, name)  # or it would become a module that is None
        setattr(owner, name, old)
        if prefix is not None:
            model.pool_include_prefix = prefix
        raise ValueError(_refused(model, f"SimPool does not fit in place of its {name} ({error})")) from error
    return pool


def simpool_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Attention maps (B, h, w) of images (B, 3, H, W), normalized as the model takes them, by the
    SimPool that was attached to a model: each sums to 1; of several heads the mean.

    The model runs in evaluation mode without gradient, and keeps its modes. ValueError for a model
    without a SimPool, or whose tokens are no grid over the image.
    """
    pools = [module for module in model.modules() if isinstance(module, SimPool)]
    if len(pools) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(pools)} SimPools, and one is needed: call attach_simpool(model) first"
        )
    x, _ = _watch(model, pools[0], images)
    with torch.no_grad():
        attention: Tensor = pools[0](x, return_attention=True)[1]
    return attention if attention.ndim == 3 else attention.unflatten(1, _grid(attention.shape[1], *images.shape[2:]))


class _MapPool(nn.Module):
    """A pooling of maps (B, D, h, w), or (B, h, w, D) with channels_last, in place of another.

    keeps_dims: the result has two more dimensions, for heads that normalize or flatten it.
    """

    def __init__(self, pool: SimPool, *, channels_last: bool, keeps_dims: bool) -> None:
        super().__init__()
        self.pool, self.channels_last, self.keeps_dims = pool, channels_last, keeps_dims

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(x.permute(0, 3, 1, 2) if self.channels_last else x)
        if not self.keeps_dims:
            return pooled
        return pooled[:, None, None] if self.channels_last else pooled[..., None, None]


class _PatchPool(nn.Module):
    """A pooling of tokens without the first ones."""

    def __init__(self, pool: SimPool, skipped: int) -> None:
        super().__init__()
        self.pool, self.skipped = pool, skipped

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(x[:, self.skipped :])
        return pooled


class _NormAndPool(nn.LayerNorm):
    """The last norm of a ViT, with its own weights, and a pooling of its patches: (B, 1 + N, D) to
    (B, 1, D)."""

    def __init__(self, norm: nn.LayerNorm, pool: SimPool) -> None:
        super().__init__(norm.normalized_shape, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(super().forward(x)[:, 1:])
        return pooled[:, None]


def _adapted(model: Any, name: str, old: Any, pool: SimPool) -> nn.Module:
    """The pooling in the form that the model uses in place of `old`."""
    if isinstance(old, nn.LayerNorm):  # torchvision's ViT, which goes on with its first token alone
        return _NormAndPool(old, pool)
    if name == "attn_pool":  # an EVA gives its pooling all tokens
        return pool if hasattr(model, "pool_include_prefix") else _PatchPool(pool, model.num_prefix_tokens)
    given, returned = _watch(model, old)
    last, keeps = given.shape[1] != pool.out_dim, returned.ndim == 4
    return _MapPool(pool, channels_last=last, keeps_dims=keeps) if last or keeps else pool


def _place(model: Any) -> tuple[Any, str, int]:
    """Which attribute of what pools, and the width D. ValueError if that is unknown."""
    if hasattr(model, "attn_pool") and hasattr(model, "num_prefix_tokens"):  # ViTs of timm
        return model, "attn_pool", model.num_features
    encoder: Any = getattr(model, "encoder", None)
    if hasattr(model, "class_token") and isinstance(getattr(encoder, "ln", None), nn.LayerNorm):  # ViTs of torchvision
        return encoder, "ln", encoder.ln.normalized_shape[0]
    average = getattr(model, "avgpool", None)
    places = [(owner, "global_pool") for owner in (model, getattr(model, "head", None))]  # of timm: its own, or of its head
    if isinstance(average, nn.AdaptiveAvgPool2d) and average.output_size in (1, (1, 1)):  # of torchvision
        places.append((model, "avgpool"))
    for owner, name in places:
        old = getattr(owner, name, None)
        if not isinstance(old, nn.Module):
            continue
        try:
            given, returned = _watch(model, old)
        except ValueError:  # it is not used
            continue
        width = returned.numel()
        if given.ndim == 4 and given.numel() > width and width in (given.shape[1], given.shape[3]):
            return owner, name, width
    raise ValueError("there is no global pooling that SimPool can replace")


def _refused(model: Any, reason: str) -> str:
    known = "a ViT or CNN of timm, or a ViT of torchvision or a CNN of it that averages its last map"
    return f"{type(model).__name__}: {reason}: give {known}"


def _black_image(model: Any) -> Tensor:
    """A black image (1, 3, H, W) of a size that the model takes."""
    size: Any = getattr(model, "image_size", None)
    size = size or getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = size or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    parameter = next(model.parameters())
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, channels, height, width, device=parameter.device, dtype=parameter.dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; then every module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _probe(model: nn.Module) -> Tensor:
    """The output for a black image. ValueError if there is none."""
    try:
        with _evaluating(model):
            output = model(_black_image(model))
    except Exception as error:
        raise ValueError(f"a black image does not pass ({str(error)[:200]})") from error
    if not isinstance(output, Tensor):
        raise ValueError(f"it returns a {type(output).__name__}, not one tensor")
    return output


def _watch(model: nn.Module, module: nn.Module, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a module of the model is given, and returns, for images (None: a black one)."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _, given, returned: seen.append((given[0], returned)))
    try:
        if images is None:
            _probe(model)
        else:
            with _evaluating(model):
                model(images)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise ValueError(f"the pooling is used {len(seen)} times in a pass, not once")
    return seen[0]


def _grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens over an image: of all that have so many, those most like its
    sides. ValueError if none is near."""

    def distance(rows: int) -> float:
        return abs(math.log(rows * rows / tokens * width / height))

    rows = min((rows for rows in range(1, tokens + 1) if tokens % rows == 0), key=distance)
    if distance(rows) > math.log(2):
        raise ValueError(f"{tokens} tokens are no grid over an image of {height} x {width}: use sides that patches fill")
    return rows, tokens // rows
