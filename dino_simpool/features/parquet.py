"""Features as a Parquet file, which databases and data frames load."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dino_simpool.features import chunks
from dino_simpool.files import write_atomically

GROUP_BYTES = 2**25
"""Size of a row group: what a reader must hold at once."""


def require_pyarrow() -> Any:
    """The module pyarrow. ValueError, which says how to install it, if it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"parquet needs pyarrow, which cannot be imported ({error}): pip install 'dino-simpool[parquet]', or leave it out"
        ) from None
    return pyarrow


def write_parquet(folder: Path, features: np.ndarray, *, first: int = 0) -> None:
    """Write features.parquet beside ids.txt, one row group at a time.

    features: (M, D) float32.   first: the number of the first row in the whole set. Columns: `id`
    string, the line of ids.txt; `row` int64; `feature`, a list of D float32, exactly as in
    features.npy and so not normalized.
    """
    arrow, width = require_pyarrow(), features.shape[1]
    kind = arrow.list_(arrow.field("element", arrow.float32(), nullable=False), width)
    columns = [("id", arrow.string()), ("row", arrow.int64()), ("feature", kind)]
    schema = arrow.schema([arrow.field(name, kind, nullable=False) for name, kind in columns])

    def write(file: Path) -> None:
        # Names and floats hardly repeat: dictionaries would only take time.
        with (
            open(folder / "ids.txt", encoding="utf-8", newline="\n") as ids,
            arrow.parquet.ParquetWriter(str(file), schema, use_dictionary=False) as writer,
        ):
            for part in chunks(len(features), 4 * width, max_bytes=GROUP_BYTES):
                block = np.array(features[part])  # from the disk
                names = [line.removesuffix("\n") for line in islice(ids, len(block))]
                numbers = np.arange(first + part.start, first + part.start + len(block))
                values = arrow.FixedSizeListArray.from_arrays(arrow.array(block.reshape(-1)), type=kind)
                batch = [arrow.array(names, arrow.string()), arrow.array(numbers), values]
                writer.write_batch(arrow.record_batch(batch, schema=schema))

    write_atomically(folder / "features.parquet", write)
