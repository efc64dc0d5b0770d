"""What a file of weights of others is: family, sizes, pooling, and how its images were prepared.

Sources: training.md (a) on the published code; the files of facebookresearch/dino, of SimPool's
self-supervised and supervised code, of timm and torchvision. Shapes say most; arguments that are
stored beside the weights say more; what neither says is asked for. Nothing is guessed silently:
every option comes with the reason for its value.

A size is read from several weights and the most frequent value counts, so that one weight of
another shape is named by the strict check, and does not change the model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import timm
import torch
from torch import Tensor

from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from dino_simpool.models.encoder import Encoder
from dino_simpool.models.weights import (
    COLUMNS,
    ENCODERS,
    OURS,
    Layout,
    first_names,
    head_rows,
    rename_known,
    split,
    stripped,
    to_official,
    translate,
)

FAMILY = {"blocks.": "vit", "patch_embed.": "vit", "layer1.": "resnet", "stages.": "convnext", "downsample_layers.": "convnext"}
"""The beginning of a name that only this family has."""
VITS = {(192, 12): "vit_tiny", (384, 12): "vit_small", (768, 12): "vit_base"}
RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
CONVNEXTS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (3, 3, 9, 3)): "convnext_tiny",
    (96, (3, 3, 27, 3)): "convnext_small",
    (128, (3, 3, 27, 3)): "convnext_base",
    (192, (3, 3, 27, 3)): "convnext_large",
}
_LAYER = "encoder.layers.encoder_layer_#"
TORCHVISION: tuple[tuple[str, str], ...] = (
    ("class_token", "cls_token"),
    ("encoder.pos_embedding", "pos_embed"),
    ("conv_proj.*", "patch_embed.proj.*"),
    (f"{_LAYER}.ln_1.*", "blocks.#.norm1.*"),
    (f"{_LAYER}.ln_2.*", "blocks.#.norm2.*"),
    (f"{_LAYER}.self_attention.in_proj_*", "blocks.#.attn.qkv.*"),
    (f"{_LAYER}.self_attention.out_proj.*", "blocks.#.attn.proj.*"),
    (f"{_LAYER}.mlp.0.*", "blocks.#.mlp.fc1.*"),
    (f"{_LAYER}.mlp.3.*", "blocks.#.mlp.fc2.*"),
    (f"{_LAYER}.mlp.linear_#.*", "blocks.#.mlp.fc#.*"),  # older files
    ("encoder.ln.*", "norm.*"),
    ("heads.head.*", "head.*"),
    ("features.0.#.*", "stem.#.*"),
    *((f"features.{2 * stage}.#.*", f"stages.{stage}.downsample.#.*") for stage in (1, 2, 3)),
    *(
        (f"features.{2 * stage + 1}.#.{theirs}", f"stages.{stage}.blocks.#.{ours}")
        for stage in range(4)
        for theirs, ours in (
            ("block.0.*", "conv_dw.*"),
            ("block.2.*", "norm.*"),
            ("block.3.*", "mlp.fc1.*"),
            ("block.5.*", "mlp.fc2.*"),
            ("layer_scale", "gamma"),
        )
    ),
    ("classifier.0.*", "head.norm.*"),
    ("classifier.2.*", "head.fc.*"),
)
"""torchvision's names of ViTs and ConvNeXts, and timm's. Those of ResNets are the same."""
TORCHVISION_ONLY = {"conv_proj.weight", "encoder.pos_embedding", "features.0.0.weight", "features.0.1.weight"}
"""Names by which files of them are told."""
HALF = (0.5, 0.5, 0.5)
IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
OTHER = "for any encoder of timm, give the checkpoint timm:NAME and the file with --weights"


@dataclass
class Recognized:
    """A file of weights of others, and what it says about its model."""

    source: str
    """The file, for messages."""
    given: Mapping[str, Any]
    """Options of the caller, which win."""
    kind: str = ""
    layout: Layout = "dino"
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Under the names of an `Encoder`."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """A DINO head, under published names. It is left out, after a look at whether it is whole."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `ModelConfig`."""
    why: dict[str, str] = field(default_factory=dict)
    """Of these options: where the value comes from."""
    notes: list[str] = field(default_factory=list)
    epochs: float | None = None
    total_epochs: float | None = None
    answers: Mapping[str, Any] = field(default_factory=dict)
    """Options of the caller for what the file does not tell."""

    def set(self, name: str, value: Any, why: str) -> None:
        """An option that is known."""
        self.options[name], self.why[name] = value, why

    def ask(self, name: str, reason: str, example: str) -> None:
        """Take the caller's word for an option that the file does not tell. ValueError without."""
        if name in self.given:
            return
        if name in self.answers:
            self.given = {**self.given, name: self.answers[name]}
        else:
            option = example.replace("=", " ")
            raise ValueError(f"{self.source} does not say {name} ({reason}): give {example}, in a command --model.{option}")

    def check(self, encoder: Encoder) -> None:
        """ValueError, with the names of the file, unless its weights are exactly the encoder's, and
        the classifier, if there is one, is whole. What is not the encoder's is left out then."""
        own = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in self.weights.items()}
        if any(name.startswith("classifier.") for name in found):
            weight, bias = found.get("classifier.weight", ()), found.get("classifier.bias", ())
            classes = weight[0] if len(weight) == 2 else bias[0] if len(bias) == 1 else 0
            expected = own | {"classifier.weight": (classes, encoder.embed_dim), "classifier.bias": (classes,)}
            self.notes.append(f"its classifier of {classes} classes is left out")
        else:
            expected = own
        names = [name for name in {**expected, **found} if name.startswith(("trunk.", "pool.", "norm.", "classifier."))]
        published = to_official({name: torch.empty(0) for name in names}, layout=self.layout)
        theirs = dict(zip(names, (name.removeprefix("backbone.") for name in published), strict=True))
        problems = {
            "missing": [theirs[name] for name in expected if name not in found],
            "unknown": [theirs.get(name, name) for name in found if name not in expected],
            "other shape": [
                f"{theirs[n]} {found[n]} for {shape}" for n, shape in expected.items() if n in found and found[n] != shape
            ],
        }
        for kind, names in _head_problems(self.head, encoder.embed_dim).items():
            problems[kind] += names
        if any(problems.values()):
            said = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in problems.items() if names)
            inferred = ", ".join(f"{name} {_shown(value)}" for name, value in self.options.items() if name in _SIZES)
            raise ValueError(f"the weights of {self.source} do not fit the model that they say, {inferred} ({said}); {OTHER}")
        self.weights = {name: value for name, value in self.weights.items() if name in own}

    def describe(self, which: str) -> str:
        """What was recognized, in a line: each option with its reason."""
        usual = {option.name: option.default for option in fields(ModelConfig)}
        changed = {
            name: value
            for name, value in self.given.items()
            if name != "min_over" and _shown(value) != _shown(self.options.get(name, usual.get(name)))
        }
        values = {**self.options, **changed}
        said = [f"{name} {_shown(value)} ({'given' if name in changed else self.why[name]})" for name, value in values.items()]
        if self.options["pool"] == "simpool":
            batch = self.given.get("min_over") == "batch"
            said.append("min_over batch (given)" if batch else "min_over image (min_over=batch repeats the published code)")
        return f"{self.source}: {self.kind}, {which} weights: {'; '.join([*said, *self.notes])}"


