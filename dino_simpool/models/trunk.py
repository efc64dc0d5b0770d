"""Trunks: ViTs, ResNets and ConvNeXts from timm, without pooling and classifier, in any size.

Source: timm, whose blocks compute what the published self-supervised models compute. Deviations
from timm, as in facebookresearch/dino: the class token is drawn from a truncated normal of 0.02,
and the last BatchNorm of a residual branch starts at 1. Ours: the small stems (one 3x3 convolution
of stride 1, no pooling) and the widths and stages of CNNs for images of 32 to 64 pixels.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d
from torch import Tensor, nn

from dino_simpool.config import ModelConfig, is_vit
from dino_simpool.models.batch_norm import BatchNorm

MakeNorm = Callable[[int], nn.Module]
"""Makes the final norm of an encoder for features of this width."""
SHORT_NAMES = {f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")}
"""Our names for ViTs of timm. Its names for CNNs are short already."""


def find_arch(arch: str) -> tuple[str, str]:
    """Family ("vit", "resnet" or "convnext") and timm name of an architecture. ValueError, with the
    nearest name, if timm does not know it or it is of another family."""
    name = SHORT_NAMES.get(arch, arch)
    vits = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    known = {model: "vit" for model in vits if is_vit(model) and "distilled" not in model}
    known |= {model: family for family in ("resnet", "convnext") for model in timm.list_models(module=family)}
    if name in known:
        return known[name], name
    bare, _, tag = name.rpartition("/")[2].partition(".")
    if bare in known and bare != name:
        raise ValueError(
            f"model.arch is {arch}: the tag {tag or arch} names weights of others, and here training starts from random ones; "
            f"give the architecture, {bare}"
        )
    if timm.is_model(bare):
        module = timm.model_entrypoint(bare).__module__.rpartition(".")[2]
        raise ValueError(
            f"model.arch is {arch}, of timm's family {module}: allowed are the ViTs with one class token, ResNets and "
            "ConvNeXts of its modules vision_transformer, deit, resnet and convnext"
        )
    near = difflib.get_close_matches(arch, [*SHORT_NAMES, *known], 1)
    hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(SHORT_NAMES)}, resnet50, convnext_small or the like"
    raise ValueError(f"model.arch is {arch or 'empty'}, which timm does not know: {hint}")


def build_trunk(cfg: ModelConfig) -> tuple[Any, MakeNorm]:
    """Trunk of width `trunk.num_features`, and what makes its norm. ValueError if the architecture
    does not exist or the sizes do not fit it."""
    family, name = find_arch(cfg.arch)
    return {"vit": _vit, "resnet": _resnet, "convnext": _convnext}[family](name, cfg)


def _on_meta(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name)


def _vit(name: str, cfg: ModelConfig) -> tuple[Any, MakeNorm]:
    patch = re.search(r"patch(\d+)", cfg.arch)
    if patch and int(patch[1]) != cfg.patch_size:
        raise ValueError(
            f"model.patch_size is {cfg.patch_size}, but {cfg.arch} has patches of {patch[1]} pixels: set "
            f"model.patch_size {patch[1]}"
        )
    sizes: dict[str, Any] = {}
    if cfg.width or cfg.heads:
        width = cfg.width or _on_meta(name).embed_dim
        heads = cfg.heads or max(1, width // 64)
        if width % heads:
            raise ValueError(f"model.width {width} does not divide into {heads} heads: set model.heads to a divisor")
        sizes |= {"embed_dim": width, "num_heads": heads}
    if cfg.depth:
        sizes |= {"depth": cfg.depth}
    trunk: Any = timm.create_model(
        name,
        num_classes=0,
        global_pool="",
        final_norm=True,
        fc_norm=False,
        class_token=cfg.pool == "cls",
        img_size=cfg.image_size,
        patch_size=cfg.patch_size,
        dynamic_img_size=True,
        drop_path_rate=cfg.drop_path,
        **sizes,
    )
    if type(trunk.patch_embed.proj) is nn.Conv2d:
        trunk.patch_embed.proj.__class__ = PatchConv  # keeps its weights
    if trunk.cls_token is not None:
        nn.init.trunc_normal_(trunk.cls_token, std=0.02)
    norm, trunk.norm = trunk.norm, nn.Identity()
    return trunk, partial(norm.__class__, eps=norm.eps)


def _stages(cfg: ModelConfig, argument: str) -> dict[str, Any]:
    """timm's argument for the blocks of the four stages, if given; a stage left out has none."""
    if cfg.depth is None:
        return {}
    depth = cfg.depth if isinstance(cfg.depth, tuple) else (cfg.depth,) * 4
    return {argument: depth + (0,) * (4 - len(depth))}


