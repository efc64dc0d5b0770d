"""The options of a pre-training run, each with its meaning and unit in the string under it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dino_simpool.config.data import CropsConfig, DataConfig
from dino_simpool.config.parts import MAX_SEED, MAX_SIZE, Options, check_device, option, path

Duration = int | float | str
"""Epochs (`10`, `0.5`, `10ep`), steps (`5000it`), images (`1e6img`), or share of the run (`5%`)."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_vit(arch: str) -> bool:
    """Whether this trunk is a ViT, which has tokens and patches. A CNN has maps."""
    return arch.startswith(("vit", "deit"))


def _not_divisible(name: str, size: int, patch: int) -> str:
    nearest = sorted({max(patch, size // patch * patch), -(-size // patch) * patch})
    use = " or ".join(map(str, nearest))
    return f"{name} {size} is not divisible by model.patch_size {patch}: use {use}, or another patch_size"


def parse_duration(value: Duration) -> tuple[float, str]:
    """Number and unit (ep, it, img or %) of a duration. ValueError if it is something else."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE]\+?\d+)?)\s*(ep|it|img|%)?", str(value).strip())
    if not match:
        raise ValueError(
            f"{value!r} is not a duration: give epochs (10 or 10ep), steps (5000it), images (1e6img) or a share (5%)"
        )
    return float(match[1]), match[2] or "ep"


def _check_duration(name: str, value: Duration, share: bool = True) -> None:
    try:
        number, unit = parse_duration(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if unit == "%" and (not share or number > 100):
        raise ValueError(f"{name} is {value}: " + ("a share is 0% to 100%" if share else "give epochs, steps or images"))
    longest = {"ep": 10**6, "it": 10**12, "img": 10**15, "%": 100}[unit]
    if number > longest:
        raise ValueError(f"{name} is {value}: allowed is up to {longest:,}{unit}")
    if not share and number == 0:
        raise ValueError(f"{name} is {value}: give a length above 0")


@dataclass(frozen=True)
class ModelConfig(Options):
    """The encoder: a timm trunk, a pooling head and the final norm. Stored in every checkpoint."""

    group = "model."
    arch: str = "vit_small"
    """vit_tiny|small|base, resnet18|50, convnext_tiny|small, or a ViT, ResNet, ConvNeXt of timm."""
    pool: Literal["simpool", "cls", "gap"] = "simpool"
    """simpool, or a baseline: cls (the class token, ViT only) or gap (global average pooling)."""
    gamma: float | None = option(None, least=0.01, most=100)
    """Exponent of SimPool's generalized mean; null (not `None`) is the plain average. Paper: 1.25
    for ViT, 2 for CNN."""
    num_heads: int = option(1, least=1, most=1024)
    """Attention heads of SimPool. Paper: 1."""
    beta: bool = False
    """Learnable scalar that is added after pooling, as in the published ViT weights (needs gamma).
    A norm after it cancels it."""
    min_over: Literal["image", "batch"] = "image"
    """Range of SimPool's minimum: the image (paper) or the batch (published training code)."""
    norm_order: Literal["pool_then_norm", "norm_then_pool"] = "pool_then_norm"
    """Place of the final norm. norm_then_pool: as in the published supervised ViTs."""
    pos_interp: Literal["size", "dino", "dino_always", "dino_legacy"] = "size"
    """How position embeddings are resized to another grid than their own, where they stay as they
    are. size: from grid to grid. dino: the published +0.1 rule, for official weights. dino_legacy:
    its first form. dino_always: dino, and at their own grid too, as the published SimPool code does
    on newer CPUs only, not on the GPUs that made its weights; models of 0.1 may have it."""
    stem: Literal["standard", "small"] = "standard"
    """small: 3x3, stride 1, no pooling, for CNNs on images of 32 to 64 pixels."""
    patch_size: int = option(16, least=1, most=MAX_SIZE)
    """Pixels along the side of a ViT patch."""
    width: int | None = option(None, least=1, most=65536)
    """Channels of ViT tokens, or of the first stage of a CNN. null: those of the architecture."""
    depth: int | tuple[int, ...] | None = option(None, least=1, most=1000)
    """Blocks of a ViT, or blocks per stage of a CNN. null: those of the architecture."""
    heads: int | None = option(None, least=1, most=1024)
    """Attention heads of a ViT block. null: the architecture's, or width / 64 if width is set."""
    drop_path: float = option(0.0, least=0, most=0.99)
    """Stochastic depth of the student, 0 to 1. The teacher's is teacher.drop_path."""
    image_size: int = option(224, least=1, most=MAX_SIZE)
    """Side in pixels, for which position embeddings are made and at which images are evaluated."""
    resize: int | None = option(None, least=1, most=2 * MAX_SIZE)
    """Shorter side of an image in pixels before evaluation crops its center. null: image_size * 256
    / 224, as published."""
    mean: tuple[float, float, float] = option(IMAGENET_MEAN, least=-10, most=10)
    """Mean that is subtracted from RGB values in 0..1."""
    std: tuple[float, float, float] = option(IMAGENET_STD, least=1e-3, most=1000)
    """Standard deviation that divides RGB values after the mean is subtracted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(
                f"model.resize is {self.resize}, less than the center crop, model.image_size {self.image_size}: give more"
            )
        if self.pool == "cls" and not self.is_vit:
            raise ValueError(f"model.pool cls needs a ViT, and {self.arch} has no class token: use gap or simpool")
        if isinstance(self.depth, tuple) and self.is_vit:
            raise ValueError(f"model.depth is {self.depth}, but {self.arch} has no stages: give the number of its blocks")
        if isinstance(self.depth, tuple) and not (1 <= len(self.depth) <= 4 and sum(self.depth) > 1):
            raise ValueError(
                f"model.depth is {self.depth}: give one to four numbers of blocks, each 1 or more, at least two blocks in all"
            )
        if self.beta and (self.pool != "simpool" or self.gamma is None):
            raise ValueError("model.beta exists only with pool simpool and a gamma: set model.gamma, or model.beta false")
        if self.norm_order == "norm_then_pool" and not self.is_vit:
            raise ValueError(f"model.norm_order norm_then_pool is for ViTs; {self.arch} has its norm after pooling or none")
        if self.stem == "small" and self.is_vit:
            raise ValueError(f"model.stem small is for CNNs; for small images give {self.arch} a smaller model.patch_size")
        if self.is_vit and self.image_size % self.patch_size:
            raise ValueError(_not_divisible("model.image_size", self.image_size, self.patch_size))

    @property
    def is_vit(self) -> bool:
        """Whether the trunk is a ViT."""
        return is_vit(self.arch)


@dataclass(frozen=True)
class HeadConfig(Options):
    """The DINO projection head on the encoder. It is dropped after training."""

    group = "head."
    out_dim: int = option(65536, least=2, most=2**24)
    """Number of prototypes K. For small data sets: a few hundred to a few thousand."""
    hidden_dim: int = option(2048, least=1, most=65536)
    """Width of the hidden layers."""
    bottleneck_dim: int = option(256, least=1, most=65536)
    """Width of the unit features that are compared with the prototypes."""
    layers: int = option(3, least=1, most=10)
    """Linear layers before the prototypes."""
    batch_norm: bool = False
    """BatchNorm after hidden layers, synchronized over processes. Published: true for ResNet-50."""
    norm_last_layer: bool = True
    """Keep prototypes at unit norm. Published: false for ViT-S only."""


@dataclass(frozen=True)
class TeacherConfig(Options):
    """The moving average of the student, which sets the targets, and its softmax temperature."""

    group = "teacher."
    momentum: float = option(0.996, least=0, most=1)
    """EMA momentum at step 0; it follows a cosine to 1. For small batches: 0.9995 or more."""
    warmup_temperature: float = option(0.04, least=1e-3, most=10)
    """Temperature at epoch 0."""
    temperature: float = option(0.07, least=1e-3, most=10)
    """Temperature after the warm-up."""
    warmup: Duration = 30
    """Length of the linear temperature warm-up (duration). The temperature changes between epochs
    only, and the length is rounded to whole epochs; below an epoch it changes between steps."""
    drop_path: float = option(0.0, least=0, most=0.99)
    """Stochastic depth of the teacher. 0.4 repeats an oversight of published ConvNeXt training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_duration("teacher.warmup", self.warmup)


@dataclass(frozen=True)
class LossConfig(Options):
    """Cross-entropy between views."""

    group = "loss."
    student_temperature: float = option(0.1, least=1e-3, most=10)
    """Temperature of the student's softmax."""
    center_momentum: float = option(0.9, least=0, most=1)
    """Momentum of the center that is subtracted from the teacher's logits."""


@dataclass(frozen=True)
class OptimConfig(Options):
    """The optimizer of the student."""

    group = "optim."
    name: Literal["adamw", "lars", "sgd"] = "adamw"
    """adamw (ViT, ConvNeXt), lars (ResNet-50) or sgd."""
    lr: float = option(5e-4, above=0, most=1000)
    """Peak learning rate for a global batch of 256 images; scaled by batch / 256."""
    min_lr: float = option(1e-5, least=0, most=1000)
    """Learning rate at the end; not scaled."""
    warmup: Duration = 10
    """Length of the linear warm-up of the learning rate (duration)."""
    weight_decay: float = option(0.04, least=0, most=100)
    """Weight decay at step 0, of tensors with two or more dimensions."""
    weight_decay_end: float = option(0.4, least=0, most=100)
    """Weight decay at the end; it follows a cosine."""
    momentum: float = option(0.9, least=0, most=0.9999)
    """Momentum of lars and sgd."""
    clip: float = option(0.0, least=0, most=10**6)
    """Largest L2 norm of the gradient of each parameter tensor. 0: no clipping."""
    freeze_last_layer: Duration = 1
    """How long the prototypes stay at their initial values (duration)."""
    freeze_encoder: Duration | None = None
    """How long the encoder of run.init stays as it is, bit for bit, while the head learns
    (duration). null: 10% for a new head, 0 for the head of the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_duration("optim.warmup", self.warmup)
        _check_duration("optim.freeze_last_layer", self.freeze_last_layer)
        if self.freeze_encoder is not None:
            _check_duration("optim.freeze_encoder", self.freeze_encoder)


@dataclass(frozen=True)
class RunConfig(Options):
    """Length, size, precision, and what is written where and how often."""

    group = "run."
    out: str = path("", "out", needed="run.out is empty: give the folder of this run")
    """Folder of this run. Run the same command again to resume."""
    init: str | None = path(None, "checkpoint")
    """Weights to start from: a checkpoint or an export, of a model with the same options. Its head
    is used if it has one of this size. It is read once: a run that is resumed does not need it."""
    epochs: Duration = 100
    """Length of the training (duration, not a share)."""
    batch_size: int = option(256, least=1, most=10**7)
    """Images in one optimizer step, over all processes and accumulation steps."""
    accumulate: int = option(1, least=1, most=10**6)
    """Forward and backward passes in one optimizer step. BatchNorm sees one pass at a time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the matrix products; parameters, center and loss stay in float32."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, mps, cuda or cuda:N."""
    compile: bool = False
    """torch.compile for trunk blocks, pooling and device augmentation; on one GPU also a CUDA graph
    of forward, loss and backward. The first step takes a minute or so."""
    seed: int = option(0, least=0, most=MAX_SEED)
    """Seed that determines every random number of the run."""
    threads: int | None = option(None, least=1, most=4096)
    """CPU threads of each process for arithmetic. null: torch decides."""
    log_every: int = option(50, least=1, most=10**6)
    """Steps between entries in log.jsonl and TensorBoard."""
    save_minutes: float = option(30.0, least=0, most=10**5)
    """Minutes between checkpoints within an epoch. One is also written after each epoch."""
    save_every_steps: int | None = option(None, least=1, most=10**9)
    """Also write a checkpoint each time this number of steps has passed. null: do not."""
    keep_every: int = option(20, least=0, most=10**6)
    """Epochs between checkpoints that are kept (epoch_0020.pth). 0: none."""
    knn_every: int = option(5, least=0, most=10**6)
    """Epochs between k-NN evaluations of the teacher, if knn_train and knn_val are given."""
    knn_train: str | None = path(None, "train")
    """Class folder, or an archive of one, that serves as the k-NN bank."""
    knn_val: str | None = path(None, "val")
    """Class folder, or an archive of one, whose images are classified."""
    knn_subset_per_class: int | None = option(None, least=1, most=10**9)
    """The bank is the first N images of each class in sorted order. null: all. The release takes
    data.subset_per_class for this too."""
    stop_after_steps: int | None = option(None, least=1, most=10**12)
    """Save and stop after this number of steps; schedules are not shortened. Run the same command
    again to resume."""
    max_minutes: float | None = option(None, above=0, most=10**6)
    """Save and stop after the step in which this many minutes have passed since the start. Run the
    same command again to resume."""

    max_bad_steps: int = option(5, least=1, most=10**6)
    """Steps in a row whose loss or gradients are not finite (each is left out) after which the run
    goes back to its last checkpoint, and stops if they come again before another one
    (nan_report.json)."""
    verify_every: int = option(0, least=0, most=10**9)
    """Compute the gradients of each N-th step twice, and stop if they differ in a bit: the device
    makes mistakes. Such a step takes three times as long. 0: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.knn_train is None) != (self.knn_val is None):
            raise ValueError("run.knn_train and run.knn_val belong together: give both class folders or neither")
        check_device("run.device", self.device)
        _check_duration("run.epochs", self.epochs, share=False)

    @property
    def resumes(self) -> bool:
        """Whether `out` has a checkpoint to go on from, so that `init` is not read."""
        return bool(self.out) and any((Path(self.out) / name).exists() for name in ("last.pth", "prev.pth"))

    def needs(self, option: str) -> bool:
        """Whether the path of this option is used as `path` declares it."""
        return option != "init" or not self.resumes


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines one pre-training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.optim.freeze_encoder is not None and not self.run.init and parse_duration(self.optim.freeze_encoder)[0]:
            raise ValueError(
                f"optim.freeze_encoder {self.optim.freeze_encoder} would keep random weights: give run.init, or leave it out"
            )
        if self.model.is_vit:
            for name, size in (("global_size", self.crops.global_size), ("local_size", self.crops.local_size)):
                if size % self.model.patch_size and (name == "global_size" or self.crops.num_local):
                    raise ValueError(_not_divisible(f"crops.{name}", size, self.model.patch_size))
