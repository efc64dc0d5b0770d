"""The options of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field

from dino_simpool.config.data import CropsConfig
from dino_simpool.config.train import check_device


@dataclass(frozen=True)
class BenchKnnConfig:
    """Time and memory of k-NN and Recall@k, side by side with the published way and with bare matrix products."""

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
    """Numbers of neighbours (those of the published evaluation), each measured by itself, then all of them in one."""
    published_chunks: tuple[int, ...] = (100, 500)
    """Parts into which the published way cuts the queries: 100 in facebookresearch/dino, 500 in billpsomas/simpool."""
    noise: float = 3.0
    """Standard deviation of the features around the centre of their class, whose own is 1: how hard the classes are."""
    repetitions: int = 3
    """Rounds; in each one every way runs once. Medians are compared."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, mps, cuda or cuda:N."""
    seed: int = 0
    """Of the features."""

    def __post_init__(self) -> None:
        counts = (self.width, self.images, self.products, self.bank, self.queries, self.classes, self.repetitions)
        if min((*counts, *self.k, *self.published_chunks)) < 1 or not self.k or not self.published_chunks:
            raise ValueError("sizes, k, published_chunks and repetitions must be 1 or more")
        if max(self.k) > self.bank:
            raise ValueError(
                f"k is {max(self.k)}: the published way needs a bank of at least as many images, it is {self.bank}"
            )
        check_device("device", self.device)


@dataclass(frozen=True)
class BenchDataConfig:
    """Time from image files to views: the published recipe, both paths of this package, and decoding alone, side by side."""

    data: str | tuple[str, ...] = ""
    """Your images: whatever data.root of a training takes."""
    out: str = "bench"
    """Folder; data.json is written there."""
    images: int = 192
    """Images to measure with, evenly spread over the data."""
    batch_size: int = 16
    """Images that each way takes in turn."""
    repetitions: int = 3
    """Rounds over these images. Medians are compared."""
    loader_seconds: float = 4.0
    """How long each path runs in a loader with all workers; 0 leaves this out."""
    workers: int | None = None
    """Loader processes. null: the cores that this process may use."""
    device: str = "auto"
    """Where the device path is finished: auto (cuda, else mps, else cpu), cpu, mps, cuda or cuda:N."""
    device_batch: int | None = None
    """Images in a batch that is finished on the device. null: 128 on a GPU, 4 on a CPU."""
    compile: bool = False
    """Measure the device's part compiled by torch.compile."""
    seed: int = 0
    """Of the crops."""
    crops: CropsConfig = field(default_factory=CropsConfig)

    def __post_init__(self) -> None:
        if min(self.images, self.batch_size, self.repetitions, self.device_batch or 1) < 1:
            raise ValueError("images, batch_size, device_batch and repetitions must be 1 or more")
        if self.loader_seconds < 0 or (self.workers is not None and self.workers < 0):
            raise ValueError("loader_seconds and workers must be 0 or more")
        check_device("device", self.device)
