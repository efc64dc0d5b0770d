"""Our encoders under timm's names: after `import dino_simpool.timm_models`, timm.create_model finds

    vit_tiny_simpool  vit_small_simpool  vit_base_simpool  resnet18_simpool  resnet50_simpool
    convnext_tiny_simpool  convnext_small_simpool

with the exponents of the paper. `dino-simpool convert --to timm` writes files for checkpoint_path.

Letters: B images, N tokens, D width; (h, w) positions.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from dino_simpool.config import ConfigError, ModelConfig, from_dict, to_dict
from dino_simpool.models.encoder import Encoder, build_encoder

ARCHITECTURES = (
    "vit_tiny", "vit_small", "vit_base", "resnet18", "resnet50", "convnext_tiny", "convnext_small"
)  # fmt: skip
CHECKED = ("gamma", "num_heads", "beta", "min_over", "norm_order", "pos_interp", "heads")
"""Options of which no shape of a weight tells, or only some: they are stored with the weights."""


class SimPoolModel(nn.Module):
    """An encoder with the interface of timm's models, and a linear classifier.

    Weights carry the options that their shapes do not tell; others are refused (ValueError).
    num_classes: 0 for features.   drop_rate: dropout before the classifier.
    """

    def __init__(self, cfg: ModelConfig, *, num_classes: int = 0, drop_rate: float = 0.0, in_chans: int = 3) -> None:
        super().__init__()
        if in_chans != 3:
            raise ValueError(f"in_chans is {in_chans}: these models take images of 3 channels")
        self.encoder: Encoder = build_encoder(cfg)
        self.num_features = self.head_hidden_size = self.encoder.embed_dim
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """What is pooled: tokens (B, N, D), or a map (B, D, h, w)."""
        return self.encoder.pool_input(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of `forward_features`; pre_logits: features (B, D)."""
        feature = self.encoder.pooled(x)
        return feature if pre_logits else self.fc(self.drop(feature))

    def attention(self, x: Tensor) -> Tensor:
        """The attention of the pooling, (B, h, w), sum 1."""
        return self.encoder.attention(x)

    def get_classifier(self) -> nn.Module:
        """The classifier, Identity for num_classes 0."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier. ValueError for another pooling, which timm's own models have."""
        if global_pool not in (None, "simpool"):
            raise ValueError(f"global_pool is {global_pool}: these models pool with simpool, take timm's own for others")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_extra_state(self) -> Tensor:
        """The options that are checked, as the bytes of JSON."""
        own = to_dict(self.encoder.config)
        return torch.tensor(list(json.dumps({name: own[name] for name in CHECKED}).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """ValueError if the weights are of a model with other options, with those to give."""
        stored, own = json.loads(bytes(state.tolist())), to_dict(self.encoder.config)
        if other := {name: stored.get(name) for name in CHECKED if stored.get(name) != own[name]}:
            here = ", ".join(f"{name} {own[name]}" for name in other)
            given = ", ".join(f"{name}={value!r}" for name, value in other.items())
            raise ValueError(f"the weights are of a model with other options than {here}: give timm.create_model {given}")


def _config(**statistics: Any) -> dict[str, Any]:
    imagenet = ModelConfig()
    return {
        "num_classes": 0, "input_size": (3, 224, 224), "crop_pct": 224 / 256, "interpolation": "bicubic",
        "mean": imagenet.mean, "std": imagenet.std, "classifier": "fc", **statistics,
    }  # fmt: skip


FIRST = {"vit": "patch_embed.proj", "resnet": "conv1", "convnext": "stem.0"}
default_cfgs = generate_default_cfgs(
    {
        f"{arch}_simpool": _config(first_conv=f"encoder.trunk.{layer}")
        for arch in ARCHITECTURES
        for family, layer in FIRST.items()
        if arch.startswith(family)
    }
)


def _register(arch: str) -> None:
    """Register arch_simpool; gamma is the paper's, 1.25 for ViTs and 2 for CNNs."""
    own = ModelConfig(arch=arch, gamma=1.25 if arch.startswith("vit") else 2.0)

    def create(
        pretrained: bool = False,
        *,
        num_classes: int = 0,
        gamma: float | str | None = own.gamma,
        beta: bool = False,
        num_heads: int = 1,
        min_over: Literal["image", "batch"] = "image",
        norm_order: str = own.norm_order,
        pos_interp: str = own.pos_interp,
        img_size: int = 224,
        patch_size: int = 16,
        stem: str = "standard",
        width: int | None = None,
        depth: int | tuple[int, ...] | None = None,
        heads: int | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
    ) -> SimPoolModel:
        given = {
            "gamma": None if gamma == "none" else gamma, "beta": beta, "num_heads": num_heads, "min_over": min_over,
            "norm_order": norm_order, "pos_interp": pos_interp, "image_size": img_size, "patch_size": patch_size,
            "stem": stem, "width": width, "depth": depth, "heads": heads, "drop_path": drop_path_rate,
        }  # fmt: skip
        try:
            config = from_dict(ModelConfig, {**dataclasses.asdict(own), **given})
        except ConfigError as error:
            raise ValueError(f"{arch}_simpool: {error}") from None
        return build_model_with_cfg(
            SimPoolModel,
            f"{arch}_simpool",
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir,
            model_cfg=config,
            num_classes=num_classes,
            drop_rate=drop_rate,
            in_chans=in_chans,
        )

    create.__name__ = create.__qualname__ = f"{arch}_simpool"
    create.__doc__ = f"{arch} with SimPool. gamma: a number, or 'none' for the plain average."  # timm drops None
    register_model(create)


__all__ = ["SimPoolModel"]
for _arch in ARCHITECTURES:
    _register(_arch)
