"""The options of the attention maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_simpool.config.evaluate import EvalConfig
from dino_simpool.config.parts import Decoding, Loading, at_least


@dataclass(frozen=True)
class AttentionConfig(Decoding, Loading, EvalConfig):
    """Where the encoder looks, on any images: maps, pictures, masks and boxes."""

    data: str = ""
    """One image, a folder with any nesting, or a text file with one path per line."""
    val: str = ""
    """Folder inside data to take the images from. Empty: data itself."""
    subset_per_class: int | None = None
    """Take only the first N images of each class in sorted order. null: all."""
    max_images: int = 100
    """Images to show, evenly spread over the data."""
    fit: Literal["square", "shorter", "longer", "native"] = "square"
    """What image_size is the length of. square: both sides, whatever the shape of the image
    (paper). shorter or longer: that side of the image, which keeps its shape (up to 64:1 with
    shorter). native: images keep their size. A side shorter than one cell is enlarged to one cell;
    a ViT drops the pixels beyond its last whole patch."""
    image_size: int | None = None
    """Length in pixels, see fit. null: four times that of the model (paper: 896 = 4 * 224)."""
    heads: Literal["mean", "each"] = "mean"
    """The mean over the attention heads, or each head. Heads are those of the last block for the
    class token, and model.num_heads for SimPool."""
    mass: float = 0.6
    """A mask is the fewest cells that hold this share of the attention, 0 to 1 (paper: 0.6)."""
    smooth: bool = False
    """Draw attention bicubically between cell centers. false: cells as squares, as published."""
    sheet_images: int = 24
    """Number of these images on the contact sheet."""
    batch_size: int = 4
    """Images in one forward pass of one process with fit square. Any other fit: one by one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit == "native" and self.image_size is not None:
            raise ValueError("fit native keeps the size of every image: leave out image_size, or choose another fit")
        at_least(1, self, "subset_per_class", "image_size", "max_images", "sheet_images")
        if not 0 < self.mass < 1:
            raise ValueError(f"mass is {self.mass}: give a share of the attention above 0 and below 1")