class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel, computed as a product of matrices.

    The sums are the same. On an H200 it saves 2.5 of the 60 ms of a ViT-S's training step.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, h, w) of whole patches; the channels are last in memory."""
        down, across = self.kernel_size
        patches = x.unflatten(3, (-1, across)).unflatten(2, (-1, down)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class SubsampledConv(nn.Conv2d):
    """A strided 1x1 convolution, computed as one of stride 1 on the positions that it visits.

    The sums are the same. oneDNN (3.12, with torch 2.14) computes the weight gradient of the
    strided one out of bounds if the channels are last and fewer than its vectors hold (at most 16):
    processes crash, or train on wrong numbers. See github.com/uxlfoundation/oneDNN/issues/6035.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return nn.functional.conv2d(x[..., ::rows, ::columns], self.weight, self.bias)


def _resnet(name: str, cfg: ModelConfig) -> tuple[Any, MakeNorm]:
    sizes, simple = _stages(cfg, "layers"), isinstance(_on_meta(name).conv1, nn.Conv2d)
    if cfg.width:
        if cfg.width % 2 and not simple:
            raise ValueError(f"model.width is {cfg.width}: give an even number for {cfg.arch}")
        # timm has an even width for deep stems only; the single convolution is put back below.
        stem = -(-cfg.width // 2)
        sizes |= {"channels": tuple(cfg.width * 2**i for i in range(4)), "stem_width": stem, "stem_type": "deep"}
    trunk: Any = timm.create_model(
        name, num_classes=0, global_pool="", zero_init_last=False, drop_path_rate=cfg.drop_path, **sizes
    )
    if cfg.stem == "small" or (cfg.width and simple):
        last = trunk.conv1 if isinstance(trunk.conv1, nn.Conv2d) else trunk.conv1[-1]
        kernel, stride = (3, 1) if cfg.stem == "small" else (7, 2)
        trunk.conv1 = nn.Conv2d(3, cfg.width or last.out_channels, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
    if cfg.width and cfg.width % 2:
        _narrow(trunk, cfg.width)
    if cfg.stem == "small":
        trunk.maxpool = nn.Identity()
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) != module.stride and module.in_channels < 16:
            module.__class__ = SubsampledConv  # keeps its weights
        elif type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm
    trunk.num_features = trunk.feature_info[-1]["num_chs"]
    return trunk, nn.Identity


def _narrow(trunk: Any, width: int) -> None:
    """Make what follows the stem of a ResNet take `width` channels in place of one more."""
    first = trunk.layer1[0]
    trunk.bn1 = nn.BatchNorm2d(width)
    old = first.conv1
    first.conv1 = nn.Conv2d(width, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
    new = [first.conv1]
    if first.bn1.num_features != width or hasattr(first, "conv3"):
        first.downsample[0] = nn.Conv2d(width, first.downsample[0].out_channels, 1, bias=False)
        new.append(first.downsample[0])
    else:
        first.downsample = None  # as many channels come in as go out
    for convolution in new:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def _convnext(name: str, cfg: ModelConfig) -> tuple[Any, MakeNorm]:
    sizes = _stages(cfg, "depths")
    if cfg.width:
        sizes |= {"dims": tuple(cfg.width * 2**i for i in range(4))}
    trunk: Any = timm.create_model(
        name, num_classes=0, global_pool="", head_norm_first=False, head_hidden_size=None, drop_path_rate=cfg.drop_path, **sizes
    )
    num_stages = sum(len(stage.blocks) > 0 for stage in trunk.stages)
    trunk.stages = trunk.stages[:num_stages]
    trunk.num_features = trunk.feature_info[num_stages - 1]["num_chs"]
    if cfg.stem == "small":
        convolution = nn.Conv2d(3, trunk.feature_info[0]["num_chs"], 3, padding=1)
        nn.init.trunc_normal_(convolution.weight, std=0.02)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        trunk.stem = nn.Sequential(convolution, trunk.stem[-1])
    norm, trunk.head = trunk.head.norm, nn.Identity()
    # timm's norms of maps, for features: `convnext_zepto_rms` has another than LayerNorm.
    kinds = {LayerNorm2d: nn.LayerNorm, RmsNorm2d: RmsNorm, SimpleNorm2d: SimpleNorm}
    return trunk, partial(kinds[type(norm)], eps=norm.eps)
