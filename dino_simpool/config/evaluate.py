"""The options of the evaluators, of the report and of the embedded data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dino_simpool.config.data import MAX_PIXELS
from dino_simpool.config.train import ModelConfig, check_device


@dataclass(frozen=True)
class EvalConfig:
    """What every evaluator needs to know."""

    checkpoint: str = ""
    """A training checkpoint (last.pth, best.pth) or an exported backbone.safetensors."""
    data: str = ""
    """Folder with the class folders train/ and val/, or with train.tar and val.tar, or .zip, in their place."""
    out: str = ""
    """Folder for results; <evaluator>.json is written there. Empty: results/ beside the checkpoint."""
    which: Literal["teacher", "student", "untrained"] = "teacher"
    """Weights to take; untrained: the same encoder as its initialisation left it, for comparison."""
    min_over: Literal["image", "batch"] = "image"
    """Over what SimPool takes its minimum, whatever the training did. batch repeats the released code, whose features depend on
    the other images of the batch."""
    train: str = "train"
    """Class folder (DIR/CLASS/IMAGE) to learn from, or archive of one, inside data."""
    val: str = "val"
    """Class folder to measure on, or archive of one, inside data."""
    subset_per_class: int | None = None
    """Learn from the first so many images of each class in sorted order."""
    image_size: int | None = None
    """Side of the square that the encoder sees, in pixels. null: as the model was made."""
    resize: int | None = None
    """Shorter side before the centre crop, in pixels. null: as the model was made; for another image_size: * 256 / 224."""
    batch_size: int = 128
    """Images in one forward pass of one process."""
    workers: int | None = None
    """Loader processes. null: the cores that this process may use."""
    exif_orientation: bool = False
    """Turn images as their EXIF tag says, as viewers do. The published numbers were made without."""
    max_pixels: int = MAX_PIXELS
    """An image with more pixels is not decoded but counts as broken, which ends the evaluation."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, mps, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the encoder; similarities are float32 always."""
    seed: int = 0
    """Of the probe's initialisation, shuffling and augmentation. Untrained weights come from the seed of the run."""

    def __post_init__(self) -> None:
        counts = (self.batch_size, self.subset_per_class, self.image_size, self.resize)
        if min(1 if count is None else count for count in counts) < 1:
            raise ValueError("batch_size, subset_per_class, image_size and resize must be 1 or more")
        if self.workers is not None and self.workers < 0:
            raise ValueError("workers must be 0 or more")
        if self.max_pixels < 1:
            raise ValueError("max_pixels must be 1 or more")
        check_device("device", self.device)


@dataclass(frozen=True)
class KnnConfig(EvalConfig):
    """Weighted k-NN classification of frozen features."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; the first is the one reported (paper: 10)."""
    temperature: float = 0.07
    """A neighbour with cosine similarity s votes with exp(s / temperature)."""
    features: Literal["encoder", "pixels"] = "encoder"
    """pixels: the raw pixels of the image instead of the encoder's features, for comparison."""


@dataclass(frozen=True)
class LinearConfig(EvalConfig):
    """Linear classification of frozen features."""

    protocol: Literal["paper", "grid"] = "paper"
    """paper: augmented images, 100 epochs, best over the validation epochs as published; grid: features extracted once, many
    learning rates trained together, the best chosen on a held-out part of train."""
    epochs: int = 100
    """Passes over the training images."""
    lr: float = 1e-3
    """Learning rate of the paper protocol for a global batch of 256; scaled by batch / 256."""
    probe_batch_size: int = 1024
    """Global batch size of the probe's training."""
    grid: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    """Learning rates of the grid protocol for a batch of 256; scaled by batch / 256."""
    held_out: float = 0.1
    """Share of each training class on which the grid's learning rate is chosen."""


