"""The options of the commands that read or make data sets, and of those that show results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_simpool.config.parts import MAX_SEED, DecodingSettings, Device, Excluding, Options, Workers, option


@dataclass(frozen=True)
class CheckDataConfig(DecodingSettings, Excluding, Workers):
    """List the broken images of a data set, or check that a public data set is complete."""

    data: str | tuple[str, ...] = ""
    """A folder, a text file of paths, or a list of these: anything data.root of train takes."""
    layout: Literal["cub200", "cars196", "sop", "inshop", "roxford5k", "rparis6k", "imagenet", "folder"] | None = None
    """A public data set, or folder: CLASS/IMAGE. Files, folders and counts are checked then, and no
    image is decoded. null: decode every image."""
    out: str = ""
    """File for the broken images, one per line: name, tab, reason. Empty: only print them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout is not None and (self.out or not isinstance(self.data, str)):
            raise ValueError("layout checks one folder and lists no broken images: leave out `out` and give one folder as data")


@dataclass(frozen=True)
class SyntheticConfig(Options):
    """The embedded data set: images made from a seed, with class, box and mask."""

    out: str = ""
    """Folder to write train/, val/ and masks/ into."""
    seed: int = option(0, least=0, most=MAX_SEED)
    """Seed that determines every image."""
    train_per_class: int = option(200, least=1, most=10**6)
    """Training images of each class."""
    val_per_class: int = option(50, least=1, most=10**6)
    """Held-out images of each class."""
    size: int = option(40, least=16, most=1024)
    """Side of the images in pixels."""


@dataclass(frozen=True)
class TableConfig:
    """Results beside the numbers of the paper, table by table."""

    results: tuple[str, ...] = ()
    """Result files, or folders with them (training runs): the arguments before any option."""
    format: Literal["text", "markdown", "csv"] = "text"
    """text: aligned columns. csv: all tables in one, in full precision."""
    out: str = ""
    """File to write. Empty: print."""


@dataclass(frozen=True)
class ReportConfig(Device):
    """One self-contained HTML page about a run."""

    out: str = ""
    """Folder of the training run; report.html is written there."""
    data: str = ""
    """Folder with held-out images in val/ or val.tar (and masks, if any, in masks/val/) to show."""
    num_images: int = option(12, least=1, most=1000)
    """Held-out images to show."""
