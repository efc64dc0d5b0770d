"""The options of `extract`, which writes features to a folder, and `search`, which reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
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
    """Also write index.faiss for `search` (level global)."""
    index_kind: Literal["flat", "ivfpq"] = "flat"
    """flat: exact, all features in memory. ivfpq: for millions of images, D/8 + 8 bytes of memory
    each; its recall against exact search is measured and stored."""
    labels: bool = False
    """Also write labels.npy (class of each row) and classes.txt (names). data has class folders."""
    shard: str = ""
    """Only one of several parts, counted from 1: 3/16, in OUT/shard_3_of_16. Each can run on
    another machine, as in a SLURM array of 1 to 16: --shard $SLURM_ARRAY_TASK_ID/16. Then merge
    them."""
    merge: str | tuple[str, ...] = path("", "folder")
    """Put all shards together, in place of extracting: the OUT of the shards, or a list of folders.
    Nothing else is given but the place, and index or parquet: --merge OUT --out OUT --index."""
    parquet: bool = False
    """Also write features.parquet (level global): id (line of ids.txt), row, feature. It needs
    pyarrow: pip install 'dino-simpool[parquet]'."""
    view: Literal["crop", "whole"] = "crop"
    """crop: shorter side to resize, then the center, as published. whole: all of the image,
    squeezed into the square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("index", "parquet"):
            if getattr(self, name) and self.level != "global":
                raise ValueError(f"{name} is for level global, given level {self.level}: leave one of the two out")
        if self.index_kind != "flat" and not self.index:
            raise ValueError(f"index_kind {self.index_kind} needs index: give --index too")
        if self.shard:
            parse_shard(self.shard)
        if self.shard and self.index:
            raise ValueError("index is of all images, not of a shard: leave it out here and give it with --merge")
        if self.merge:
            allowed = ("merge", "out", "index", "index_kind", "parquet", "device")
            usual = ExtractConfig()
            given = [f.name for f in fields(self) if f.name not in allowed and getattr(self, f.name) != getattr(usual, f.name)]
            if given:
                raise ValueError(f"merge takes all settings from the shards: leave out {', '.join(given)}")
        if self.resize is not None and self.view == "whole":
            raise ValueError("resize is for view crop, view whole has no crop: leave one of the two out")

    def needs(self, option: str) -> bool:
        """Shards that are merged need neither weights nor images."""
        return not self.merge or option not in ("checkpoint", "data")


def parse_shard(text: str) -> tuple[int, int]:
    """Number and count from `3/16`. ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shard is {text}: give the number of the part, from 1, and how many there are, as in 3/16")
    return int(match[1]), int(match[2])


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
