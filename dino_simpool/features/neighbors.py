"""Exact nearest neighbors by cosine, at the speed of float32, for k-NN and fine-grained recall.

One search in float32 (faiss on the CPU, a blocked product elsewhere) finds candidates, somewhat
more than k. Their cosines are then computed in float64 and rounded to 2**-30, so that duplicates
tie. Test images for which rounding could have hidden a neighbor (more than 32 near-ties) are
searched again in float64. So the result does not depend on blocks, batches or processes.

The bank may be a tensor over a mapped file: it is read in blocks and never copied as a whole. Rows
of float16 are computed in float32 and float64 like all others.

M training images (the bank), T test images, b of them at a time, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_simpool.features import MAX_BYTES, chunks

SPARE = 32
"""Candidates beyond k, so that near-ties at place k are resolved among the candidates."""
UNIT = 2**30
"""The fixed-point number that stands for a similarity of 1."""
INDEX = 2**32
"""A key is similarity * INDEX + (INDEX - 1 - training index): larger is nearer, and no two are
equal."""


def neighbors(train: Tensor, test: Tensor, *, k: int, max_bytes: int = MAX_BYTES) -> tuple[Tensor, Tensor]:
    """The k training rows with the highest cosines: similarities (T, k) float64, descending, and
    indices (T, k), on the CPU. Equal similarities: lower index first.

    train: (M, D); test: (T, D), on the device that searches; k <= M. max_bytes: size of each
    working array. ValueError if a feature is not finite.
    """
    test = test.cpu() if test.device.type == "mps" else test  # mps has no float64
    bank = _Bank(train.cpu(), lengths_of(train.cpu()), max_bytes)
    lengths = lengths_of(test)
    count = min(k + SPARE, len(train))
    similarity = torch.empty(len(test), k, dtype=torch.float64)
    nearest = torch.empty(len(test), k, dtype=torch.int64)
    most = None if test.device.type == "cpu" else 4096  # elsewhere all similarities of a block are in memory at once
    for rows in chunks(len(test), 12 * test.shape[1] + 40 * count, max_bytes=max_bytes // 2, most=most):
        queries = test[rows].double().div_(lengths[rows, None])
        lowest, index = bank.candidates(queries.float(), count)
        found = bank.settle(queries.cpu(), index, k)
        unsure = (found[:, -1] >> 32).double() / UNIT - lowest <= margin(test.shape[1])
        if count < len(train) and unsure.any():
            found[unsure] = bank.search_all(queries.cpu()[unsure], k)
        similarity[rows], nearest[rows] = (found >> 32).double() / UNIT, INDEX - 1 - (found & (INDEX - 1))
    return similarity, nearest


def check_ks(ks: Sequence[int]) -> None:
    """ValueError unless there is a k and every k is 1 or more."""
    if not ks or min(ks) < 1:
        raise ValueError(f"k is {', '.join(map(str, ks)) or 'empty'}: give one or more numbers of neighbors, each 1 or more")


@dataclass(frozen=True)
class _Bank:
    """Training features and three searches in them. Queries (b, D) have unit length."""

    rows: Tensor  # (M, D)
    lengths: Tensor  # (M,) float64
    max_bytes: int

    def candidates(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Float32 search for `count` rows: their lowest similarity (b,), indices (b, count)."""
        width = queries.shape[1]
        value = queries.new_empty(len(queries), 0)
        index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        on_cpu = queries.device.type == "cpu"
        # faiss keeps few similarities in memory and starts over with each block, so its blocks are
        # as large as possible.
        search, row_bytes = (_search_faiss, 4 * width) if on_cpu else (_search_blocked, 4 * (len(queries) + 2 * width))
        for block in chunks(len(self.rows), row_bytes, max_bytes=self.max_bytes):
            unit = self.rows[block].to(torch.float32, copy=True).div_(self.lengths[block, None].float())
            similarity, place = search(queries, unit.to(queries.device), min(count, len(unit)))
            del unit  # before the next one is made
            value, index = torch.cat([value, similarity], 1), torch.cat([index, place + block.start], 1)
            value, kept = value.topk(min(count, value.shape[1]))
            index = index.gather(1, kept)
        return value[:, -1].double().cpu(), index.cpu()

    def settle(self, queries: Tensor, index: Tensor, k: int) -> Tensor:
        """The keys (b, k) of the best of the candidates (b, count), from float64 products."""
        # Query by query, so that gathered rows stay in the processor's cache. Results are written
        # in place: many small tensors between the large temporary ones would fragment the memory.
        found = torch.empty(index.shape, dtype=torch.float64)
        with one_thread():
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
    import faiss  # only where it searches: a training run without k-NN does not need it

    similarity, place = faiss.knn(queries.numpy(), unit.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(similarity), torch.from_numpy(place)


def _search_blocked(queries: Tensor, unit: Tensor, count: int) -> tuple[Tensor, Tensor]:
    with full_precision():
        return (queries @ unit.T).topk(count)


@contextmanager
def one_thread() -> Iterator[None]:
    """Many small operations on a CPU with one thread. With more, each operation waits for the
    slowest one: beside a single busy process on two cores, `settle` took 15 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products without TF32, whose error would exceed `margin`."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def margin(width: int) -> float:
    """Largest error of a float32 product of unit vectors: the rounding of both, and four sigma of
    the rounding of D additions."""
    return 2**-22 * (2 + width**0.5)


def keys_of(similarity: Tensor, index: Tensor) -> Tensor:
    """The keys (see INDEX) of float64 similarities to the rows `index`, int64, same shape."""
    return (similarity * UNIT).round().long() * INDEX + (INDEX - 1 - index)


def lengths_of(features: Tensor) -> Tensor:
    """Lengths (M,) in float64, at least 1e-12, so that a zero vector is similar to nothing."""
    lengths = torch.empty(len(features), dtype=torch.float64, device=features.device)
    for rows in chunks(len(features), 8 * features.shape[1], max_bytes=MAX_BYTES // 8):  # a norm in float64 copies its input
        lengths[rows] = torch.linalg.vector_norm(features[rows], dim=1, dtype=torch.float64)
    if not lengths.isfinite().all():
        raise ValueError(f"feature {int((~lengths.isfinite()).nonzero()[0])} is not finite: check the encoder and its input")
    return lengths.clamp_min(1e-12)
