"""The options of the commands about files, not about runs."""

from __future__ import annotations

from dataclasses import dataclass

from dino_simpool.config.data import MAX_PIXELS


@dataclass(frozen=True)
class CheckDataConfig:
    """Decode every image of a data set and say which cannot be read."""

    data: str | tuple[str, ...] = ""
    """A folder (classes, nested or flat), a text file of paths, or a list of these, as data.root of a training."""
    out: str = ""
    """File for the broken ones, one a line: name, a tab, what is wrong. Empty: they are only printed."""
    workers: int | None = None
    """Processes. null: the cores that may be used."""
    max_pixels: int = MAX_PIXELS
    """An image with more pixels is not decoded but counts as broken."""

    def __post_init__(self) -> None:
        if self.max_pixels < 1 or (self.workers is not None and self.workers < 0):
            raise ValueError("max_pixels must be 1 or more, workers 0 or more")
