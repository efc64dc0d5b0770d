"""Exact nearest neighbours by cosine, at the speed of float32: what k-NN and fine-grained recall search with.

One search in float32 (faiss on the CPU, a blocked product elsewhere) finds the candidates, somewhat more than k. Their
cosines are then computed in float64 and rounded to 2**-30, so that duplicates tie and the result is exact, whatever the
blocks, batches and processes. A test image for which rounding could have hidden a neighbour (more than 32 near-ties) is
searched in float64 instead.

M training images (the bank), T test images, b of them at a time, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import faiss
import torch
from torch import Tensor

from dino_simpool.features.chunks import MAX_BYTES, chunks

SPARE = 32
"""Candidates beyond k, so that near-ties at the k-th place are settled among candidates."""
UNIT = 2**30
"""A similarity of 1 in the fixed-point numbers that are compared."""
INDEX = 2**32
"""A key is similarity * INDEX + (INDEX - 1 - training index): larger is better, no two are equal."""


def neighbors(train: Tensor, test: Tensor, *, k: int, max_bytes: int = MAX_BYTES) -> tuple[Tensor, Tensor]:
    """The k training rows of highest cosine: similarities (T, k) float64, descending, and indices (T, k), on the CPU.

    train: (M, D), on the CPU; test: (T, D), where the search shall run; k <= M. Equal similarities: lower index first.
    max_bytes: size of each working array. ValueError if a feature is not finite.
    """
    test = test.cpu() if test.device.type == "mps" else test  # which has no float64
    bank = _Bank(train.cpu(), lengths_of(train.cpu()), max_bytes)
    lengths = lengths_of(test)
    count = min(k + SPARE, len(train))
    keys = torch.empty(len(test), k, dtype=torch.int64)
    most = None if test.device.type == "cpu" else 4096  # elsewhere all similarities of a block are held at once
    for rows in chunks(len(test), 4 * test.shape[1] + 32 * count, max_bytes=max_bytes, most=most):
        queries = test[rows].double() / lengths[rows, None]
        lowest, index = bank.candidates(queries.float(), count)
        found = bank.settle(queries.cpu(), index, k)
        unsure = (found[:, -1] >> 32).double() / UNIT - lowest <= margin(test.shape[1])
        if count < len(train) and unsure.any():
            found[unsure] = bank.search_all(queries.cpu()[unsure], k)
        keys[rows] = found
    return (keys >> 32).double() / UNIT, INDEX - 1 - (keys & (INDEX - 1))


@dataclass(frozen=True)
class _Bank:
    """The training features and the three searches in them. Queries are (b, D) of unit length, keys as in INDEX."""

    rows: Tensor  # (M, D)
    lengths: Tensor  # (M,) float64
    max_bytes: int

    def candidates(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Float32 search for `count` rows: the lowest similarity among them (b,) and their indices (b, count), on the CPU."""
        width = queries.shape[1]
        value = queries.new_empty(len(queries), 0)
        index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        on_cpu = queries.device.type == "cpu"
        # faiss holds few similarities at once and starts anew with each block, hence its blocks are as large as may be.
        search, row_bytes = (_search_faiss, 4 * width) if on_cpu else (_search_blocked, 4 * (len(queries) + 2 * width))
        for block in chunks(len(self.rows), row_bytes, max_bytes=self.max_bytes):
            unit = (self.rows[block].float() / self.lengths[block, None].float()).to(queries.device)
            similarity, place = search(queries, unit, min(count, len(unit)))
            value, index = torch.cat([value, similarity], 1), torch.cat([index, place + block.start], 1)
            value, kept = value.topk(min(count, value.shape[1]))
            index = index.gather(1, kept)
        return value[:, -1].double().cpu(), index.cpu()

    def settle(self, queries: Tensor, index: Tensor, k: int) -> Tensor:
        """The keys (b, k) of the best of the candidates (b, count), from float64 products."""
        # Query by query: what is gathered stays in the processor's cache, and index_select is faster than indexing. Results go
        # where they belong, since many small tensors among the large temporary ones would leave the memory in pieces.
        found = torch.empty(index.shape, dtype=torch.float64)
        for row, query, out in zip(index, queries, found, strict=True):
            torch.mv(self.rows.index_select(0, row).double(), query, out=out)
        return keys_of(found / self.lengths[index], index).topk(k).values

    def search_all(self, queries: Tensor, k: int) -> Tensor:
        """The keys (b, k) of the best of all rows, from float64 products."""
        found = []
        for part in queries.split(256):
            keys = torch.empty(len(part), 0, dtype=torch.int64)
            for block in chunks(len(self.rows), 16 * (len(part) + queries.shape[1]), max_bytes=self.max_bytes // 32):
                similarity = (part @ self.rows[block].double().T) / self.lengths[block]
                keys = torch.cat([keys, keys_of(similarity, torch.arange(block.start, block.stop))], 1)
                keys = keys.topk(min(k, keys.shape[1])).values
            found.append(keys)
        return torch.cat(found)


def _search_faiss(queries: Tensor, unit: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Inner-product search of faiss (that of IndexFlatIP, without an index's copy of the bank)."""
    similarity, place = faiss.knn(queries.numpy(), unit.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(similarity), torch.from_numpy(place)


def _search_blocked(queries: Tensor, unit: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same on any device."""
    with full_precision():
        return (queries @ unit.T).topk(count)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products without the reduced precision (TF32) that would err by more than `margin`."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def margin(width: int) -> float:
    """What a float32 product of unit vectors errs by at most: the rounding of both, and four sigma of that of D additions."""
    return 2**-22 * (2 + width**0.5)


def keys_of(similarity: Tensor, index: Tensor) -> Tensor:
    """The keys (as in INDEX) of float64 similarities and the numbers of what is similar, int64 of the same shape."""
    return (similarity * UNIT).round().long() * INDEX + (INDEX - 1 - index)


def lengths_of(features: Tensor) -> Tensor:
    """Euclidean lengths (M,) in float64, 1e-12 at least, so that a zero vector is similar to nothing."""
    lengths = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64)
    if not lengths.isfinite().all():
        raise ValueError(
            f"feature {int((~lengths.isfinite()).nonzero()[0])} is not finite, as it must be here: check the encoder"
        )
    return lengths.clamp_min(1e-12)