_SIZES = ("arch", "width", "depth", "heads", "patch_size", "image_size", "pool", "beta")


def recognize(
    content: Mapping[str, Any], *, which: str, given: Mapping[str, Any], source: str, answers: Mapping[str, Any] | None = None
) -> Recognized:
    """What the content of a file of others (`load_official`) is.

    which: teacher (of a supervised file the moving average, if there is one) or student. given:
    options of `ModelConfig` that the caller knows; answers: for those alone that the file does not
    tell. source: the file, for messages. ValueError in one line if it is no ViT, ResNet or
    ConvNeXt, or if something must be given.
    """
    found = Recognized(source, given, answers=answers or {})
    try:
        state = stripped(content, which)
        encoder, found.head = _parts(state)
    except ValueError as error:
        raise ValueError(f"{source} holds no encoder of others: {error}") from None
    torchvision = encoder.keys() & TORCHVISION_ONLY
    if torchvision:
        encoder = {
            translate(name, TORCHVISION) or name: value.flatten() if name.endswith("layer_scale") else value
            for name, value in encoder.items()
        }
    args = vars(content["args"]) if hasattr(content.get("args"), "__dict__") else content.get("args")
    args = args if isinstance(args, dict) else {}
    full = "teacher" in content or "student" in content
    family = next((kind for begin, kind in FAMILY.items() if any(name.startswith(begin) for name in encoder)), "")
    if not family:
        raise ValueError(f"{source} has no ViT, ResNet or ConvNeXt (its weights: {first_names(encoder)}); {OTHER}")
    layouts: dict[Layout, tuple[dict[str, Tensor], list[str]]] = {
        layout: rename_known(encoder, ENCODERS[family], layout) for layout in ("dino", "supervised")
    }
    # A stray name, or one that is missing, must not decide: the layout that knows most names does.
    found.layout = min(layouts, key=lambda layout: len(layouts[layout][1]))
    weights, unknown = layouts[found.layout]
    classifier = any(name.startswith("classifier.") for name in weights)
    if unknown and len(unknown) > len(weights) // 4:
        raise ValueError(f"{source} is no {family} that is known here (its weights: {first_names(unknown)}); {OTHER}")
    found.weights = weights | {name: encoder[name] for name in unknown}
    simpool = any(name.startswith("pool.") for name in weights)
    own = full or any(name.startswith("backbone.") for name in state)  # of the self-supervised code
    timms = classifier or "state_dict" in content or "state_dict_ema" in content
    supervised = not own and (found.layout == "supervised" if simpool else timms)
    found.kind = _kind(
        full=full, simpool=simpool, supervised=supervised, ema="state_dict_ema" in content and which == "teacher"
    )
    {"vit": _vit, "resnet": _resnet, "convnext": _convnext}[family](found, simpool=simpool, supervised=supervised, args=args)
    if simpool:
        _gamma(found, args, which=which, self_supervised_vit=family == "vit" and not supervised)
    of_imagenet = family != "vit" or bool(torchvision)
    _normalization(found, content, args, of_imagenet=of_imagenet, simpool=simpool, supervised=supervised)
    if not supervised:
        epoch, total = content.get("epoch"), args.get("epochs")
        found.epochs = float(epoch) if isinstance(epoch, int) else None
        found.total_epochs = float(total) if isinstance(total, int | float) else None
    return found


