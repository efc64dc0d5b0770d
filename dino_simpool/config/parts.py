"""Options that several commands share: class KnnConfig(Decoding, Loading, EvalConfig).

The fields of the last base come first, and the command's own fields come last. A command that needs
another default or another text for an option defines that option again.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

MAX_PIXELS = 178_956_970
"""Largest image decoded by default, in pixels: half a gigabyte as RGB, and Pillow's own limit."""


MAX_SEED, MAX_SIZE, MAX_BATCH, MAX_WORKERS = 2**63 - 1, 4096, 2**20, 1024
"""Upper ends of ranges: sides in pixels, images of one pass. What is beyond is a mistake."""


@dataclass(frozen=True)
class Limits:
    """The numbers that an option may have. nan is never among them."""

    least: float
    above: float
    most: float
    null: bool
    """Whether null is the default, for the message: it is always allowed."""

    def hold(self, value: Any) -> bool:
        """Whether a number, or each number of a tuple, is within the limits."""
        return all(self.least <= x <= self.most and x > self.above for x in (value if isinstance(value, tuple) else (value,)))

    def __str__(self) -> str:
        lowest = f"{self.least:,}" if self.least > self.above else f"above {self.above:,}"
        return f"{lowest} to {self.most:,}{', or null' * self.null}"


def option(default: Any, *, most: float, least: float = -math.inf, above: float = -math.inf) -> Any:
    """A default, with limits of the value, or of each number of a tuple. null is always allowed.

    Every number has both ends, which --help shows; give one of `least` and `above`.
    """
    return dataclasses.field(default=default, metadata={"limits": Limits(least, above, most, default is None)})


PathKind = Literal["images", "train", "val", "checkpoint", "weights", "folder", "features", "existing", "run", "out"]
"""What an option names: a source of images; a part of `data`; a checkpoint, or timm:NAME; a file of
weights, or `random`; a folder; one of features; something that exists; the folder of a run; a
folder to write to, which is made."""


def path(default: Any, kind: PathKind, *, needed: str = "") -> Any:
    """A default path, and what it must be when a command begins (paths.py). Empty is allowed, if
    there is no message for it in `needed`."""
    return dataclasses.field(default=default, metadata={"path": (kind, needed)})


def check_device(name: str, device: str) -> None:
    """ValueError if this is not the name of a device. Whether it exists is known only later."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"{name} is {device}: allowed are auto, cpu, mps, cuda and cuda:N")


@dataclass(frozen=True)
class Options:
    """The root of all options: ends the chain of `super().__post_init__()`."""

    group: ClassVar[str] = ""
    """What messages put before a name, such as `run.`."""

    def __post_init__(self) -> None:
        """ValueError in one line if a value is beyond the limits that `option` gave it."""
        for field in dataclasses.fields(self):
            name, value = self.group + field.name, getattr(self, field.name)
            if "limits" not in field.metadata or value is None:
                continue
            if value == () and field.default:
                raise ValueError(f"{name} is empty: give one number or more")
            if not field.metadata["limits"].hold(value):
                raise ValueError(f"{name} is {value}: allowed is {field.metadata['limits']}")

    def needs(self, option: str) -> bool:
        """Whether the path of this option is used as `path` declares it."""
        return True


@dataclass(frozen=True)
class Checkpoint(Options):
    """A file of weights."""

    checkpoint: str = path("", "checkpoint")
    """A training checkpoint (last.pth, best.pth) or an exported backbone.safetensors."""


@dataclass(frozen=True)
class Weights(Checkpoint):
    """A frozen encoder: the file, which weights of it, and how it pools."""

    checkpoint: str = path(
        "", "checkpoint", needed="no checkpoint is given: give --checkpoint RUN/last.pth (or backbone.safetensors)"
    )
    """A training checkpoint (last.pth, best.pth) or an exported backbone.safetensors; a file of
    SimPool, DINO, timm or torchvision, which is recognized; or timm:NAME, any encoder of timm."""
    weights: str = path("", "weights")
    """The weights of timm:NAME: a file, or random. Empty: those that timm downloads."""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What a file of others does not say, or what is to be different, by the names of the options
    `model` of train: --model.heads 6 --model.gamma 2.0."""
    which: Literal["teacher", "student", "untrained"] = "teacher"
    """Weights to use. untrained: the same encoder at its initialization, for comparison."""
    min_over: Literal["image", "batch"] = "image"
    """Range of SimPool's minimum, whatever the training used. batch repeats the released code,
    whose features depend on the other images of the batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights and not self.checkpoint.startswith("timm:"):
            raise ValueError(
                f"weights {self.weights} are those of a checkpoint timm:NAME: give one, or the file as --checkpoint"
            )
        from dino_simpool.config.train import ModelConfig  # which imports this module

        names = {field.name for field in dataclasses.fields(ModelConfig)} - {"min_over"}
        if unknown := [name for name in self.model if name not in names]:
            near = difflib.get_close_matches(unknown[0], names, 1)
            hint = (
                "give --min_over"
                if unknown[0] == "min_over"
                else f"did you mean model.{near[0]}?"
                if near
                else "see train --help"
            )
            raise ValueError(f"unknown option model.{unknown[0]}: {hint}")


@dataclass(frozen=True)
class Device(Options):
    """Where to compute."""

    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, mps, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device("device", self.device)


@dataclass(frozen=True)
class Compute(Device):
    """Where and how exactly to compute."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the encoder. Features and similarities are always float32."""


