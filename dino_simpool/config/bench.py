"""The options of the benchmarks, and of `resources`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dino_simpool.config.data import CropsConfig
from dino_simpool.config.parts import MAX_BATCH, MAX_SEED, MAX_SIZE, Checkpoint, Device, Workers, option, path
from dino_simpool.config.train import HeadConfig, ModelConfig


@dataclass(frozen=True)
class BenchKnnConfig(Device):
    """Time and memory of k-NN and Recall@k beside the published code and bare matrix products."""

    out: str = path("bench", "out")
    """Folder; knn.json is written there."""
    width: int = option(384, least=1, most=65536)
    """Dimensions of the features (384: ViT-S)."""
    images: int = option(60_502, least=1, most=10**8)
    """Queries of Recall@k, which are their own gallery (60,502: Stanford Online Products)."""
    products: int = option(11_316, least=1, most=10**8)
    """Classes of these images, of about equal size."""
    bank: int = option(128_000, least=1, most=10**8)
    """Training images of k-NN."""
    queries: int = option(5_000, least=1, most=10**8)
    """Test images of k-NN."""
    classes: int = option(1_000, least=1, most=10**6)
    """Classes of k-NN."""
    k: tuple[int, ...] = option((10, 20, 100, 200), least=1, most=10**6)
    """Numbers of neighbors (default: as published), each measured alone, then all in one search."""
    published_chunks: tuple[int, ...] = option((100, 500), least=1, most=10**6)
    """Number of parts that the published code splits the queries into: 100 in
    facebookresearch/dino, 500 in billpsomas/simpool."""
    noise: float = option(3.0, least=0, most=1000)
    """Standard deviation of the features around the center of their class; that of the centers is
    1. It sets how hard the classes are."""
    repetitions: int = option(3, least=1, most=1000)
    """Rounds; each runs every method once. Medians are compared."""
    seed: int = option(0, least=0, most=MAX_SEED)
    """Seed of the features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k or not self.published_chunks:
            raise ValueError("k and published_chunks must not be empty: give one or more numbers")
        if max(self.k) > self.bank:
            raise ValueError(f"k is {max(self.k)}: the published code needs at least as many images in the bank ({self.bank})")


@dataclass(frozen=True)
class BenchDataConfig(Workers, Device):
    """Time from image files to views: the published recipe, both paths here, and decoding alone."""

    data: str | tuple[str, ...] = path(
        "",
        "images",
        needed="no images are given: set data.root to a folder of images, an archive, or a text file with one path per line",
    )
    """Your images: anything that data.root of a training run takes."""
    out: str = path("bench", "out")
    """Folder; data.json is written there."""
    images: int = option(192, least=1, most=10**8)
    """Images to measure with, evenly spread over the data."""
    batch_size: int = option(16, least=1, most=MAX_BATCH)
    """Images that each method processes per turn."""
    repetitions: int = option(3, least=1, most=1000)
    """Rounds over these images. Medians are compared."""
    loader_seconds: float = option(4.0, least=0, most=3600)
    """Seconds that each path runs in a loader with all workers. 0 skips this measurement."""
    device_batch: int | None = option(None, least=1, most=MAX_BATCH)
    """Images in a batch that is finished on the device. null: 128 on a GPU, 4 on a CPU."""
    compile: bool = False
    """Measure the device's part compiled by torch.compile."""
    seed: int = option(0, least=0, most=MAX_SEED)
    """Seed of the crops."""
    crops: CropsConfig = field(default_factory=CropsConfig)


@dataclass(frozen=True)
class BenchStepConfig(Device):
    """One training step beside a plain one, which computes the same in the published way."""

    out: str = path("bench", "out")
    """Folder; step.json is written there."""
    preset: Literal["h100"] | None = None
    """h100: batch 128 and bf16 on any device, as on an H100 or H200."""
    batch_size: int | None = option(None, least=1, most=MAX_BATCH)
    """Images of a step. null: 128 on a GPU, 8 on a CPU."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Of our step. null: bf16 on a GPU, fp32 on a CPU."""
    plain_precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the plain step. null: that of ours, but fp16 beside bf16 on a GPU, as published."""
    compile: bool = False
    """Also measure our step with its blocks compiled by torch.compile."""
    repetitions: int = option(7, least=1, most=1000)
    """Rounds; each runs every way once. Medians are compared."""
    seed: int = option(0, least=0, most=MAX_SEED)
    """Seed of the views, which are random numbers."""
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)


@dataclass(frozen=True)
class ResourcesConfig(Checkpoint):
    """Parameters and multiply-adds of the encoder of a checkpoint, recipe or model options."""

    recipe: str = ""
    """A recipe whose model is counted: a file, or a name such as vit_small_simpool."""
    model: ModelConfig = field(default_factory=ModelConfig)
    num_classes: int = option(1000, least=0, most=10**6)
    """Classes of the linear classifier that is counted (Table 8: 1000). 0: the encoder alone."""
    image_size: int | None = option(None, least=1, most=MAX_SIZE)
    """Side of the image in pixels. null: that of the model."""
    out: str = path("", "out")
    """Folder for resources.json. Empty: results/ beside the checkpoint, or no file without one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint.startswith("timm:"):
            raise ValueError(
                f"checkpoint is {self.checkpoint}: encoders of this tool are counted, give --model.arch for a ViT, ResNet or "
                "ConvNeXt of timm"
            )