def _parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoder and head of a state dict, under published names, without prefixes."""
    if any(name.startswith(OURS) for name in state):
        raise ValueError(
            "these are bare weights of this tool, without the options of their model: give last.pth, or backbone.safetensors "
            "with model.json beside it"
        )
    encoder, head = split(state)
    if not state:
        raise ValueError("it has no weights, give a checkpoint of a run or a file of weights")
    if not encoder:
        raise ValueError(f"there is a head but no encoder ({first_names(head)}): give a file with an encoder")
    return encoder, head


def _head_problems(head: Mapping[str, Tensor], width: int) -> dict[str, list[str]]:
    """Names, as in the file, of what a DINO head on features of this width lacks, has beyond, or
    has in another shape. Nothing without prototypes: what is no whole head is not looked at."""
    problems: dict[str, list[str]] = {"missing": [], "unknown": [], "other shape": []}
    if not any(name.startswith("last_layer.") for name in head):
        return problems
    rows = head_rows(head)
    ours, unknown = rename_known(head, rows, "dino")
    found = {name: tuple(value.shape) for name, value in ours.items()}
    layers = max((int(match[1]) for name in found if (match := re.match(r"fc(\d+)\.", name))), default=0)
    last = "last_layer.parametrizations.weight.original"

    def common(*sizes: tuple[str, int]) -> int:
        """The most frequent of sizes, each a dimension of a matrix or vector."""
        shapes = ((found.get(name, ()), dimension) for name, dimension in sizes)
        values = Counter(shape[dimension] for shape, dimension in shapes if len(shape) in (1, 2) and dimension < len(shape))
        return values.most_common(1)[0][0] if values else 0

    outputs = [(name, 0) for i in range(1, layers) for name in (f"fc{i}.weight", f"fc{i}.bias")]
    hidden = common(*outputs) if outputs else 0
    bottleneck = common((f"fc{layers}.weight", 0), (f"fc{layers}.bias", 0), (f"{last}1", 1))
    prototypes = common((f"{last}0", 0), (f"{last}1", 0))
    sizes = [width, *[hidden] * (layers - 1), bottleneck]
    expected: dict[str, tuple[int, ...]] = {f"{last}0": (prototypes, 1), f"{last}1": (prototypes, bottleneck)}
    for i in range(1, layers + 1):
        expected |= {f"fc{i}.weight": (sizes[i], sizes[i - 1]), f"fc{i}.bias": (sizes[i],)}
        if i < layers and any(name.startswith("bn") for name in found):
            expected |= {f"bn{i}.{name}": (sizes[i],) for name in ("weight", "bias", "running_mean", "running_var")}
            expected |= {f"bn{i}.num_batches_tracked": ()}
    back = [(row[COLUMNS["ours"]], f"head.{row[COLUMNS['dino']]}") for row in rows]
    theirs = {name: translate(name, back) or name for name in (*expected, *found)}
    problems["missing"] = [theirs[name] for name in expected if name not in found]
    problems["unknown"] = [theirs[name] for name in found if name not in expected] + [f"head.{name}" for name in unknown]
    wrong = [name for name, shape in expected.items() if name in found and found[name] != shape]
    problems["other shape"] = [f"{theirs[name]} {found[name]} for {expected[name]}" for name in wrong]
    return problems


def _kind(*, full: bool, simpool: bool, supervised: bool, ema: bool) -> str:
    if supervised:
        return ("supervised SimPool file" if simpool else "supervised file of timm or torchvision") + ", its EMA" * ema
    return f"official {'SimPool' if simpool else 'DINO'} {'checkpoint' if full else 'backbone'}"


def _common(found: Recognized, *sizes: tuple[str, int]) -> int:
    """The most frequent of sizes, each a dimension of the weights whose names match a pattern."""
    values: Counter[int] = Counter()
    for pattern, dimension in sizes:
        for name, value in found.weights.items():
            if re.fullmatch(pattern, name) and -value.ndim <= dimension < value.ndim:
                values[value.shape[dimension]] += 1
    if not values:
        missing = first_names([pattern.replace("\\", "").removeprefix("trunk.") for pattern, _ in sizes])
        raise ValueError(f"{found.source} lacks the weights that say its size (such as {missing}); {OTHER}")
    return values.most_common(1)[0][0]


def _count(found: Recognized, pattern: str) -> int:
    """One more than the largest number that the group of a pattern matches in names."""
    return max((int(match[1]) for name in found.weights if (match := re.match(pattern, name))), default=-1) + 1


def _need(found: Recognized, name: str, theirs: str, ndim: int) -> Tensor:
    """A weight from which a size is read. ValueError, naming it, if it is missing or misshapen."""
    value = found.weights.get(name)
    if value is None:
        raise ValueError(f"{found.source} has no {theirs}, which this family needs (other names: {first_names(found.weights)})")
    if value.ndim != ndim:
        raise ValueError(f"{theirs} in {found.source} has the shape {tuple(value.shape)}: it must have {ndim} dimensions")
    return value


def _vit(found: Recognized, *, simpool: bool, supervised: bool, args: Mapping[str, Any]) -> None:
    width = _common(
        found,
        ("norm.weight", 0),
        ("trunk.pos_embed", -1),
        ("trunk.patch_embed.proj.weight", 0),
        (r"trunk\.blocks\.\d+\.norm\d\.weight", 0),
    )
    depth = _count(found, r"trunk\.blocks\.(\d+)\.")
    projection = _need(found, "trunk.patch_embed.proj.weight", "patch_embed.proj.weight", 4)
    patch, given_patch = projection.shape[-1], args.get("patch_size")
    if projection.shape[1] != 3 or projection.shape[2] != patch or (given_patch and given_patch != patch):
        said = f", and its arguments say patches of {given_patch}" if given_patch else ""
        shape = tuple(projection.shape)
        raise ValueError(
            f"patch_embed.proj.weight in {found.source} has the shape {shape}{said}: (width, 3, patch, patch) is needed"
        )
    positions = _need(found, "trunk.pos_embed", "pos_embed", 3)
    rows, token = positions.shape[1], "trunk.cls_token" in found.weights
    legacy = simpool and not token and not _square(rows) and _square(rows - 1)
    average = not simpool and not token and supervised and _square(rows)
    pool = "simpool" if simpool else "gap" if average else "cls"  # a missing class token is named by the strict check
    if not _square(rows - (pool == "cls" or legacy)):
        raise ValueError(
            f"pos_embed in {found.source} has {rows} rows, which make no square grid of patches"
            f"{' beside a class token' * (pool == 'cls')}: the file is damaged, or {OTHER}"
        )
    side = math.isqrt(rows - (pool == "cls" or legacy))
    arch = VITS.get((width, depth), "")
    found.set("arch", arch or "vit_small", "from its shapes")
    found.set("patch_size", patch, "from its shapes")
    if not arch:
        found.set("width", width, "from its shapes")
        found.set("depth", depth, "from its shapes")
        if width % 64 or found.answers.get("heads"):  # the caller's word counts more than a convention
            found.ask("heads", f"no shape tells it, and the width {width} is no multiple of 64", "heads=3")
        else:
            found.set("heads", width // 64, "width / 64, as in all published sizes")
    found.set("image_size", side * patch, "from its shapes")
    found.set("pool", pool, "from its names")
    if legacy:
        found.weights["trunk.pos_embed"] = positions[:, 1:]
        found.set("pos_interp", "dino_legacy", f"{rows} rows without a class token, an early version; the first is dropped")
    elif supervised:
        found.set("pos_interp", "size", "as in timm")
    else:
        found.set("pos_interp", "dino", "the published rule")
    if pool != "cls" and supervised:
        found.set("norm_order", "norm_then_pool", "as in supervised ViTs")
    elif simpool:
        found.set("norm_order", "pool_then_norm", "as published")


def _square(rows: int) -> bool:
    return rows > 0 and math.isqrt(rows) ** 2 == rows


def _stages(found: Recognized, pattern: str) -> tuple[int, ...]:
    """The numbers of blocks of the stages that exist."""
    blocks = [_count(found, pattern.replace("STAGE", str(stage))) for stage in range(5)]
    return tuple(number for number in blocks if number)


def _resnet(found: Recognized, *, simpool: bool, supervised: bool, args: Mapping[str, Any]) -> None:
    block = "bottleneck" if any(".conv3." in name for name in found.weights) else "basic"
    depth = _stages(found, r"trunk\.layerSTAGE\.(\d+)\.")
    width = _common(
        found, (r"trunk\.conv1\.weight", 0), (r"trunk\.bn1\.(weight|bias)", 0), (r"trunk\.layer1\.0\.conv1\.weight", 0)
    )
    kernel = _need(found, "trunk.conv1.weight", "conv1.weight", 4).shape[-1]
    arch = RESNETS.get((block, depth), "")
    found.set("arch", arch or {"basic": "resnet18", "bottleneck": "resnet50"}[block], "from its names and shapes")
    _cnn(found, depth=None if arch else depth, width=width if width != 64 else None, small=kernel == 3, simpool=simpool)


def _convnext(found: Recognized, *, simpool: bool, supervised: bool, args: Mapping[str, Any]) -> None:
    depth = _stages(found, r"trunk\.stages\.STAGE\.blocks\.(\d+)\.")
    width = _common(found, (r"trunk\.stem\.\d\.(weight|bias)", 0), (r"trunk\.stages\.0\.blocks\.\d+\.norm\.(weight|bias)", 0))
    stem = "stem.0.weight" if found.layout == "supervised" else "downsample_layers.0.0.weight"
    kernel = _need(found, "trunk.stem.0.weight", stem, 4).shape[-1]
    arch = CONVNEXTS.get((width, depth), "")
    found.set("arch", arch or "convnext_tiny", "from its names and shapes")
    _cnn(found, depth=None if arch else depth, width=None if arch else width, small=kernel == 3, simpool=simpool)


def _cnn(found: Recognized, *, depth: tuple[int, ...] | None, width: int | None, small: bool, simpool: bool) -> None:
    if width:
        found.set("width", width, "from its shapes")
    if depth:
        found.set("depth", depth, "from its names")
    if small:
        found.set("stem", "small", "from its shapes")
    found.set("pool", "simpool" if simpool else "gap", "from its names")


def _gamma(found: Recognized, args: Mapping[str, Any], *, which: str, self_supervised_vit: bool) -> None:
    stored, has = args.get("gamma"), "gamma" in args
    stored = None if stored in (None, "None", "none", "") else float(stored)
    beta = "pool.beta" in found.weights
    if beta:
        found.set("beta", True, "it is there")
    if self_supervised_vit and beta and which == "teacher":
        said = f"; its arguments say {stored:g}" if has and stored not in (None, 1.25) else ""
        found.set("gamma", 1.25, f"that of the published teacher of a ViT with beta{said}")
    elif self_supervised_vit and not beta:
        if has and stored is not None and "gamma" not in found.given:
            raise ValueError(
                f"{found.source} has no simpool.beta, but its arguments say gamma {stored:g}, with which a ViT has one: "
                "copy the file again, or give gamma=None if it is meant, in a command --model.gamma null"
            )
        found.set("gamma", None, "as it has no beta")
    elif has:
        found.set("gamma", stored, "from its arguments")
    else:
        found.ask("gamma", "no weight tells it, and there are no arguments", "gamma=1.25" if beta else "gamma=2.0")


def _normalization(
    found: Recognized,
    content: Mapping[str, Any],
    args: Mapping[str, Any],
    *,
    of_imagenet: bool,
    simpool: bool,
    supervised: bool,
) -> None:
    """Mean, standard deviation and size of the images."""
    if not supervised:
        for name in ("mean", "std"):
            found.set(name, IMAGENET[name], "as published")
        return
    arch = content.get("arch") or args.get("model")
    known = timm.get_pretrained_cfg(arch) if isinstance(arch, str) and timm.is_model(arch) else None
    size = found.options.get("image_size", 224)
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    if simpool:  # the preprocessing of the fork's defaults
        mean = std = None if of_imagenet else HALF
        crop, why = (0.9 if not of_imagenet else 0.95 if found.options["arch"] == "resnet50" else 0.875), "as published"
    elif known is not None:
        mean, std, crop, why = known.mean, known.std, known.crop_pct, f"timm's for {arch}"
    elif not of_imagenet:
        reason = "ImageNet's for DeiT and torchvision, 0.5 for other ViTs of timm"
        found.ask("mean", reason, "mean=[0.5,0.5,0.5]")
        found.ask("std", reason, "std=[0.5,0.5,0.5]")
        return
    else:
        mean, std, crop, why = None, None, 0.875, "ImageNet's, as for torchvision and most CNNs of timm"
    for name, value in (("mean", mean), ("std", std)):
        own = args.get(name)
        value = tuple(own) if isinstance(own, list | tuple) and len(own) == 3 else value or IMAGENET[name]
        found.set(name, value, "from its arguments" if own else why)
    crop = args.get("crop_pct") or crop
    found.set("resize", math.floor(size / crop), f"{size} / {crop:g}, {'from its arguments' if args.get('crop_pct') else why}")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else "null" if value is None else str(value)
