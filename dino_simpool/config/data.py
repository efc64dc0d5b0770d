"""The options of the training data: crops and colors of views, and where images come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_simpool.config.parts import MAX_SIZE, MAX_WORKERS, DecodingSettings, Excluding, Options, option, path


@dataclass(frozen=True)
class CropsConfig(Options):
    """Multi-crop augmentation. Triples: first global view, second global view, local views."""

    group = "crops."
    global_size: int = option(224, least=1, most=MAX_SIZE)
    """Side of the two global crops in pixels."""
    local_size: int = option(96, least=1, most=MAX_SIZE)
    """Side of the local crops in pixels."""
    num_local: int = option(6, least=0, most=100)
    """Number of local crops; 0 for none."""
    global_scale: tuple[float, float] = option((0.25, 1.0), above=0, most=1)
    """Area of a global crop as a share of the image, lowest and highest."""
    local_scale: tuple[float, float] = option((0.05, 0.25), above=0, most=1)
    """Area of a local crop as a share of the image, lowest and highest."""
    flip: float = option(0.5, least=0, most=1)
    """Probability of a horizontal flip."""
    jitter: tuple[float, float, float, float] = option((0.4, 0.4, 0.2, 0.1), least=0, most=1)
    """Largest change of brightness, contrast, saturation and hue."""
    jitter_probability: float = option(0.8, least=0, most=1)
    """Probability of the color jitter."""
    grayscale: float = option(0.2, least=0, most=1)
    """Probability of conversion to grayscale."""
    blur: tuple[float, float, float] = option((1.0, 0.1, 0.5), least=0, most=1)
    """Probability of the Gaussian blur in the three kinds of view."""
    blur_sigma: tuple[float, float] = option((0.1, 2.0), least=0, most=100)
    """Range of the blur's standard deviation in pixels of the crop."""
    solarize: tuple[float, float, float] = option((0.0, 0.2, 0.0), least=0, most=1)
    """Probability of solarization (values from 128 on are inverted) in the three kinds of view."""
    shrink_margin: float | None = option(2.0, least=1, most=1000)
    """Decode a large JPEG smaller (by 2, 4 or 8) if the side of every crop is still at least this
    many times that of its view: twice as fast for photographs of 12 megapixels, and no pixel
    changes by more than 1 of 255. null: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (low, high) in {"global_scale": self.global_scale, "local_scale": self.local_scale}.items():
            if low > high:
                raise ValueError(f"crops.{name} is ({low}, {high}): give two shares of the area, 0 < lowest <= highest <= 1")
        if self.blur_sigma[0] > self.blur_sigma[1]:
            raise ValueError(f"crops.blur_sigma is {self.blur_sigma}: give two numbers, 0 <= lowest <= highest")
        if self.jitter[3] > 0.5:
            raise ValueError(f"crops.jitter is {self.jitter}: give brightness, contrast and saturation in 0..1, hue in 0..0.5")


@dataclass(frozen=True)
class DataSource(Excluding):
    """Where the images come from, and which of them."""

    root: str | tuple[str, ...] = path(
        "",
        "images",
        needed="no images are given: set data.root to a folder of images, an archive, or a text file with one path per line",
    )
    """A folder (classes, nested, flat, or with .tar or .zip archives in it), such an archive, a
    text file of paths, or a list of these: --data.root '[DIR, SHARD.tar, LIST.txt]'. Archives are
    read as if unpacked; compressed tars are refused."""
    subset_per_class: int | None = option(None, least=1, most=10**9)
    """Use the first N images of each class in sorted order (260: the paper's ImageNet-20 %)."""
    workers: int | None = option(None, least=0, most=MAX_WORKERS)
    """Loader processes of each training process; 0: none. null: the number of cores it may use."""


@dataclass(frozen=True)
class DataConfig(DecodingSettings, DataSource):
    """The images of training. No labels are needed."""

    group = "data."
    max_bad_share: float = option(0.1, least=0, most=1)
    """Share of the images that may be broken. Other images take their places, and bad_files.txt
    lists them. With more broken images, the run stops."""
    augment_on: Literal["auto", "cpu", "device"] = "auto"
    """Where flips, colors and blur are applied: in the loaders, or in batches on the device. auto:
    on the GPU if there is one."""
