"""Options that several commands share: class KnnConfig(Decoding, Loading, EvalConfig).

The fields of the last base come first, and the command's own fields come last. A command that needs
another default or another text for an option defines that option again.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

MAX_PIXELS = 178_956_970
"""Largest image decoded by default, in pixels: half a gigabyte as RGB, and Pillow's own limit."""


def option(default: Any, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Any:
    """A default, with limits of the value, or of each number of a tuple. null is always allowed."""
    return dataclasses.field(default=default, metadata={"limits": (least, above, most)})


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
            if not field.metadata or value is None:
                continue
            least, above, most = field.metadata["limits"]
            if all(least <= number <= most and number > above for number in (value if isinstance(value, tuple) else (value,))):
                continue
            if most < math.inf:
                raise ValueError(f"{name} is {value}: allowed is {least} to {most}")
            allowed = f"{least} or more" if least > above else f"above {above}"
            raise ValueError(f"{name} must be {allowed}, not {value}")


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
    subset_per_class: int | None = option(None, least=1)
    """Learn from the first N images of each class in sorted order. null: from all."""


@dataclass(frozen=True)
class Square(Options):
    """The square that the encoder sees."""

    image_size: int | None = option(None, least=1)
    """Side of the square that the encoder sees, in pixels. null: that of the model."""
    resize: int | None = option(None, least=1)
    """Shorter side before the center crop, in pixels. null: that of the model, or for another
    image_size: * 256 / 224."""


@dataclass(frozen=True)
class Workers(Options):
    """Processes that load images."""

    workers: int | None = option(None, least=0)
    """Loader processes. null: the number of cores that this process may use."""


@dataclass(frozen=True)
class Loading(Workers):
    """How images are loaded, in batches of one size."""

    batch_size: int = option(128, least=1)
    """Images in one forward pass of one process."""


@dataclass(frozen=True)
class PixelLimit(Options):
    """The largest image that is decoded."""

    max_pixels: int = option(MAX_PIXELS, least=1)
    """An image with more pixels is not decoded and counts as broken, which ends the command."""


@dataclass(frozen=True)
class Decoding(PixelLimit):
    """How image files are decoded."""

    exif_orientation: bool = False
    """Rotate images by their EXIF tag, as image viewers do. Published numbers were made without."""
