"""Encoders of timm as they are, for evaluation: `timm:NAME` in place of a checkpoint.

They are timm's models without a classifier, with their own normalization, size, class token and
registers, so that every evaluator compares them with ours. What is returned equals that of
`timm.create_model(NAME, num_classes=0)`. Their attention is that of the class token, or of the
learned query of an attention pooling, in the last attention layer.

Letters: B images, N tokens, D width; (H, W) pixels, (h, w) positions.
"""

from __future__ import annotations

import difflib
import math
import os
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_url, try_to_load_from_cache
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dino_simpool.config import ConfigError, from_dict
from dino_simpool.config.parts import Options
from dino_simpool.logs import say
from dino_simpool.models.encoder import Encoder, Grid
from dino_simpool.models.weights import load_official, load_strict, read_file, unwrapped

PREFIX = "timm:"
RANDOM = "random"
SAFE = "model.safetensors"
"""The name of the file in most repositories of timm."""
POOLS = {"token": "cls", "avg": "gap", "map": "attention"}
"""timm's words for poolings, and ours."""
TRAINING_ONLY = ("mask_token", "mask_tokens")
"""Weights in files that their encoder does not use."""


@dataclass(frozen=True)
class TimmConfig(Options):
    """What evaluators ask of an encoder, and what the record of a result says about it."""

    group = "model."
    arch: str = ""
    """timm:NAME."""
    pool: str = ""
    """cls, gap, attention, or timm's word for another."""
    source: str = ""
    """The name of the file of its weights, random, or where timm got them."""
    image_size: int = 224
    """Side in pixels."""
    resize: int | None = None
    """Shorter side in pixels before the center crop."""
    patch_size: int | None = None
    """Pixels along the side of a patch, null for an encoder without patches of one size."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def is_vit(self) -> bool:
        """Whether it has tokens of patches."""
        return self.patch_size is not None


class TimmEncoder(Encoder):
    """A model of timm with what evaluators use of an `Encoder`."""

    config: TimmConfig  # type: ignore[assignment]

    def __init__(self, model: Any, config: TimmConfig, *, any_size: bool) -> None:
        nn.Module.__init__(self)
        self.trunk, self.config, self.any_size = model, config, any_size
        self.norm = nn.Identity()
        self.pool = _Head(model)
        self.embed_dim = int(getattr(model, "head_hidden_size", None) or model.num_features)

    def forward(self, images: Tensor) -> Tensor:
        return self._run(self.trunk, images)

    def tokens(self, images: Tensor) -> Tensor:
        """The last tokens (B, N, D), without class token and registers; row by row."""
        x, _ = self.pool_input(images)
        if x.ndim == 4:
            x = x.flatten(1, 2) if self._channels_last else x.flatten(2).transpose(1, 2)
        return x[:, self._prefix :]

    def pool_input(self, images: Tensor) -> tuple[Tensor, Grid]:
        """The last tokens (B, prefix + N, D) or map, and the grid (h, w) of positions."""
        x = self._run(self.trunk.forward_features, images)
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            raise ValueError(f"{self.config.arch} has no tokens or maps that are known here: use its features")
        if patch := self.config.patch_size:
            return x, (images.shape[-2] // patch, images.shape[-1] // patch)
        side = math.isqrt(x.shape[1] - self._prefix) if x.ndim == 3 else 0
        if side:
            return x, (side, side)
        height, width = x.shape[1:3] if self._channels_last else x.shape[2:4]
        return x, (height, width)

    def attention(self, images: Tensor, *, per_head: bool = False) -> Tensor:
        """Attention maps (B, h, w), means over heads; per_head: (B, heads, h, w). Each sums to 1.

        They are those of the class token, or of an attention pooling, in the last attention layer;
        what goes to class token and registers is left out. ValueError if there is none.
        """
        pooled = isinstance(getattr(self.trunk, "attn_pool", None), nn.Module)
        if getattr(self.trunk, "cls_token", None) is None and not pooled:
            raise ValueError(f"{self.config.arch} has no class token, and so no attention maps: use an encoder that has one")
        with _LastAttention(self.trunk) as last:
            self._run(self.trunk if pooled else self.trunk.forward_features, images)
        patch = self.config.patch_size or 1
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        weights = last.of_first_query()
        if weights is None or weights.shape[-1] != self._prefix + grid[0] * grid[1]:
            raise ValueError(f"{self.config.arch} has no attention over its patches in the last layer that can be shown")
        weights = weights[..., self._prefix :]
        weights = weights if per_head else weights.mean(1, keepdim=True)
        maps = (weights / weights.sum(-1, keepdim=True)).unflatten(-1, grid)
        return maps if per_head else maps[:, 0]

    @property
    def _prefix(self) -> int:
        """Class token and registers, which come first."""
        token = getattr(self.trunk, "cls_token", None) is not None
        return int(getattr(self.trunk, "num_prefix_tokens", token))

    @property
    def _channels_last(self) -> bool:
        return str(getattr(self.trunk, "output_fmt", "NCHW")) in ("NHWC", "Format.NHWC")

    def _run(self, function: Callable[[Tensor], Any], images: Tensor) -> Any:
        """The function of images, without the pixels beyond a multiple of the patch size.

        ValueError for a size that the encoder does not take."""
        size = self.config.image_size
        if not self.any_size and images.shape[-2:] != (size, size):
            raise ValueError(
                f"{self.config.arch} takes images of {size} x {size} pixels only, not {images.shape[-2]} x {images.shape[-1]}"
            )
        if patch := self.config.patch_size:
            images = images[..., : images.shape[-2] // patch * patch, : images.shape[-1] // patch * patch]
        try:
            return function(images)
        except (AssertionError, RuntimeError) as error:
            if images.shape[-2:] == (size, size) or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).partition("\n")[0][:120]
            raise ValueError(
                f"{self.config.arch} cannot take images of {images.shape[-2]} x {images.shape[-1]} pixels, its own are "
                f"{size} x {size} ({reason})"
            ) from error


class _Head:
    """timm's pooling of a model, with the norm that follows. Not a module: its weights are in the
    trunk."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.model.forward_head(x)
        return pooled


