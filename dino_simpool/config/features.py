"""The options of `extract`, which writes features to a folder, and `search`, which reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_simpool.config.parts import Compute, Decoding, Device, Excluding, Loading, Square, Weights, Workers, option, path

_GIVE = "no {} is given: give --checkpoint RUN/last.pth --data IMAGES --out OUT"
_GIVE_INDEX = "no {} is given: give --index DIR --query IMAGE --out OUT, DIR as `extract --index` wrote it"


@dataclass(frozen=True)
class ExtractConfig(Decoding, Excluding, Loading, Square, Compute, Weights):
    """The features of any images, in a memory-mapped file. Run the same command again to resume."""

    checkpoint: str = path("", "checkpoint", needed=_GIVE.format("checkpoint"))
    """A training checkpoint (last.pth, best.pth) or an exported backbone.safetensors."""
    data: str | tuple[str, ...] = path("", "images", needed=_GIVE.format("data"))
    """A folder (any nesting), text file of paths, or list of these: --data '[DIR, LIST.txt]'."""
    out: str = path("", "out", needed=_GIVE.format("out"))
    """Folder to write: features.npy, ids.txt (the image of each row), meta.json (every setting)."""
    level: Literal["global", "tokens", "keys", "attention"] = "global"
    """global: one feature per image (M, D). tokens: what is pooled (M, N, D). keys: SimPool's keys
    of the tokens (M, N, D). attention: maps (M, h, w) that sum to 1."""
    index: bool = False
    """Also write index.faiss for `search`: inner products of normalized features (level global)."""
    labels: bool = False
    """Also write labels.npy (class of each row) and classes.txt (names). data has class folders."""
    view: Literal["crop", "whole"] = "crop"
    """crop: shorter side to resize, then the center, as published. whole: all of the image,
    squeezed into the square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index and self.level != "global":
            raise ValueError(f"index is for level global, given level {self.level}: leave one of the two out")
        if self.resize is not None and self.view == "whole":
            raise ValueError("resize is for view crop, view whole has no crop: leave one of the two out")


@dataclass(frozen=True)
class SearchConfig(Workers, Device):
    """Find the images of an extracted set that are most similar to these.

    Queries are decoded, prepared and encoded with the settings of the index.
    """

    index: str = path("", "folder", needed=_GIVE_INDEX.format("index"))
    """Folder that `extract --index` wrote."""
    query: str | tuple[str, ...] = path("", "images", needed=_GIVE_INDEX.format("query"))
    """An image, a folder of images, a text file of paths, or a list: --query '[A.jpg, B.jpg]'."""
    out: str = path("", "out", needed=_GIVE_INDEX.format("out"))
    """Folder to write: results.json and contact_sheet.png."""
    k: int = option(10, least=1, most=10**6)
    """Neighbors to find for each query."""
    exclude_self: bool = False
    """Leave the file that is the query itself out of its neighbors. false: it is marked."""
    sheet_rows: int = option(20, least=1, most=1000)
    """Queries on the contact sheet, from the first on; results.json has all of them."""
    sheet_columns: int = option(10, least=1, most=1000)
    """Neighbors of each query on the contact sheet; results.json has all of them."""
    checkpoint: str = path("", "checkpoint")
    """The checkpoint of the index, if it was moved since. Its content must be the same."""
    data: str | tuple[str, ...] = path("", "images")
    """The images of the index, if they were moved since. Their names must be the same."""
