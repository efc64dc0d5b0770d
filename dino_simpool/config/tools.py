"""The options of the commands about files, not about runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_simpool.config.data import MAX_PIXELS


@dataclass(frozen=True)
class CheckDataConfig:
    """Decode every image of a data set and say which cannot be read; or check that a public data set is complete."""

    data: str | tuple[str, ...] = ""
    """A folder (classes, nested or flat), a text file of paths, or a list of these, as data.root of a training."""
    layout: Literal["cub200", "cars196", "sop", "inshop", "roxford5k", "rparis6k", "imagenet", "folder"] | None = None
    """A public data set, or folder: CLASS/IMAGE. Then files, folders and counts are checked, and no image is decoded. null:
    every image is decoded."""
    out: str = ""
    """File for the broken ones, one a line: name, a tab, what is wrong. Empty: they are only printed."""
    workers: int | None = None
    """Processes. null: the cores that may be used."""
    max_pixels: int = MAX_PIXELS
    """An image with more pixels is not decoded but counts as broken."""

    def __post_init__(self) -> None:
        if self.max_pixels < 1 or (self.workers is not None and self.workers < 0):
            raise ValueError("max_pixels must be 1 or more, workers 0 or more")
        if self.layout is not None and (self.out or not isinstance(self.data, str)):
            raise ValueError(
                "layout is of one folder, and lists no broken images: leave out `out`, and give one folder as data"
            )
