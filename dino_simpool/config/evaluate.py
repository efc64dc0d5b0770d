"""The options of the evaluators."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Literal

from dino_simpool.config.parts import (
    MAX_BATCH,
    MAX_SEED,
    MAX_SIZE,
    ClassFolders,
    Compute,
    Decoding,
    Excluding,
    Loading,
    PixelValues,
    Square,
    ValFolder,
    Weights,
    Workers,
    option,
    path,
)


@dataclass(frozen=True)
class EvalConfig(Compute, Weights):
    """What every evaluator takes, and what `eval.run` asks an evaluator's options for."""

    data: str = path("", "folder", needed="no data is given: give --data DIR, a folder with the class folders train/ and val/")
    """Folder with the class folders train/ and val/, or with archives of them (.tar, .zip)."""
    out: str = path("", "out")
    """Folder where <evaluator>.json is written. Empty: results/ beside the checkpoint, or without
    one in the folder of the features."""
    seed: int = option(0, least=0, most=MAX_SEED)
    """Seed of the probe's initialization, shuffling and augmentation. Untrained weights come from
    the seed of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint.startswith("timm:") and not self.out:
            raise ValueError(f"{self.checkpoint} has no folder for the results: give --out DIR")

    @property
    def variant(self) -> tuple[str, ...]:
        """Words that follow the evaluator's name in the file name, to keep results apart."""
        return ()

    @property
    def needs_encoder(self) -> bool:
        """Whether the numbers depend on an encoder. If not, a checkpoint is optional."""
        return True

    def needs(self, option: str) -> bool:
        """A checkpoint is needed for an encoder."""
        return super().needs(option) and (option != "checkpoint" or self.needs_encoder)

    @property
    def default_out(self) -> str:
        """Where results go without `out` and without a checkpoint; "" for nowhere."""
        return ""


