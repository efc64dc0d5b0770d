"""How many gallery images are nearer to a query than the best one of its class: a count, so nothing is sorted.

The best positive is known from float64 products within each class. Float32 products of all pairs, a tile at a time, then count
what is nearer; what comes as near to it as float32 errs is counted by float64 products rounded to 2**-30, as in search.py. So
the result is exact, whatever the tiles and processes. If the queries are their own gallery, a tile serves its columns as well
as its rows, hence half of the products are enough.

Q queries, M gallery images, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_simpool.eval import MAX_BYTES, chunks
from dino_simpool.eval.search import UNIT, full_precision, keys_of, margin

TILE = 1024
"""Side of a tile on a CPU: two of them stay in its cache."""
DEVICE_TILE = 8192
"""Side of a tile elsewhere."""
NOTHING = -(2**62)
"""A key below those of all similarities."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Features with labels, on the device where they are compared."""

    rows: Tensor  # (M, D), as given
    lengths: Tensor  # (M,) float64
    labels: Tensor  # (M,) int64

    def exact(self, index: Tensor | slice) -> Tensor:
        """Rows of unit length in float64."""
        return self.rows[index].double() / self.lengths[index, None]

    def unit(self) -> Tensor:
        """All of them in float32, (M, D)."""
        return torch.cat([self.exact(part).float() for part in chunks(len(self.rows), 16 * self.rows.shape[1])])


def best_positive(queries: Labelled, gallery: Labelled, *, own: bool) -> Tensor:
    """The key (search.py) of the nearest positive of each query, (Q,) int64; NOTHING if it has none.

    In the order of labels a few queries and the gallery images of their classes are two slices.
    """
    best = torch.full_like(queries.labels, NOTHING)
    order, gallery_order = queries.labels.argsort(stable=True), gallery.labels.argsort(stable=True)
    labels, gallery_labels = queries.labels[order], gallery.labels[gallery_order]
    start = torch.searchsorted(gallery_labels, labels).tolist()
    stop = torch.searchsorted(gallery_labels, labels, right=True).tolist()
    first = 0
    while first < len(order):
        last = min(first + 64, len(order))
        rows = order[first:last]
        for columns in chunks(stop[last - 1] - start[first], 8 * (queries.rows.shape[1] + 4 * len(rows)), max_bytes=MAX_BYTES):
            index = gallery_order[start[first] + columns.start : start[first] + columns.stop]
            key = keys_of(queries.exact(rows) @ gallery.exact(index).T, index)
            positive = queries.labels[rows, None] == gallery.labels[index]
            if own:
                positive &= rows[:, None] != index
            found = torch.where(positive, key, NOTHING).amax(1)
            best[rows] = torch.maximum(best[rows], found)
        first = last
    return best


def _tiles(queries: int, gallery: int, side: int, *, own: bool) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the tiles that cover all pairs; if both are the same images, of the upper triangle."""
    for i in range(0, queries, side):
        for j in range(i if own else 0, gallery, side):
            yield slice(i, min(i + side, queries)), slice(j, min(j + side, gallery))


def count_nearer(
    queries: Labelled, gallery: Labelled, best: Tensor, *, own: bool, tile: int | None, part: tuple[int, int]
) -> Tensor:
    """How many gallery images are nearer than the best positive, (Q, 2) int64: by the stable order, and more similar than it.

    part: (i, n) counts every n-th tile from the i-th on only.
    """
    device, width = queries.rows.device, queries.rows.shape[1]
    side = tile or (TILE if device.type == "cpu" else DEVICE_TILE)
    unit = queries.unit()
    gallery_unit = unit if own else gallery.unit()
    counter = _Counter(queries, gallery, best, margin(width), torch.zeros(len(best), 2, dtype=torch.int64, device=device))
    product, mask = (torch.empty(side * side, device=device) for _ in range(2))
    with full_precision():
        for number, (rows, columns) in enumerate(_tiles(len(unit), len(gallery_unit), side, own=own)):
            if number % part[1] != part[0]:
                continue
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            similarity, space = (memory[: shape[0] * shape[1]].view(shape) for memory in (product, mask))
            torch.mm(unit[rows], gallery_unit[columns].T, out=similarity)
            if own and rows == columns:
                similarity.fill_diagonal_(-2)  # less than any: nobody finds himself
            counter.add(similarity, rows, columns, space)
            if own and rows != columns:
                counter.add(similarity.T, columns, rows, space.T)
    return counter.nearer


@dataclass(frozen=True, eq=False)
class _Counter:
    queries: Labelled
    gallery: Labelled
    best: Tensor  # (Q,) keys
    margin: float
    nearer: Tensor  # (Q, 2) int64, the counts so far

    def add(self, similarity: Tensor, rows: slice, columns: slice, space: Tensor) -> None:
        """Count a tile (b, c) of float32 similarities. space: memory of its shape and strides."""
        best = self.best[rows]
        level = torch.where(best > NOTHING, (best >> 32).double() / UNIT, torch.inf)[:, None]
        low, high = (level - self.margin).float(), (level + self.margin).float()
        # A comparison into float32, and the sum of that (exact up to 2**24), are faster than with booleans.
        certain = torch.gt(similarity, high, out=space).sum(1)
        unsure = (torch.ge(similarity, low, out=space).sum(1) - certain).nonzero()[:, 0]
        self.nearer[rows] += certain.long()[:, None]
        if len(unsure):
            near = similarity[unsure]
            self._settle((near >= low[unsure]) & (near <= high[unsure]), rows.start + unsure, columns)

    def _settle(self, near: Tensor, rows: Tensor, columns: slice) -> None:
        """Count what of the marked pairs (rows, columns) is nearer in float64."""
        row, column = near.nonzero(as_tuple=True)
        query, index = rows[row], columns.start + column
        if 8 * len(row) > near.numel():  # so many near-ties that the product of all is cheaper
            similarity = (self.queries.exact(rows) @ self.gallery.exact(columns).T)[near]
        else:
            # Parts that fit in the processor's cache.
            parts = chunks(len(row), 16 * self.queries.rows.shape[1], max_bytes=MAX_BYTES // 64)
            similarity = torch.cat([(self.queries.exact(query[p]) * self.gallery.exact(index[p])).sum(1) for p in parts])
        key, best = keys_of(similarity, index), self.best[query]
        self.nearer.index_add_(0, query, torch.stack([key > best, key >> 32 > best >> 32], 1).long())