@dataclass(frozen=True)
class Exclude:
    """Patterns of names, and of paths below the source, that are not read."""

    patterns: tuple[str, ...] = ()

    def which(self, path: str) -> str:
        """What a path is counted as if it is left out, or lies in what is left out; else ""."""
        parts = path.split("/")
        for pattern in self.patterns:
            below = ("/".join(parts[: end + 1]) for end in range(len(parts)))
            if any(fnmatchcase(part, pattern) for part in parts) or any(fnmatchcase(above, pattern) for above in below):
                return f"excluded by {pattern}"
        return ""


@dataclass(frozen=True)
class Excluding(Options):
    """What is left out of folders and archives."""

    exclude: tuple[str, ...] = ()
    """Files and folders to leave out, as patterns of names or paths: --exclude '[old, *_mask.png]'.
    Hidden files and folders of the system, such as @eaDir and __MACOSX, are left out anyway."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [pattern for pattern in self.exclude if not pattern.strip("/") or pattern.startswith("/")]:
            raise ValueError(
                f"{self.group}exclude has {wrong[0]!r}: give patterns of names or of paths below the source, such as *_mask.png"
            )

    @property
    def excluded(self) -> Exclude:
        """The patterns, ready to be asked."""
        return Exclude(tuple(pattern.rstrip("/") for pattern in self.exclude))


@dataclass(frozen=True)
class ValFolder(Excluding):
    """Images to measure on."""

    val: str = path("val", "val")
    """Class folder (DIR/CLASS/IMAGE) to measure on, or an archive of one, inside data."""


@dataclass(frozen=True)
class ClassFolders(ValFolder):
    """Labeled images to learn from and to measure on."""

    train: str = path("train", "train")
    """Class folder (DIR/CLASS/IMAGE) to learn from, or an archive of one, inside data."""
    subset_per_class: int | None = option(None, least=1, most=10**9)
    """Learn from the first N images of each class in sorted order. null: from all."""


@dataclass(frozen=True)
class Square(Options):
    """The square that the encoder sees."""

    image_size: int | None = option(None, least=1, most=MAX_SIZE)
    """Side of the square that the encoder sees, in pixels. null: that of the model."""
    resize: int | None = option(None, least=1, most=2 * MAX_SIZE)
    """Shorter side before the center crop, in pixels. null: that of the model, or for another
    image_size: * 256 / 224."""


@dataclass(frozen=True)
class Workers(Options):
    """Processes that load images."""

    workers: int | None = option(None, least=0, most=MAX_WORKERS)
    """Loader processes. null: the number of cores that this process may use."""


@dataclass(frozen=True)
class Loading(Workers):
    """How images are loaded, in batches of one size."""

    batch_size: int = option(128, least=1, most=MAX_BATCH)
    """Images in one forward pass of one process."""


@dataclass(frozen=True)
class PixelLimit(Options):
    """The largest image that is decoded."""

    max_pixels: int = option(MAX_PIXELS, least=1, most=10**11)
    """An image with more pixels is not decoded and counts as broken, which ends the command."""


ValueRange = Literal["full", "data", "percentiles"] | tuple[int, int]
"""The range of 16-bit samples that becomes black to white: see `DecodingSettings.value_range`."""
ExtraBand = Literal["refuse", "ignore", "alpha"]
Transparency = Literal["white", "black", "gray", "ignore"]


def check_value_range(name: str, value: ValueRange | None) -> None:
    """ValueError if the two numbers, if given, are no range of 16-bit samples."""
    if isinstance(value, tuple) and not 0 <= value[0] < value[1] <= 65535:
        raise ValueError(f"{name} is {list(value)}: give the lowest and the highest of 0 to 65535, such as [0, 4095]")


@dataclass(frozen=True)
class DecodingSettings(Options):
    """How image files become pixels: options of training, which are stored with the model."""

    max_pixels: int = option(MAX_PIXELS, least=1, most=10**11)
    """An image with more pixels is not decoded and counts as broken: a file can claim any size."""
    exif_orientation: bool = False
    """Rotate images as their EXIF tag says, as image viewers do. The published code does not."""
    extra_band: ExtraBand = "refuse"
    """A band after gray or RGB that a file does not declare as alpha, such as near infrared.
    refuse: the image counts as broken. ignore: the band is left out. alpha: it is transparency."""
    transparency: Transparency = "white"
    """The color behind transparent pixels, or ignore: show the colors that are stored there."""
    value_range: ValueRange = "full"
    """The range of 16-bit samples that becomes black to white. full: 0 to 65535. data: lowest to
    highest sample of 200 images, evenly spread over the data. percentiles: 1st to 99th of each
    image. Or two numbers, [0, 4095] for 12 bits. Values beyond the range are clipped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value_range(f"{self.group}value_range", self.value_range)

    @property
    def decoding(self) -> DecodingSettings:
        """These settings without the other options of a command."""
        return DecodingSettings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DecodingSettings)})


DEFAULT_DECODING = DecodingSettings()


@dataclass(frozen=True)
class PixelValues(PixelLimit):
    """How image files become pixels, if not as in training, apart from their orientation."""

    extra_band: ExtraBand | None = None
    """A band after gray or RGB that is not declared as alpha: refuse such images, ignore the band,
    or take it as alpha. null: as in training."""
    transparency: Transparency | None = None
    """Color behind transparent pixels, or ignore: show the colors that are stored under them. null:
    as in training."""
    value_range: ValueRange | None = None
    """Range of 16-bit samples that becomes black to white: full, data (lowest to highest sample of
    200 images of these data), percentiles (1st to 99th of each image), or two numbers such as
    [0, 4095]. null: as in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value_range("value_range", self.value_range)


@dataclass(frozen=True)
class Decoding(PixelValues):
    """How image files are decoded, if not as in training."""

    exif_orientation: bool | None = None
    """Rotate images by their EXIF tag, as image viewers do. Published numbers were made without.
    null: as in training."""