@dataclass(frozen=True)
class FeaturesConfig(Decoding, Loading, Square, EvalConfig):
    """What evaluators take that compute features of images, or are given those of `extract`."""

    features: str = path("encoder", "features")
    """encoder: of the images. Or a folder that `extract` wrote: then data is optional, and if it is
    given, must be their images; so is checkpoint, and must be their encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stored:
            return
        fixed = {f.name for f in (*fields(Decoding), *fields(Square))} | {"batch_size", "precision"}
        fixed |= set() if self.checkpoint else {"which", "min_over", "model"}
        default = type(self)()
        names = [f.name for f in fields(self) if f.name in fixed]
        if given := [name for name in names if getattr(self, name) != getattr(default, name)]:
            raise ValueError(
                f"the features in {self.features} are there, made with other options: leave out {', '.join(given)}"
            )
        choice = [name for name in ("exclude", "subset_per_class") if getattr(self, name, None)]
        if choice and not self.data:
            raise ValueError(f"{choice[0]} chooses images, and only features are given: give data too, or leave it out")

    @property
    def stored(self) -> str:
        """The folder of features that are there; "" to compute them."""
        return "" if self.features in ("encoder", "pixels") else self.features

    @property
    def variant(self) -> tuple[str, ...]:
        """Features that were there have a file of their own."""
        return ("features",) if self.stored else ()

    @property
    def default_out(self) -> str:
        """results/ in the folder of the features."""
        return os.path.join(self.stored, "results") if self.stored else ""

    def needs(self, option: str) -> bool:
        """Features that are there need no images and no checkpoint."""
        if option == "features":
            return bool(self.stored)
        if self.stored and option in ("train", "val"):
            return bool(self.data)
        if self.stored and option in ("data", "checkpoint"):
            return bool(getattr(self, option))
        return super().needs(option)


@dataclass(frozen=True)
class ClassificationConfig(ClassFolders, FeaturesConfig):
    """What evaluators take that learn from labeled images and classify others."""


@dataclass(frozen=True)
class KnnConfig(ClassificationConfig):
    """Weighted k-NN classification of frozen features."""

    k: tuple[int, ...] = option((10, 20, 100, 200), least=1, most=10**6)
    """Numbers of neighbors; the first is the one reported (paper: 10)."""
    temperature: float = option(0.07, least=0.001, most=100)
    """A neighbor with cosine similarity s votes with weight exp(s / temperature)."""
    features: str = path("encoder", "features")
    """encoder: of the images. pixels: raw pixels in place of features, for comparison. Or a folder
    that `extract` wrote, of a folder with train/ and val/, or that has FEATURES/train and
    FEATURES/val: then data is optional, and if it is given, must be their images; so is checkpoint,
    and must be their encoder."""

    @property
    def variant(self) -> tuple[str, ...]:
        """Raw pixels have a file of their own."""
        return super().variant if self.needs_encoder else ("pixels",)

    @property
    def needs_encoder(self) -> bool:
        """Raw pixels need none."""
        return self.features != "pixels"


@dataclass(frozen=True)
class LinearConfig(ClassificationConfig):
    """Linear classification of frozen features."""

    protocol: Literal["paper", "grid"] = "paper"
    """paper: augmented images, 100 epochs, the best validation epoch, as published. grid: features
    extracted once, many learning rates at once, the best one chosen on a held-out part of train."""
    epochs: int = option(100, least=1, most=10**5)
    """Passes over the training images."""
    lr: float = option(1e-3, above=0, most=1000)
    """Learning rate of the paper protocol for a global batch of 256; scaled by batch / 256."""
    probe_batch_size: int = option(1024, least=1, most=10**7)
    """Global batch size of the probe's training."""
    grid: tuple[float, ...] = option((1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0), above=0, most=1000)
    """Learning rates of the grid protocol for a batch of 256; scaled by batch / 256."""
    held_out: float = option(0.1, above=0, most=0.9)
    """Share of each training class on which the learning rate of the grid is chosen."""
    features: str = path("encoder", "features")
    """encoder: of the images. Or, with protocol grid, a folder that `extract` wrote, of a folder
    with train/ and val/, or that has FEATURES/train and FEATURES/val: then data is optional, and if
    it is given, must be their images; so is checkpoint, and must be their encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features == "pixels":
            raise ValueError("features is pixels: that is for knn, give encoder or a folder that `extract` wrote")
        if self.stored and self.protocol == "paper":
            raise ValueError("protocol paper augments the images, so features cannot be there before: give --protocol grid")
        if not self.grid:
            raise ValueError("grid is empty: give learning rates")


@dataclass(frozen=True)
class RetrievalConfig(Decoding, Workers, EvalConfig):
    """Landmark retrieval, image by image: ROxford, RParis, three protocols, mAP and mP@1, 5, 10."""

    data: str = path("", "folder", needed="no data is given: give --data DIR, the folder that holds roxford5k/ or rparis6k/")
    """Folder that holds roxford5k/ or rparis6k/, with jpg/ and gnd_<name>.pkl (or .json) in it."""
    dataset: Literal["roxford5k", "rparis6k"] = "roxford5k"
    """The data set."""
    preset: Literal["dino_default", "dino_readme", "ibot", "strict"] = "dino_default"
    """How images are prepared; the paper does not say. dino_default: 224 pixels. dino_readme: for
    RParis 512 pixels and three scales. ibot: 512 and three scales. strict: the same, with queries
    cropped to their landmark, as the authors of the data sets require. The next three options
    change one setting of the preset."""
    image_size: int | None = option(None, least=1, most=MAX_SIZE)
    """Longest side in pixels; smaller images are never enlarged. null: the preset's."""
    multi_scale: bool | None = None
    """Mean of the features at the scales 1, 0.71 and 0.5. null: the preset's."""
    query_crop: bool | None = None
    """Crop queries to the box of their landmark. null: the preset's."""
    whitening_data: str = path("", "images")
    """Folder, or text file of paths, of other images to learn a whitening of the features from; for
    ROxford usually rparis6k/jpg. Empty: no whitening, as in the paper."""
    whitening_dim: int | None = option(None, least=1, most=65536)
    """Dimensions that the whitening keeps. null: 256, or the features' width if that is less."""
    distractors: str = path("", "existing")
    """More images for the database, all of them negatives: a folder, an archive or a text file of
    paths; or their features (images, width), from this encoder and preset, as a .npy file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whitening_dim is not None and not self.whitening_data:
            raise ValueError(f"whitening_dim is {self.whitening_dim}: give whitening_data to learn from too")

    @property
    def variant(self) -> tuple[str, ...]:
        """Data set and preset."""
        return (self.dataset, self.preset)


@dataclass(frozen=True)
class RecallConfig(FeaturesConfig):
    """Fine-grained retrieval, Recall@k: each test image of a metric-learning set is a query."""

    data: str = path(
        "",
        "folder",
        needed="no data is given: give --data DIR, the folder that holds the data set (layout folder: CLASS/IMAGE)",
    )
    """Folder that holds the data set's own folder (CUB_200_2011, cars196, Stanford_Online_Products,
    Inshop_Clothes), or with layout folder the class folders."""
    layout: Literal["cub200", "cars196", "sop", "inshop", "folder"] = "folder"
    """The data set, or folder: CLASS/IMAGE, all of it test images."""
    preset: Literal["dino_eval", "dml_eval"] = "dino_eval"
    """How images are resized; the paper does not say. dino_eval: bicubic, as for k-NN. dml_eval:
    bilinear, as in the metric-learning code of the paper's authors."""
    k: tuple[int, ...] = option((), least=1, most=10**6)
    """Numbers of neighbors. Empty: the columns of the paper's table, 1 2 4 (cub200, cars196,
    folder), 1 10 100 (sop) or 1 10 20 (inshop)."""
    ties: Literal["published", "stable", "optimistic"] = "published"
    """Which of equally similar images is nearer. stable: the one with the lower index. optimistic:
    one of the query's class. published: optimistic for inshop, stable for the others."""
    map_at_r: bool = True
    """Also compute R-precision and MAP@R. Slow if classes have thousands of images."""
    tile: int | None = option(None, least=1, most=10**6)
    """Side of blocks of similarities in images; changes no result. null: 1024 on CPU, else 8192."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features == "pixels":
            raise ValueError("features is pixels: that is for knn, give encoder or a folder that `extract` wrote")
        if self.stored and self.preset != "dino_eval":
            raise ValueError(f"preset {self.preset} resizes in another way than `extract`: leave preset out")

    @property
    def variant(self) -> tuple[str, ...]:
        """Data set and preset."""
        return (self.layout, self.preset, *super().variant)

    def needs(self, option: str) -> bool:
        """Only class folders can be told from the ids of features; the lists of a data set are in
        its folder."""
        return super().needs(option) or (option == "data" and self.layout != "folder")


@dataclass(frozen=True)
class MasksConfig(PixelValues, Loading, Square, ValFolder, EvalConfig):
    """Share of the attention that falls on the object, on images with masks (the embedded ones).

    Masks belong to the pixels as they are stored, so images are never rotated by their EXIF tag.
    """

    max_images: int = option(1000, least=1, most=10**9)
    """Images to measure, evenly spread over the classes."""


@dataclass(frozen=True)
class AttentionConfig(Decoding, Excluding, Loading, EvalConfig):
    """Where the encoder looks, on any images: maps, pictures, masks and boxes."""

    data: str = path("", "images", needed="no data is given: give --data IMAGE, or a folder of images")
    """One image, a folder with any nesting, or a text file with one path per line."""
    val: str = path("", "val")
    """Folder inside data to take the images from. Empty: data itself."""
    subset_per_class: int | None = option(None, least=1, most=10**9)
    """Take only the first N images of each class in sorted order. null: all."""
    max_images: int = option(100, least=1, most=10**9)
    """Images to show, evenly spread over the data."""
    fit: Literal["square", "shorter", "longer", "native"] = "square"
    """What image_size is the length of. square: both sides, whatever the shape of the image
    (paper). shorter or longer: that side of the image, which keeps its shape (up to 64:1 with
    shorter). native: images keep their size. A side shorter than one cell is enlarged to one cell;
    a ViT drops the pixels beyond its last whole patch."""
    image_size: int | None = option(None, least=1, most=MAX_SIZE)
    """Length in pixels, see fit. null: four times that of the model (paper: 896 = 4 * 224)."""
    heads: Literal["mean", "each"] = "mean"
    """The mean over the attention heads, or each head. Heads are those of the last block for the
    class token, and model.num_heads for SimPool."""
    mass: float = option(0.6, above=0, most=0.9999)
    """A mask is the fewest cells that hold this share of the attention, 0 to 1 (paper: 0.6)."""
    smooth: bool = False
    """Draw attention bicubically between cell centers. false: cells as squares, as published."""
    sheet_images: int = option(24, least=1, most=1000)
    """Number of these images on the contact sheet."""
    batch_size: int = option(4, least=1, most=MAX_BATCH)
    """Images in one forward pass of one process with fit square. Any other fit: one by one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit == "native" and self.image_size is not None:
            raise ValueError("fit native keeps the size of every image: leave out image_size, or choose another fit")
