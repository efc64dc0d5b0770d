"""The options of the benchmarks, and of `resources`."""

from __future__ import annotations

from dataclasses import dataclass, field

from dino_simpool.config.data import CropsConfig
from dino_simpool.config.parts import Checkpoint, Device, Workers, at_least
from dino_simpool.config.train import ModelConfig


@dataclass(frozen=True)
class BenchKnnConfig(Device):
    """Time and memory of k-NN and Recall@k beside the published code and bare matrix products."""

    out: str = "bench"
    """Folder; knn.json is written there."""
    width: int = 384
    """Dimensions of the features (384: ViT-S)."""
    images: int = 60_502
    """Queries of Recall@k, which are their own gallery (60,502: Stanford Online Products)."""
    products: int = 11_316
    """Classes of these images, of about equal size."""
    bank: int = 128_000
    """Training images of k-NN."""
    queries: int = 5_000
    """Test images of k-NN."""
    classes: int = 1_000
    """Classes of k-NN."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbors (default: as published), each measured alone, then all in one search."""
    published_chunks: tuple[int, ...] = (100, 500)
    """Number of parts that the published code splits the queries into: 100 in
    facebookresearch/dino, 500 in billpsomas/simpool."""
    noise: float = 3.0
    """Standard deviation of the features around the center of their class; that of the centers is
    1. It sets how hard the classes are."""
    repetitions: int = 3
    """Rounds; each runs every method once. Medians are compared."""
    seed: int = 0
    """Seed of the features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "width", "images", "products", "bank", "queries", "classes", "k", "published_chunks", "repetitions")
        if not self.k or not self.published_chunks:
            raise ValueError("k and published_chunks must not be empty: give one or more numbers")
        if max(self.k) > self.bank:
            raise ValueError(f"k is {max(self.k)}: the published code needs at least as many images in the bank ({self.bank})")


@dataclass(frozen=True)
class BenchDataConfig(Workers, Device):
    """Time from image files to views: the published recipe, both paths here, and decoding alone."""

    data: str | tuple[str, ...] = ""
    """Your images: anything that data.root of a training run takes."""
    out: str = "bench"
    """Folder; data.json is written there."""
    images: int = 192
    """Images to measure with, evenly spread over the data."""
    batch_size: int = 16
    """Images that each method processes per turn."""
    repetitions: int = 3
    """Rounds over these images. Medians are compared."""
    loader_seconds: float = 4.0
    """Seconds that each path runs in a loader with all workers. 0 skips this measurement."""
    device_batch: int | None = None
    """Images in a batch that is finished on the device. null: 128 on a GPU, 4 on a CPU."""
    compile: bool = False
    """Measure the device's part compiled by torch.compile."""
    seed: int = 0
    """Seed of the crops."""
    crops: CropsConfig = field(default_factory=CropsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "images", "batch_size", "device_batch", "repetitions")
        at_least(0, self, "loader_seconds")


@dataclass(frozen=True)
class ResourcesConfig(Checkpoint):
    """Parameters and multiply-adds of the encoder of a checkpoint, recipe or model options."""

    recipe: str = ""
    """A recipe whose model is counted: a file, or a name such as vit_small_simpool."""
    model: ModelConfig = field(default_factory=ModelConfig)
    num_classes: int = 1000
    """Classes of the linear classifier that is counted (Table 8: 1000). 0: the encoder alone."""
    image_size: int | None = None
    """Side of the image in pixels. null: that of the model."""
    out: str = ""
    """Folder for resources.json. Empty: results/ beside the checkpoint, or no file without one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "num_classes")
        at_least(1, self, "image_size")
