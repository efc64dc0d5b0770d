"""Options that several commands share, in small groups that the options of a command are put
together from.

    class KnnConfig(Decoding, Loading, EvalConfig): ...

The fields of the last base come first, and the command's own fields come last. A command that needs
another default or another text for an option defines that option again. Each part checks its own
options.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

MAX_PIXELS = 178_956_970
"""Largest image that is decoded by default, in pixels: half a gigabyte as RGB, and the limit of
Pillow itself."""


def at_least(least: int, options: Any, *names: str, group: str = "") -> None:
    """ValueError if one of these options, or one number of a tuple, is below `least`. None is
    allowed.

    group: what the message puts before the name, such as `run.`.
    """
    for name in names:
        value = getattr(options, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and number < least for number in numbers):
            raise ValueError(f"{group}{name} must be {least} or more, not {value}")


def check_device(name: str, device: str) -> None:
    """ValueError if this is not the name of a device. Whether the device exists is known only when
    the command runs."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"{name} is {device}: allowed are auto, cpu, mps, cuda and cuda:N")


class Options:
    """The root of all parts: ends the chain of `super().__post_init__()`."""

    def __post_init__(self) -> None:
        """Check the values; ValueError in one line."""


@dataclass(frozen=True)
class Checkpoint(Options):
    """A file of weights."""

    checkpoint: str = ""
    """A training checkpoint (last.pth, best.pth) or an exported backbone.safetensors."""


@dataclass(frozen=True)
class Weights(Checkpoint):
    """A frozen encoder: the file, which weights of it, and how it pools."""

    which: Literal["teacher", "student", "untrained"] = "teacher"
    """Weights to use. untrained: the same encoder at its initialization, for comparison."""
    min_over: Literal["image", "batch"] = "image"
    """Range of SimPool's minimum, whatever the training used. batch repeats the released code,
    whose features depend on the other images of the batch."""


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
class ValFolder(Options):
    """Images to measure on."""

    val: str = "val"
    """Class folder (DIR/CLASS/IMAGE) to measure on, or an archive of one, inside data."""


@dataclass(frozen=True)
class ClassFolders(ValFolder):
    """Labeled images to learn from and to measure on."""

    train: str = "train"
    """Class folder (DIR/CLASS/IMAGE) to learn from, or an archive of one, inside data."""
    subset_per_class: int | None = None
    """Learn from the first N images of each class in sorted order. null: from all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "subset_per_class")


@dataclass(frozen=True)
class Square(Options):
    """The square that the encoder sees."""

    image_size: int | None = None
    """Side of the square that the encoder sees, in pixels. null: that of the model."""
    resize: int | None = None
    """Shorter side before the center crop, in pixels. null: that of the model, or for another
    image_size: * 256 / 224."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "image_size", "resize")


@dataclass(frozen=True)
class Workers(Options):
    """Processes that load images."""

    workers: int | None = None
    """Loader processes. null: the number of cores that this process may use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "workers")


@dataclass(frozen=True)
class Loading(Workers):
    """How images are loaded, in batches of one size."""

    batch_size: int = 128
    """Images in one forward pass of one process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "batch_size")


@dataclass(frozen=True)
class PixelLimit(Options):
    """The largest image that is decoded."""

    max_pixels: int = MAX_PIXELS
    """An image with more pixels is not decoded and counts as broken, which ends the command."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "max_pixels")


@dataclass(frozen=True)
class Decoding(PixelLimit):
    """How image files are decoded."""

    exif_orientation: bool = False
    """Rotate images by their EXIF tag, as image viewers do. Published numbers were made without."""
