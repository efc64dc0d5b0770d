"""The options of `report`, a page about a run, and `table`, results beside the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_simpool.config.parts import Device


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
    """Folder with held-out images in val/ or val.tar (and with their masks, if there are any, in
    masks/val/) for the attention overlays."""
    num_images: int = 12
    """Held-out images to show."""
