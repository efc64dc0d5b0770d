"""The encoder (timm trunk, pooling, final norm), the DINO head on it, and the two together as student and teacher.

Source: the self-supervised models of "Keep It SimPool" (ICCV 2023) and facebookresearch/dino. Order of an encoder:

    ViT        blocks -> pool -> norm   (norm_order norm_then_pool: blocks -> norm -> pool, the published supervised ViTs)
    ResNet     stages -> pool           ConvNeXt   stages -> pool -> norm

Without the class-token pooling a ViT has no class token at all. Deviations from timm: the class token starts from a truncated
normal of 0.02 and the last BatchNorm of a residual branch from 1, both as in DINO; position embeddings go from grid to grid by
a constant matrix, which repeats the published interpolation to the last digit and costs one small product.

Letters: B images, V views, N tokens, D width, K prototypes; (H, W) pixels, (h, w) positions.
"""
from __future__ import annotations

import copy
import difflib
import itertools
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.layers import Attention, DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from dino_simpool.config import ModelConfig
from dino_simpool.simpool import ClsPool, GapPool, SimPool, as_tokens

RECIPES = {f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")}
"""Our short names; those of the CNNs are timm's own."""

Grid = tuple[int, int]


@lru_cache(maxsize=32)
def position_matrix(native: Grid, grid: Grid, rule: str, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Matrix (h * w, rows) that takes a position embedding from its native grid to another by bicubic interpolation.

    native, grid: positions (down, across).   rule: "size" resamples from grid to grid, antialiased like timm; "dino" (and
    "dino_always") is the published rule, scale (h + 0.1) / native, not antialiased; "dino_legacy" divides by the square root of
    (rows + 1) instead, an early version of the published code that took the missing class token for a position.
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
        assert matrix.shape[-2:] == grid
        return matrix.view(rows, -1).T.contiguous().to(dtype).to(device)


class Encoder(nn.Module):
    """A timm trunk with a pooling and a final norm: images in, one feature an image out.

    Images are (B, 3, H, W), normalised with config.mean and config.std, of any size; a ViT drops the pixels beyond a multiple of
    its patch. An image smaller than a patch, or a CNN map under 2 x 2, is a ValueError.
    """

    def __init__(self, trunk: nn.Module, pool: nn.Module, *, norm: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.trunk, self.pool, self.norm, self.config = trunk, pool, norm, config
        self.embed_dim: int = trunk.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D)."""
        pooled = self.pool(self._pooled_input(images)[0])
        return pooled if self._norm_first else self.norm(pooled)

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens (B, N, D) that are pooled, row by row, without class token or registers; for a CNN its last map."""
        x, _ = self._pooled_input(images)
        return x[:, self._prefix:] if isinstance(self.pool, ClsPool) else as_tokens(x)

    def attention(self, images: Tensor) -> Tensor:
        """Attention maps (B, h, w), each with the sum 1.

        SimPool: its own attention. Class token: its self-attention in the last block, mean over the heads, patches only. Global
        average: uniform, as this pooling weighs them.
        """
        if not isinstance(self.pool, ClsPool):
            x, grid = self._pooled_input(images)
            return self.pool(x, return_attention=True)[1].reshape(-1, *grid)
        tokens, grid = self._embed(images)
        for block in self.trunk.blocks[:-1]:
            tokens = block(tokens)
        return class_attention(self.trunk.blocks[-1], tokens, num_prefix=self._prefix).unflatten(1, grid)

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
            if min(grid) < 2:
                raise ValueError(
                    f"{self.config.arch} turns images of {images.shape[-2]} x {images.shape[-1]} pixels into a {grid[0]} x "
                    f"{grid[1]} map, 2 x 2 is the least: set model.stem small, fewer stages in model.depth, or larger images")
            return x, grid
        tokens, grid = self._embed(images)
        tokens = self.trunk.blocks(tokens)
        if self._norm_first:
            tokens = self.norm(tokens)
        return tokens if isinstance(self.pool, ClsPool) else tokens[:, self._prefix:], grid

    def _embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens (B, prefix + N, D) that enter the first block of a ViT, and their grid."""
        trunk, (height, width), patch = self.trunk, images.shape[-2:], self.config.patch_size
        grid = (height // patch, width // patch)
        if not all(grid):
            raise ValueError(f"images of {height} x {width} pixels are smaller than a patch of {self.config.arch}: give at least "
                             f"{patch} pixels a side, or set a smaller model.patch_size")
        x = trunk.patch_embed(images[..., :grid[0] * patch, :grid[1] * patch]).flatten(1, 2)
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
        if grid == native and (rule == "size" or rule == "dino" and square):
            return embedding
        matrix = position_matrix(native, grid, rule, device=embedding.device, dtype=embedding.dtype)
        with torch.autocast(embedding.device.type, enabled=False):
            return matrix @ embedding


def class_attention(block: nn.Module, tokens: Tensor, *, num_prefix: int) -> Tensor:
    """Attention (B, N) of the first token to the patches in a ViT block, mean over its heads, scaled to the sum 1.

    tokens: (B, num_prefix + N, D) before the block. It is computed here because the fused kernels do not return it.
    """
    layer = getattr(block, "attn", None)
    if not isinstance(layer, Attention):
        raise ValueError(f"{type(block).__name__} has no plain self-attention to show: use pool simpool, or a standard ViT")
    query, key, _ = layer.qkv(block.norm1(tokens)).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = layer.q_norm(query[:, :, :1]) * layer.scale @ layer.k_norm(key).transpose(-2, -1)
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)[:, :, 0, num_prefix:].mean(1)
    return weights / weights.sum(1, keepdim=True)


def find_arch(arch: str) -> tuple[str, str]:
    """Family ("vit", "resnet" or "convnext") and timm name of an architecture; a ValueError with the nearest name otherwise."""
    name = RECIPES.get(arch, arch)
    known = {model: "vit" for module in ("vision_transformer", "deit") for model in timm.list_models(module=module)
             if model.startswith(("vit", "deit")) and "distilled" not in model}
    known |= {model: family for family in ("resnet", "convnext") for model in timm.list_models(module=family)}
    if name in known:
        return known[name], name
    if timm.is_model(name):
        raise ValueError(f"model.arch is {arch}, which is in timm but of another family: allowed are its ViTs, ResNets and ConvNeXts")
    nearest = difflib.get_close_matches(arch, [*RECIPES, *known], 1, cutoff=0)
    raise ValueError(f"model.arch is {arch}, which timm does not know: did you mean {nearest[0]}?")


def build_encoder(cfg: ModelConfig) -> Encoder:
    """A freshly initialised encoder; a ValueError if the options do not go together. The one place where encoders are made."""
    family, name = find_arch(cfg.arch)
    build = {"vit": _vit, "resnet": _resnet, "convnext": _convnext}[family]
    trunk, norm = build(name, cfg)
    if cfg.pool != "simpool":
        return Encoder(trunk, ClsPool() if cfg.pool == "cls" else GapPool(), norm=norm, config=cfg)
    pool = SimPool(trunk.num_features, gamma=cfg.gamma, num_heads=cfg.num_heads, beta=cfg.beta, min_over=cfg.min_over)
    if family != "resnet":
        for linear in (pool.q, pool.k):
            nn.init.trunc_normal_(linear.weight, std=0.02)
    return Encoder(trunk, pool, norm=norm, config=cfg)


def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def _vit(name: str, cfg: ModelConfig) -> tuple[nn.Module, nn.Module]:
    patch = re.search(r"patch(\d+)", cfg.arch)
    if patch and int(patch[1]) != cfg.patch_size:
        raise ValueError(f"model.patch_size is {cfg.patch_size}, but {cfg.arch} has patches of {patch[1]}: set model.patch_size {patch[1]}")
    sizes: dict[str, int] = {}
    if cfg.width or cfg.heads:
        width = cfg.width or _on_meta(name).embed_dim
        heads = cfg.heads or max(1, width // 64)
        if width % heads:
            raise ValueError(f"model.width {width} does not divide into {heads} heads: set model.heads to a divisor")
        sizes |= {"embed_dim": width, "num_heads": heads}
    if isinstance(cfg.depth, tuple):
        raise ValueError(f"model.depth is {cfg.depth}, but {cfg.arch} has no stages: give the number of its blocks")
    if cfg.depth:
        sizes |= {"depth": cfg.depth}
    trunk = timm.create_model(name, num_classes=0, global_pool="", final_norm=True, fc_norm=False, class_token=cfg.pool == "cls",
                              img_size=cfg.image_size, patch_size=cfg.patch_size, dynamic_img_size=True,
                              drop_path_rate=cfg.drop_path, **sizes)
    if trunk.cls_token is not None:
        nn.init.trunc_normal_(trunk.cls_token, std=0.02)
    norm, trunk.norm = trunk.norm, nn.Identity()
    return trunk, norm


def _stages(cfg: ModelConfig) -> dict[str, Any]:
    """Blocks in each of the four stages of a CNN, as far as given; stages that are left out have none."""
    if cfg.depth is None:
        return {}
    depth = cfg.depth if isinstance(cfg.depth, tuple) else (cfg.depth,) * 4
    if not 1 <= len(depth) <= 4 or min(depth) < 1 or sum(depth) < 2:
        raise ValueError(f"model.depth is {cfg.depth}: give one to four numbers of blocks, each 1 or more, two blocks in all")
    return {"depth": depth + (0,) * (4 - len(depth))}


def _resnet(name: str, cfg: ModelConfig) -> tuple[nn.Module, nn.Module]:
    sizes: dict[str, Any] = {"layers": stages["depth"]} if (stages := _stages(cfg)) else {}
    plain_stem = False
    if cfg.width:
        if cfg.width % 2:
            raise ValueError(f"model.width is {cfg.width}: give an even number for {cfg.arch}")
        plain_stem = isinstance(_on_meta(name).conv1, nn.Conv2d)
        # timm has a width for its deep stems only; the single convolution is put back below.
        sizes |= {"channels": tuple(cfg.width * 2 ** i for i in range(4)), "stem_width": cfg.width // 2, "stem_type": "deep"}
    trunk = timm.create_model(name, num_classes=0, global_pool="", zero_init_last=False, drop_path_rate=cfg.drop_path, **sizes)
    if plain_stem or cfg.stem == "small":
        last = trunk.conv1 if isinstance(trunk.conv1, nn.Conv2d) else trunk.conv1[-1]
        kernel, stride = (3, 1) if cfg.stem == "small" else (7, 2)
        trunk.conv1 = nn.Conv2d(3, last.out_channels, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
    if cfg.stem == "small":
        trunk.maxpool = nn.Identity()
    trunk.num_features = trunk.feature_info[-1]["num_chs"]
    return trunk, nn.Identity()


def _convnext(name: str, cfg: ModelConfig) -> tuple[nn.Module, nn.Module]:
    sizes: dict[str, Any] = {"depths": stages["depth"]} if (stages := _stages(cfg)) else {}
    if cfg.width:
        sizes |= {"dims": tuple(cfg.width * 2 ** i for i in range(4))}
    trunk = timm.create_model(name, num_classes=0, global_pool="", head_norm_first=False, head_hidden_size=None,
                              drop_path_rate=cfg.drop_path, **sizes)
    num_stages = sum(len(stage.blocks) > 0 for stage in trunk.stages)
    trunk.stages = trunk.stages[:num_stages]
    trunk.num_features = trunk.feature_info[num_stages - 1]["num_chs"]
    if cfg.stem == "small":
        norm = trunk.stem[-1]
        trunk.stem = nn.Sequential(nn.Conv2d(3, trunk.feature_info[0]["num_chs"], 3, padding=1), norm)
        nn.init.trunc_normal_(trunk.stem[0].weight, std=0.02)
        nn.init.zeros_(trunk.stem[0].bias)
    eps, trunk.head = trunk.head.norm.eps, nn.Identity()
    return trunk, nn.LayerNorm(trunk.num_features, eps=eps)


class DinoHead(nn.Module):
    """Projection of DINO: linear layers with GELU, a unit sphere, and the prototypes, which the head owns but the loss applies.

    dim: width D of the features.   out_dim: prototypes K.   layers: linear layers fc1, fc2, ... before the sphere.
    batch_norm: BatchNorm bn1, bn2, ... after each but the last.   norm_last_layer: the prototypes keep the norm 1.
    """

    def __init__(self, dim: int, out_dim: int, *, hidden_dim: int = 2048, bottleneck_dim: int = 256, layers: int = 3,
                 batch_norm: bool = False, norm_last_layer: bool = True) -> None:
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
    """Encoder and head: the student, and copied by `make_teacher` the teacher."""

    def __init__(self, encoder: Encoder, head: DinoHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Unit features (V, B, bottleneck) of V views (B, 3, S, S), the global ones first.

        The trunk runs once for each run of views of one size, the head once over all V * B rows, view by view: so BatchNorm of
        the trunk sees one resolution at a time, that of the head everything, as published.
        """
        runs = itertools.groupby(views, key=lambda view: view.shape[-2:])
        features = torch.cat([self.encoder(torch.cat(list(run))) for _, run in runs])
        return self.head(features).unflatten(0, (len(views), -1))


def make_teacher(student: DinoModel, drop_path: float = 0.0) -> DinoModel:
    """A copy of the student without gradients, in training mode, with its own stochastic depth.

    drop_path: rate of the last block; the others keep their share of it. A rate needs a student that has one (ValueError).
    """
    rate = student.encoder.config.drop_path
    if drop_path and not rate:
        raise ValueError(f"teacher.drop_path is {drop_path}, but the student has no stochastic depth: set model.drop_path too")
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = module.drop_prob * drop_path / rate if drop_path else 0.0
    return teacher
