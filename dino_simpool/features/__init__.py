"""Encoder in, arrays out: features, attention, neighbors. Here: large arrays in parts."""

from collections.abc import Iterator

MAX_BYTES = 2**28
"""Size of a working array of an evaluator."""


def chunks(count: int, row_bytes: int, *, max_bytes: int = MAX_BYTES, most: int | None = None) -> Iterator[slice]:
    """Slices that cover range(count), each with as many rows of `row_bytes` as fit in max_bytes: at
    least 1, at most `most`."""
    step = max(1, min(max_bytes // max(1, row_bytes), most or count))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
