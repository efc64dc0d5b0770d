"""The index of `extract --index`: which rows of features may be nearest to a query.

`flat` compares a query with every row, exactly, and holds all rows in memory. `ivfpq` is for
millions of images: rows are sorted into lists by k-means, and a row is a code of D/8 bytes. A query
is compared with the codes of the nearest lists only, and the best of these rows are then read from
the disk and compared exactly. How many of the true neighbors this finds is measured when the index
is built, on images of the set, and as many lists are read as that takes. (Product quantization:
Jegou et al., "Product Quantization for Nearest Neighbor Search", TPAMI 2011.)

M rows, D width of a feature.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import faiss
import numpy as np

from dino_simpool.features import chunks
from dino_simpool.logs import progress, say

SPARE = 32
"""Candidates beyond k."""
NEAR = 1e-5
"""Two similarities of a flat index that differ by more than this are in the right order."""
CODED_CANDIDATES = 1000
"""Rows that are compared exactly for a query of an ivfpq index, at least."""
LEAST_ROWS = 10_000
"""Of an ivfpq index: with fewer, the codes cannot be learned, and flat is fast."""
SAMPLE_PER_LIST = 64
"""Rows from which k-means learns; faiss asks for 39 or more."""
QUERIES, NEIGHBORS, ENOUGH = 200, 10, 0.95
"""Recall is measured with this many images, at this many neighbors, until it is this high."""


class Rows(Protocol):
    """Rows (M, D) float32, in memory or on the disk."""

    shape: tuple[int, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


def build_flat(features: Rows) -> faiss.IndexFlatIP:
    """An exact index of features (M, D): inner products of unit rows. Zeros stay zero."""
    index = faiss.IndexFlatIP(features.shape[1])
    for part in chunks(len(features), 12 * features.shape[1]):
        index.add(_unit(features[part]).astype(np.float32))
    return index


def build_ivfpq(features: Rows) -> tuple[faiss.IndexIVFPQ, dict[str, Any]]:
    """An index of codes of features (M, D), and what meta.json says about it. The memory that it
    needs is printed first. ValueError for fewer than LEAST_ROWS."""
    count, width = features.shape
    if count < LEAST_ROWS:
        raise ValueError(f"index_kind ivfpq is for {LEAST_ROWS:,} images or more, given {count:,}: use flat, which is exact")
    lists = 2 ** math.ceil(math.log2(math.sqrt(count)))
    code_bytes = next(width // size for size in range(min(8, width), width + 1) if width % size == 0)
    sample = min(count, SAMPLE_PER_LIST * lists)
    held = count * (code_bytes + 8) + 3 * sample * 4 * width
    say(
        f"index: {lists:,} lists, {code_bytes} bytes an image, learned from {sample:,} images; needs about {held / 1e9:.2f} GB "
        f"of memory (a flat index: {count * 4 * width / 1e9:.2f} GB)"
    )
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, lists, code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
    drawn = np.sort(np.random.default_rng(0).choice(count, sample, replace=False))
    learned_from = np.empty((sample, width), np.float32)
    for part in chunks(sample, 12 * width, max_bytes=2**26):
        learned_from[part] = _unit(features[drawn[part]])
    index.train(learned_from)
    del learned_from
    with progress(count, 0, "index") as bar:
        for part in chunks(count, 12 * width, max_bytes=2**26):
            index.add(_unit(features[part]).astype(np.float32))
            bar.update(part.stop - part.start)
    about = {"kind": "ivfpq", "lists": lists, "code_bytes": code_bytes, "learned_from": sample}
    return index, about | measure(index, features)


def measure(index: faiss.IndexIVFPQ, features: Rows) -> dict[str, Any]:
    """Set how many lists of the index a query reads (`nprobe`): as few as find ENOUGH of the true
    neighbors. Returns it, and the recall@10 of each number that was tried.

    Queries are rows of the set, evenly spaced; a row itself is no neighbor. One that is as near as
    the tenth, to 1e-6, counts as found, so that duplicates cannot hide each other.
    """
    numbers = np.linspace(0, len(features) - 1, min(QUERIES, len(features))).astype(np.int64)
    queries = _unit(features[numbers])
    k = min(NEIGHBORS, len(features) - 1)
    best = np.full((len(numbers), k + 1), -np.inf)
    with progress(len(features), 0, "recall of the index") as bar:
        for part in chunks(len(features), 12 * features.shape[1], max_bytes=2**26):
            block = _unit(features[part]).astype(np.float32)
            found, _ = faiss.knn(queries.astype(np.float32), block, min(k + 1, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            best = -np.sort(-np.concatenate([best, found], 1), 1)[:, : k + 1]
            bar.update(len(block))
    needed = best[:, k] - 1e-6  # place k, counted from 0: the row itself is one of these k + 1
    recalls: dict[str, float] = {}
    nprobe = 1
    while True:
        index.nprobe = nprobe
        hits = 0
        for number, query, lowest in zip(numbers.tolist(), queries, needed, strict=True):
            similarity, rows = nearest(features, index, query, k=k + 1)
            hits += min(k, int((similarity[rows != number] >= lowest).sum()))
        recalls[str(nprobe)] = round(hits / (len(numbers) * k), 4)
        if recalls[str(nprobe)] >= ENOUGH or nprobe == index.nlist:
            break
        nprobe *= 2
    return {"nprobe": nprobe, "queries": len(numbers), "candidates": CODED_CANDIDATES, f"recall@{NEIGHBORS}": recalls}


def nearest(features: Rows, index: faiss.Index, query: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows (all, if k is above M) with the highest cosine to a query (D,) of any length:
    similarities float64 in steps of 1e-6, descending, and row numbers. Equal ones: lower row first.

    features: (M, D), from which the index was built. An ivfpq index may miss rows, and may return
    fewer than k, but the similarities of those that it returns are exact.
    """
    query = query.astype(np.float64)
    unit = query / max(float(np.linalg.norm(query)), 1e-12)
    coded = isinstance(index, faiss.IndexIVFPQ)
    k = min(k, len(features))
    count = min(max(k + SPARE, CODED_CANDIDATES if coded else 0), len(features))
    similarity, found = index.search(unit.astype(np.float32)[None], count)
    rows = np.sort(found[0][found[0] >= 0])
    if not coded and count < len(features) and similarity[0, k - 1] - similarity[0, -1] < NEAR:
        rows = np.arange(len(features))
    cosines = np.empty(len(rows))
    for part in chunks(len(rows), 16 * features.shape[1]):
        cosines[part] = _unit(features[rows[part]]) @ unit
    cosines = cosines.round(6)
    best = np.argsort(-cosines, kind="stable")[:k]
    return cosines[best], rows[best]


def _unit(rows: np.ndarray) -> np.ndarray:
    """(n, D) float64 of length 1, zeros of length 0."""
    double = rows.astype(np.float64)
    unit: np.ndarray = double / np.maximum(np.linalg.norm(double, axis=1, keepdims=True), 1e-12)
    return unit