@dataclass(frozen=True)
class RetrievalConfig(EvalConfig):
    """Retrieval of landmarks: ROxford and RParis with their three protocols, mAP and mP@1, 5, 10."""

    data: str = ""
    """Folder that holds roxford5k/ or rparis6k/, with jpg/ and gnd_<name>.pkl (or .json) in it."""
    dataset: Literal["roxford5k", "rparis6k"] = "roxford5k"
    """The data set."""
    preset: Literal["dino_default", "dino_readme", "ibot", "strict"] = "dino_default"
    """How images are prepared, where the paper is silent. dino_default: 224 pixels; dino_readme: for RParis 512 and three
    scales; ibot: 512 and three scales; strict: the same with queries cut to their landmark, as the data sets' authors demand.
    The next three options change one of its settings."""
    image_size: int | None = None
    """Longest side in pixels; smaller images are never enlarged. null: the preset's."""
    multi_scale: bool | None = None
    """Mean of the features at the scales 1, 0.71 and 0.5. null: the preset's."""
    query_crop: bool | None = None
    """Only the landmark's box of a query is seen. null: the preset's."""
    whitening_data: str = ""
    """Folder, or text file of paths, of other images from which a whitening of the features is learned, for ROxford usually
    rparis6k/jpg. Empty: none, as in the paper."""
    whitening_dim: int | None = None
    """Dimensions that the whitening keeps. null: 256, or the width of the features if that is less."""
    distractors: str = ""
    """More images for the database, all of them negatives: a folder, an archive or a text file of paths; or their features
    (images, width), of this encoder and preset, as a .npy file."""
    batch_size: int = 1
    """Always 1, since each image has its own size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size != 1:
            raise ValueError(f"batch_size is {self.batch_size}: retrieval takes 1, since each image has its own size")
        if self.subset_per_class is not None or self.resize is not None:
            raise ValueError("retrieval has no subset_per_class and no resize: image_size is the longest side of its images")
        if self.whitening_dim is not None and (self.whitening_dim < 1 or not self.whitening_data):
            raise ValueError(f"whitening_dim is {self.whitening_dim}: give 1 or more, and whitening_data to learn from")


@dataclass(frozen=True)
class RecallConfig(EvalConfig):
    """Fine-grained retrieval, Recall@k, on the test images of a metric-learning data set."""

    data: str = ""
    """Folder that holds the data set's own folder (CUB_200_2011, cars196, Stanford_Online_Products, Inshop_Clothes), or with
    the layout folder the class folders."""
    layout: Literal["cub200", "cars196", "sop", "inshop", "folder"] = "folder"
    """The data set, or folder: CLASS/IMAGE, all of it test."""
    preset: Literal["dino_eval", "dml_eval"] = "dino_eval"
    """How images are resized, where the paper is silent. dino_eval: bicubic, as for k-NN; dml_eval: bilinear, as the
    metric-learning code of the paper's authors."""
    k: tuple[int, ...] = ()
    """Numbers of neighbours. Empty: the columns of the paper's table, 1 2 4 (cub200, cars196, folder), 1 10 100 (sop) or
    1 10 20 (inshop)."""
    ties: Literal["published", "stable", "optimistic"] = "published"
    """Which of equally similar images is nearer. stable: the lower index; optimistic: one of the query's class; published:
    optimistic for inshop, stable for the others."""
    map_at_r: bool = True
    """Also R-precision and MAP@R, by a second search. It takes long where classes have thousands of images."""
    tile: int | None = None
    """Side of the blocks of similarities, in images; no result depends on it. null: 1024 on a CPU, else 8192."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset_per_class is not None:
            raise ValueError("recall has no subset_per_class: every test image is a query")
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"tile is {self.tile}: give 1 or more")


@dataclass(frozen=True)
class MasksConfig(EvalConfig):
    """Share of the attention that falls on the object, on images with masks (the embedded data set has them)."""

    max_images: int = 1000
    """Images to measure, evenly spread over the classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exif_orientation:
            raise ValueError("exif_orientation must be false here: masks are of the pixels as they are stored")


@dataclass(frozen=True)
class ResourcesConfig:
    """Parameters and multiply-adds of an encoder: that of a checkpoint, of a recipe, or of the model options."""

    checkpoint: str = ""
    """A training checkpoint (last.pth, best.pth) or an exported backbone.safetensors."""
    recipe: str = ""
    """A recipe, by file or name such as vit_small_simpool, whose model is counted."""
    model: ModelConfig = field(default_factory=ModelConfig)
    num_classes: int = 1000
    """Classes of the linear classifier that is counted with the encoder. Table 8: 1000. 0: the encoder alone."""
    image_size: int | None = None
    """Side of the image in pixels. null: that of the model."""
    out: str = ""
    """Folder for results; resources.json is written there. Empty: results/ beside the checkpoint, or nowhere without one."""

    def __post_init__(self) -> None:
        if self.num_classes < 0 or (self.image_size is not None and self.image_size < 1):
            raise ValueError("num_classes must be 0 or more, image_size 1 or more")


@dataclass(frozen=True)
class TableConfig:
    """Results beside the figures of the paper, table by table."""

    results: tuple[str, ...] = ()
    """Files of results, or folders with them, such as those of training runs: the bare first arguments."""
    format: Literal["text", "markdown", "csv"] = "text"
    """text: aligned columns; csv: one table of all, in full precision."""
    out: str = ""
    """File to write. Empty: it is printed."""


@dataclass(frozen=True)
class ReportConfig:
    """One self-contained HTML page about a run."""

    out: str = ""
    """Folder of the training run; report.html is written there."""
    data: str = ""
    """Folder with held-out images in val/ or val.tar (and masks in masks/val/ if there are any) for the attention overlays."""
    num_images: int = 12
    """Held-out images to show."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, mps, cuda or cuda:N."""

    def __post_init__(self) -> None:
        check_device("device", self.device)


@dataclass(frozen=True)
class SyntheticConfig:
    """The embedded data set: images made from a seed, with class, box and mask."""

    out: str = ""
    """Folder to write train/, val/ and masks/ into."""
    seed: int = 0
    """Every image follows from it."""
    train_per_class: int = 200
    """Training images of each class."""
    val_per_class: int = 50
    """Held-out images of each class."""
    size: int = 40
    """Side of the images in pixels."""
