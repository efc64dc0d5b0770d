"""Counts how many gallery images are nearer to a query than the best one of its class, without
sorting.

Float64 products within each class find the best positive. Float32 products of all pairs, one tile
at a time, then count what is nearer. Pairs that are too close for float32 are counted by float64
products rounded to 2**-30, as in neighbors.py, so the result is exact. If the queries are their own
gallery, a tile serves its columns as well as its rows, and half of the products are enough.

Q queries, M gallery images, D width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_simpool.features import MAX_BYTES, chunks
from dino_simpool.features.neighbors import UNIT, full_precision, keys_of, lengths_of, margin

TILE = 1024
"""Side of a tile on a CPU: two tiles fit in its cache."""
DEVICE_TILE = 8192
"""Side of a tile on other devices."""
NOTHING = -(2**62)
"""A key below that of any similarity."""


@dataclass(frozen=True, eq=False)
class Labeled:
    """Features sorted by label (images of one class are adjacent), on their device."""

    rows: Tensor  # (M, D), of any length
    lengths: Tensor  # (M,) float64
    labels: Tensor  # (M,) int64, ascending
    number: Tensor  # (M,) int64, their places before sorting

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> Labeled:
        """Features and labels in any order. ValueError if a feature is not finite."""
        labels, order = labels.to(features.device).long().sort(stable=True)
        rows = features[order]
        return cls(rows, lengths_of(rows), labels, order)

    def exact(self, index: Tensor | slice) -> Tensor:
        """The rows `index`, of unit length in float64."""
        return self.rows[index].double() / self.lengths[index, None]

    def unit(self) -> Tensor:
        """All rows, of unit length in float32, (M, D)."""
        unit = torch.empty(self.rows.shape, device=self.rows.device)
        for part in chunks(len(unit), 16 * unit.shape[1]):
            unit[part] = self.exact(part)
        return unit


def best_positive(queries: Labeled, gallery: Labeled, *, own: bool) -> Tensor:
    """The key (neighbors.py) of the nearest positive of each query, (Q,) int64, with its `number`;
    NOTHING if there is none.

    own: queries and gallery are the same; a query is never its own positive.
    """
    best = torch.full_like(queries.labels, NOTHING)
    start = torch.searchsorted(gallery.labels, queries.labels).tolist()
    stop = torch.searchsorted(gallery.labels, queries.labels, right=True).tolist()
    for rows in chunks(len(best), 1, most=64):
        exact = queries.exact(rows)
        begin, end = start[rows.start], stop[rows.stop - 1]  # all gallery images of these classes, and of the classes between
        for part in chunks(end - begin, 8 * (exact.shape[1] + 4 * len(exact))):
            columns = slice(begin + part.start, begin + part.stop)
            key = keys_of(exact @ gallery.exact(columns).T, gallery.number[columns])
            positive = queries.labels[rows, None] == gallery.labels[columns]
            if own:
                positive &= queries.number[rows, None] != gallery.number[columns]
            best[rows] = torch.maximum(best[rows], torch.where(positive, key, NOTHING).amax(1))
    return best


def count_nearer(
    queries: Labeled, gallery: Labeled, best: Tensor, *, own: bool, tile: int | None, part: tuple[int, int]
) -> Tensor:
    """The number of gallery images that are nearer than the `best_positive`, (Q, 2) int64: in the
    stable order, and strictly.

    tile: side of a tile, None for what suits the device. part: (i, n) counts only every n-th tile,
    starting at tile i.
    """
    device = queries.rows.device
    side = tile or (TILE if device.type == "cpu" else DEVICE_TILE)
    unit = queries.unit()
    gallery_unit = unit if own else gallery.unit()
    level = torch.where(best > NOTHING, (best >> 32).double() / UNIT, torch.inf)[:, None]
    error = margin(queries.rows.shape[1])
    nearer = torch.zeros(len(best), 2, dtype=torch.int64, device=device)
    counter = _Counter(queries, gallery, best, (level - error).float(), (level + error).float(), nearer)
    product, mask = (torch.empty(side * side, device=device) for _ in range(2))
    # All pairs, or with `own` the upper triangle.
    corners = ((i, j) for i in range(0, len(unit), side) for j in range(i if own else 0, len(gallery_unit), side))
    with full_precision():
        for i, j in itertools.islice(corners, part[0], None, part[1]):
            rows, columns = slice(i, min(i + side, len(unit))), slice(j, min(j + side, len(gallery_unit)))
            shape = (rows.stop - i, columns.stop - j)
            similarity, space = (memory[: shape[0] * shape[1]].view(shape) for memory in (product, mask))
            torch.mm(unit[rows], gallery_unit[columns].T, out=similarity)
            if own and i == j:
                similarity.fill_diagonal_(-2)  # below any similarity: a query never finds itself
            counter.add(similarity, rows, columns, space)
            if own and i != j:
                counter.add(similarity.T, columns, rows, space.T)
    return nearer


@dataclass(frozen=True, eq=False)
class _Counter:
    queries: Labeled
    gallery: Labeled
    best: Tensor  # (Q,) keys
    low: Tensor  # (Q, 1) float32: anything below is certainly not nearer
    high: Tensor  # (Q, 1) float32: anything above is certainly nearer
    nearer: Tensor  # (Q, 2) int64, counts so far

    def add(self, similarity: Tensor, rows: slice, columns: slice, space: Tensor) -> None:
        """Count a tile (b, c) of float32 similarities. space: memory of its shape and strides."""
        low, high = self.low[rows], self.high[rows]
        # Comparing into float32 and summing that (exact up to 2**24) is faster than with booleans.
        certain = torch.gt(similarity, high, out=space).sum(1)
        unsure = (torch.ge(similarity, low, out=space).sum(1) - certain).nonzero()[:, 0]
        self.nearer[rows] += certain.long()[:, None]
        if len(unsure):  # in few tiles: positives, as near as the best one, lie on the diagonal or beside it
            near = similarity[unsure]
            self._settle((near >= low[unsure]) & (near <= high[unsure]), rows.start + unsure, columns)

    def _settle(self, near: Tensor, rows: Tensor, columns: slice) -> None:
        """Count which of the marked pairs (rows, columns) are nearer in float64."""
        row, column = near.nonzero(as_tuple=True)
        query, other = rows[row], columns.start + column
        if 8 * len(row) > near.numel():  # with so many near-ties, the product of all pairs is cheaper
            similarity = (self.queries.exact(rows) @ self.gallery.exact(columns).T)[near]
        else:
            # in parts that fit in the processor's cache
            parts = chunks(len(row), 16 * self.queries.rows.shape[1], max_bytes=MAX_BYTES // 64)
            similarity = torch.cat([(self.queries.exact(query[p]) * self.gallery.exact(other[p])).sum(1) for p in parts])
        key, best = keys_of(similarity, self.gallery.number[other]), self.best[query]
        self.nearer.index_add_(0, query, torch.stack([key > best, key >> 32 > best >> 32], 1).long())
