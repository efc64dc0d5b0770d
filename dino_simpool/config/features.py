"""The options of `extract`, which writes the features of any images to a folder, and of `search`, which looks there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_simpool.config.data import MAX_PIXELS
from dino_simpool.config.train import check_device


@dataclass(frozen=True)
class ExtractConfig:
    """The features of any images, in a memory-mapped file. The same command goes on where it was stopped."""

    checkpoint: str = ""
    """A training checkpoint (last.pth, best.pth) or an exported backbone.safetensors."""
    data: str | tuple[str, ...] = ""
    """A folder of images of any nesting, a text file of paths, or a list of these: --data '[DIR, LIST.txt]'."""
    out: str = ""
    """Folder to write: features.npy, ids.txt (the name of the image of each row), meta.json (every setting)."""
    which: Literal["teacher", "student", "untrained"] = "teacher"
    """Weights to take; untrained: the same encoder as its initialisation left it, for comparison."""
    min_over: Literal["image", "batch"] = "image"
    """Over what SimPool takes its minimum, whatever the training did. batch repeats the released code, whose features depend on
    the other images of the batch."""
    level: Literal["global", "tokens", "keys", "attention"] = "global"
    """global: one feature an image (M, D); tokens: what is pooled (M, N, D); keys: SimPool's keys of the tokens (M, N, D);
    attention: maps (M, h, w) that sum to 1."""
    index: bool = False
    """Write index.faiss too, which `search` needs: inner products of the normalised features (level global)."""
    labels: bool = False
    """data is a folder of class folders: write labels.npy (the class of each row) and classes.txt (their names) too."""
    view: Literal["crop", "whole"] = "crop"
    """crop: shorter side to resize, then the centre, as published; whole: all of the image, squeezed into the square."""
    image_size: int | None = None
    """Side of the square that the encoder sees, in pixels. null: as the model was made."""
    resize: int | None = None
    """Shorter side before the centre crop, in pixels. null: as the model was made; for another image_size: * 256 / 224."""
    batch_size: int = 128
    """Images in one forward pass of one process."""
    workers: int | None = None
    """Loader processes. null: the cores that this process may use."""
    exif_orientation: bool = False
    """Turn images as their EXIF tag says, as viewers do. `search` does the same."""
    max_pixels: int = MAX_PIXELS
    """An image with more pixels is not decoded but counts as broken, which ends the work. `search` does the same."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, mps, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the encoder; the file holds float32 always."""

    def __post_init__(self) -> None:
        counts = (self.batch_size, self.image_size, self.resize)
        if min(1 if count is None else count for count in counts) < 1:
            raise ValueError("batch_size, image_size and resize must be 1 or more")
        if self.workers is not None and self.workers < 0:
            raise ValueError("workers must be 0 or more")
        if self.max_pixels < 1:
            raise ValueError("max_pixels must be 1 or more")
        if self.index and self.level != "global":
            raise ValueError(f"index is for level global, given level {self.level}: leave one of the two out")
        if self.resize is not None and self.view == "whole":
            raise ValueError("resize is for view crop, view whole has no crop: leave one of the two out")
        check_device("device", self.device)


@dataclass(frozen=True)
class SearchConfig:
    """Which images of an extracted set are like these?"""

    index: str = ""
    """Folder that `extract --index` wrote."""
    query: str | tuple[str, ...] = ""
    """What to look for: an image, a folder of images, a text file of paths, or a list of images: --query '[A.jpg, B.jpg]'."""
    out: str = ""
    """Folder to write: results.json and contact_sheet.png."""
    k: int = 10
    """Neighbours to find for each query."""
    exclude_self: bool = False
    """Leave out of the neighbours the file that is the query itself; otherwise it is marked."""
    sheet_rows: int = 20
    """Queries on the contact sheet, the first of them; results.json has all."""
    sheet_columns: int = 10
    """Neighbours of each on the contact sheet; results.json has all."""
    checkpoint: str = ""
    """The checkpoint of the index, if it was moved since. Its content must be the same."""
    data: str | tuple[str, ...] = ""
    """The images of the index, if they were moved since. Their names must be the same."""
    workers: int | None = None
    """Loader processes. null: the cores that this process may use."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, mps, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if min(self.k, self.sheet_rows, self.sheet_columns) < 1:
            raise ValueError("k, sheet_rows and sheet_columns must be 1 or more")
        if self.workers is not None and self.workers < 0:
            raise ValueError("workers must be 0 or more")
        check_device("device", self.device)