class _LastAttention(TorchFunctionMode):
    """Keeps what the last attention layer computes from: its fused kernel returns no attention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = [module for module in model.modules() if hasattr(module, "fused_attn")]
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, float | None]] = []

    def __enter__(self) -> _LastAttention:
        self._fused = [layer.fused_attn for layer in self.layers]
        self._hooks = [layer.register_forward_pre_hook(lambda *_: self.calls.clear()) for layer in self.layers]
        for layer in self.layers:
            layer.fused_attn = True  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for layer, fused, hook in zip(self.layers, self._fused, self._hooks, strict=True):
            layer.fused_attn = fused
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            query, key = (kwargs.get(name, args[i] if len(args) > i else None) for i, name in enumerate(("query", "key")))
            self.calls.append((query, key, mask, kwargs.get("scale")))
        return func(*args, **kwargs)

    def of_first_query(self) -> Tensor | None:
        """Attention (B, heads, N) of the first query; None if the last layer made not just one."""
        if len(self.calls) != 1 or self.calls[0][0].ndim != 4:
            return None
        query, key, mask, scale = self.calls[0]
        kind = torch.promote_types(query.dtype, torch.float32)
        scores = query[:, :, :1].to(kind) @ key.to(kind).transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
        if mask is not None:
            first = mask.expand(*mask.shape[:-2], query.shape[2], key.shape[2])[..., :1, :]
            scores = scores.masked_fill(~first, -math.inf) if mask.dtype == torch.bool else scores + first
        return scores.softmax(-1)[:, :, 0]


def load_timm(
    name: str, *, weights: str = "", which: str = "teacher", overrides: Mapping[str, Any] | None = None
) -> TimmEncoder:
    """An encoder of timm with a classifier of none, in evaluation mode on the CPU.

    name: timm:NAME, with timm's tag of its weights or without.   weights: a file, `random` (of seed
    0), or "" for those that timm downloads.   which: teacher, or untrained for random weights.
    overrides: image_size, resize, mean, std. ValueError or OSError in one line.
    """
    bare = name.removeprefix(PREFIX)
    arch = bare.partition(".")[0]
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), 1)
        raise ValueError(
            f"timm does not know {arch or 'an empty name'}: "
            + (f"did you mean {PREFIX}{near[0]}?" if near else "give timm:NAME")
        )
    if which == "student":
        raise ValueError(f"{name} has no student weights: leave out which, or give which untrained")
    weights = RANDOM if which == "untrained" else weights
    tags = [model.partition(".")[2] for model in timm.list_models(f"{arch}.*", pretrained=True)]
    if "." in bare and bare.partition(".")[2] not in tags:
        raise ValueError(f"timm has no weights {bare}: its tags are {', '.join(tags) or 'none'}")
    with torch.random.fork_rng(devices=[]):
        model, dynamic = _create(bare)
    source = weights
    if not weights:
        source = _download(model, name)
    elif weights != RANDOM:
        _load(model, _state_in(load_official(weights)), source=weights)
    data = resolve_model_data_config(model)
    size, patches = int(data["input_size"][-1]), getattr(getattr(model, "patch_embed", None), "feat_ratio", None)
    given = {
        option: value for option, value in (overrides or {}).items() if option not in ("arch", "pool", "patch_size", "source")
    }
    if given.pop("min_over", "image") != "image":
        raise ValueError(f"min_over batch is for SimPool, and {name} has none: leave it out")
    own: dict[str, Any] = {
        "arch": name,
        "pool": _pool_of(model),
        "source": os.path.basename(source) if weights and weights != RANDOM else source,
        "image_size": size,
        "resize": math.floor(size / data["crop_pct"]) if "image_size" not in given else None,
        "patch_size": int(patches()) if patches and hasattr(model, "num_prefix_tokens") else None,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
    }
    try:
        config = from_dict(TimmConfig, own | given)
    except ConfigError as error:
        raise ConfigError(f"the options of {name}: {error}") from None
    kind = data["interpolation"]
    said = f"its own are resized by {kind} interpolation, here by bicubic; " if kind != "bicubic" else ""
    say(
        f"{name}: weights: {source}{' of seed 0' * (source == RANDOM)}; pool {config.pool}; images of {config.image_size} "
        f"pixels, {said}mean {' '.join(map(str, config.mean))}, std {' '.join(map(str, config.std))}"
    )
    fixed = bool(model.pretrained_cfg.get("fixed_input_size", False))
    return TimmEncoder(model, config, any_size=dynamic or not fixed).eval()


def _pool_of(model: Any) -> str:
    """How a model pools, in our words where there is one."""
    kind = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", None)
    word = kind if isinstance(kind, str) else getattr(kind, "pool_type", None)
    return POOLS.get(str(word), str(word or "own"))


def _create(name: str) -> tuple[Any, bool]:
    """A model of timm with random weights of seed 0, and whether it was told to take any size."""
    tries: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {})
    for options in tries:
        torch.manual_seed(0)
        try:
            return timm.create_model(name, num_classes=0, **options), bool(options)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
    raise AssertionError("the last try has no options")


def _download(model: Any, name: str) -> str:
    """Load what timm published; returns where it is from."""
    known = model.pretrained_cfg
    place, file = known.get("hf_hub_id"), known.get("hf_hub_filename")
    if not place and not known.get("url"):
        raise ValueError(f"timm has no weights of {name}: give --weights FILE, or --weights {RANDOM}")
    what = f"{file or SAFE} of huggingface.co/{place}" if place else known["url"]
    cached = try_to_load_from_cache(place, file or SAFE) if place else None
    try:
        if isinstance(cached, str):
            state = read_file(cached)
        elif place and not known.get("custom_load"):
            _reach(hf_hub_url(place, file or SAFE))
            state = timm.models.load_state_dict_from_hf(place, *([file] if file else []))
        else:
            url = known.get("url") or hf_hub_url(place, file)
            _reach(url)
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # of several libraries: no network, no such file, no room
        reason = str(error).strip().partition("\n")[0][:100]
        raise ValueError(
            f"the weights of {name} cannot be downloaded ({reason}): give --weights FILE, {what}, or --weights {RANDOM}"
        ) from error
    _load(model, _state_in(state), source=what)
    return what


def _reach(url: str) -> None:
    """OSError if there is no way to a server. The libraries that download try for a minute."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10):
            pass
    except urllib.error.HTTPError:
        pass  # it answers; what it says about the file is for the libraries
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # libraries may know other certificates
            raise OSError(f"{urllib.parse.urlsplit(url).hostname} is not reached, {error.reason}") from error


def _state_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in the content of a file."""
    for place in ("state_dict_ema", "model_ema", "state_dict", "teacher", "model"):
        if isinstance(content.get(place), Mapping):
            content = content[place]
            break
    return {unwrapped(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _load(model: Any, state: dict[str, Tensor], *, source: str) -> None:
    """Load all weights of a model, translated by timm if they have the names of their authors."""
    own = model.state_dict()
    if not all(name in state and state[name].shape == value.shape for name, value in own.items()):
        module = sys.modules[timm.model_entrypoint(model.pretrained_cfg["architecture"]).__module__]
        translate = getattr(module, "checkpoint_filter_fn", None)
        try:
            state = dict(translate(state, model)) if translate else state
        except (KeyError, RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(f"{source} does not hold weights of {model.pretrained_cfg['architecture']}: {error}") from error
    classifiers = model.pretrained_cfg.get("classifier") or ()
    dropped = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    kept = {
        name: value for name, value in state.items() if name in own or not (name.startswith(dropped) or name in TRAINING_ONLY)
    }
    load_strict(model, kept, source=os.fspath(source))
