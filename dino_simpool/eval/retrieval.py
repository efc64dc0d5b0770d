"""Landmark retrieval, ROxford and RParis: mAP and mP@1, 5, 10 in the Easy, Medium and Hard
protocols.

Metric: filipradenovic/revisitop, evaluate.py. The positives of a query should rank first, its junk
images are removed from the ranking, and all others are negatives:

    easy    positive: easy          junk: junk, hard
    medium  positive: easy, hard    junk: junk
    hard    positive: hard          junk: junk, easy

Images: the paper does not say how they are prepared, so there are presets that follow public
scripts (`PRESETS`). All of them shrink an image to a longest side with Pillow's thumbnail (Lanczos,
never enlarged) and process one image at a time, like the published eval_image_retrieval.py.
Multi-scale features are the mean of the vectors of three scales, which is then normalized (the
published code divides by the length of the whole batch, which is the same for one image).

The published code leaves some cases open. Here, equal similarities are ranked by image number;
similarities are float64 rounded to 2**-30, so that duplicates tie. An image that is named twice
among the positives counts once. Without a positive in a truncated ranking, AP and precision are 0.
A CNN also accepts thin images, whose map has one row.

Q queries, M database images, D width of a feature.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dino_simpool.config import RetrievalConfig, to_dict
from dino_simpool.data import find_images
from dino_simpool.data.augment import to_tensor
from dino_simpool.eval import run
from dino_simpool.features import chunks
from dino_simpool.features.encode import Forward, decoding_of, extract_features
from dino_simpool.features.neighbors import UNIT
from dino_simpool.features.whitening import Whitening, unit, whitening_set
from dino_simpool.layouts import differing_counts, part_counts
from dino_simpool.layouts.landmarks import landmarks
from dino_simpool.logs import say
from dino_simpool.models.encoder import Encoder

PROTOCOLS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Which images of the ground truth are positive, and which are removed as junk."""
KAPPAS = (1, 5, 10)
"""Ranks at which precision is measured."""
SCALES = (1.0, 1 / 2**0.5, 0.5)
"""Scales of the multi-scale features."""
TOP = 100
"""Number of ranks of each query that are saved."""
PRESETS = {
    "dino_default": {"roxford5k": (224, False, False), "rparis6k": (224, False, False)},
    "dino_readme": {"roxford5k": (224, False, False), "rparis6k": (512, True, False)},
    "ibot": {"roxford5k": (512, True, False), "rparis6k": (512, True, False)},
    "strict": {"roxford5k": (512, True, True), "rparis6k": (512, True, True)},
}
"""image_size, multi_scale and query_crop: defaults of dino's eval_image_retrieval.py, commands of
its README, iBOT's run.sh, and the protocol of revisitop."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one protocol, as fractions of 1."""

    map: float
    """Mean average precision over the queries that have positives; NaN if none has."""
    ap: np.ndarray
    """(Q,) average precision of each query; NaN for one without positives."""
    mp: np.ndarray
    """(K,) mean precision at each of the K kappas, over the same queries."""
    precision: np.ndarray
    """(Q, K) precision of each query at the kappas; NaN as above."""


def average_precision(ranks: Sequence[int] | np.ndarray, num_positives: int) -> float:
    """Area under the precision-recall curve by trapezoids, 0 to 1, as compute_ap of revisitop: the
    mean over the positives of the precisions just before and just after each.

    ranks: those of the found positives, from 0, ascending, without junk. num_positives: the number
    that exists, at least 1.
    """
    if num_positives < max(1, len(ranks)):
        raise ValueError(f"{num_positives} positives cannot give an average precision at {len(ranks)} ranks")
    r = np.asarray(ranks, np.float64)
    j = np.arange(len(r))
    before = np.divide(j, r, out=np.ones_like(r), where=r > 0)
    return float(((before + (j + 1) / (r + 1)) / (2 * num_positives)).sum())


def evaluate_ranks(
    ranks: np.ndarray | Tensor, gnd: Sequence[Mapping[str, Any]], *, kappas: Sequence[int] = KAPPAS
) -> dict[str, Scores]:
    """The scores of rankings in each of the PROTOCOLS.

    ranks: (kept, Q) numbers of database images, one column per query, best first, as in revisitop.
    If kept is less than the size of the database, positives beyond it count as not found. gnd: for
    each query, its "easy", "hard" and "junk" images. Precision at kappa stops at the last positive
    found, if that comes earlier. ValueError if the numbers of queries differ.
    """
    order = np.asarray(ranks)
    if order.ndim != 2 or order.shape[1] != len(gnd):
        raise ValueError(
            f"ranks have the shape {order.shape} for {len(gnd)} queries: give (images, queries), one column per query"
        )
    if not kappas or min(kappas) < 1:
        raise ValueError(f"kappas are {tuple(kappas)}: give one or more ranks, each 1 or more")
    scores = {}
    for protocol, kinds in PROTOCOLS.items():
        rows = []
        for column, entry in zip(order.T, gnd, strict=True):
            positive, junk = (np.unique(np.concatenate([np.asarray(entry[k], np.int64) for k in kind])) for kind in kinds)
            rows.append(_score(column, positive, junk, kappas))
        table = np.array(rows, np.float64).reshape(len(rows), 1 + len(kappas))
        counted = table[~np.isnan(table[:, 0])]
        mean = counted.mean(0) if len(counted) else np.full(1 + len(kappas), math.nan)
        scores[protocol] = Scores(float(mean[0]), table[:, 0], mean[1:], table[:, 1:])
    return scores


def _score(ranking: np.ndarray, positive: np.ndarray, junk: np.ndarray, kappas: Sequence[int]) -> list[float]:
    if not len(positive):
        return [math.nan] * (1 + len(kappas))
    found = np.flatnonzero(np.isin(ranking, positive))
    found -= np.searchsorted(np.flatnonzero(np.isin(ranking, junk)), found)  # minus the junk above each
    stops = [min(int(found[-1]) + 1, kappa) if len(found) else kappa for kappa in kappas]
    return [average_precision(found, len(positive)), *(float((found < stop).sum()) / stop for stop in stops)]


def rank(queries: Tensor, database: Tensor) -> Tensor:
    """The numbers (Q, M) int32 of the database images in descending cosine similarity to each
    query; ties by number. queries: (Q, D), database: (M, D), of any length."""
    order = torch.empty(len(queries), len(database), dtype=torch.int32)
    for rows in chunks(len(queries), 32 * len(database)):
        query = unit(queries[rows])
        similarity = torch.empty(len(query), len(database), dtype=torch.int64)
        for block in chunks(len(database), 16 * database.shape[1]):
            similarity[:, block] = (query @ unit(database[block]).T * UNIT).round().long()
        order[rows] = similarity.argsort(dim=1, descending=True, stable=True).int()
    return order


def thumbnail(image: Image.Image, *, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, H, W) float32 of an RGB image, its longest side shrunk with Lanczos, normalized."""
    image = image.copy()
    image.thumbnail((image_size, image_size), Image.Resampling.LANCZOS)
    return to_tensor([image], mean=mean, std=std)[0]


class MultiScale(nn.Module):
    """The mean of an encoder's features of an image at several scales: multi_scale in utils.py of
    dino and simpool, without its normalization."""

    def __init__(self, encoder: nn.Module, scales: Sequence[float]):
        super().__init__()
        self.encoder, self.scales = encoder, tuple(scales)
        self.embed_dim: int = encoder.embed_dim  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self._at(images, scale) for scale in self.scales]).sum(0) / len(self.scales)

    def _at(self, images: Tensor, scale: float) -> Tensor:
        if scale != 1:
            images = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        try:
            return self.encoder(images)
        except RuntimeError as error:
            if "Kernel size" not in str(error):  # torch's own error for a ConvNeXt and a side below 32 pixels
                raise
            size = f"{images.shape[-2]} x {images.shape[-1]} pixels at scale {scale:.2g}"
            raise ValueError(f"{size} are too small for the encoder: give a larger image_size, or multi_scale false") from error


def main(cfg: RetrievalConfig) -> None:
    """The command `dino-simpool retrieval`."""
    run("retrieval", evaluate, cfg)


def resolve(cfg: RetrievalConfig, *, turned: bool = False) -> dict[str, Any]:
    """image_size, multi_scale and query_crop: those given, else the preset's. turned: whether the
    training rotated images. ValueError for boxes in rotated images."""
    given = {"image_size": cfg.image_size, "multi_scale": cfg.multi_scale, "query_crop": cfg.query_crop}
    preset = zip(given, PRESETS[cfg.preset][cfg.dataset], strict=True)
    settings = {name: default if given[name] is None else given[name] for name, default in preset}
    if settings["query_crop"] and (turned if cfg.exif_orientation is None else cfg.exif_orientation):
        raise ValueError("exif_orientation must be false with query_crop: boxes belong to the pixels as they are stored")
    return settings


def evaluate(encoder: Encoder, cfg: RetrievalConfig) -> dict[str, Any]:
    """map_<protocol> and mp1_, mp5_, mp10_<protocol> in % (none if no query has positives), counts
    and settings.

    Tensors: `ranks` (Q, 100) int32, numbers of database images (distractors are numbered after
    them), and `ap_<protocol>` (Q,) float64 in %, NaN for queries without positives.
    """
    if not cfg.data:
        raise ValueError("no data is given: give --data DIR, the folder that holds roxford5k/ or rparis6k/")
    settings = resolve(cfg, turned=encoder.decoding.exif_orientation)
    database_set, query_set, truth = landmarks(cfg.dataset, cfg.data)
    counts = part_counts({"database": database_set, "queries": query_set})
    for line in (warnings := differing_counts(cfg.dataset, counts)):
        say(f"warning: {line}")
    if not settings["query_crop"]:
        query_set = dataclasses.replace(query_set, boxes=None)
    distractors = _distractors(cfg.distractors, encoder.embed_dim)
    more = {} if distractors is not None else {"distractors": find_images(cfg.distractors)}
    others, dim = whitening_set(cfg.whitening_data, encoder.embed_dim, dim=cfg.whitening_dim)

    decoding = decoding_of(cfg, encoder, database_set)
    scales = SCALES if settings["multi_scale"] else SCALES[:1]
    normalization: dict[str, Any] = {"mean": encoder.config.mean, "std": encoder.config.std}
    sets = {"database": database_set, "queries": query_set} | more | ({} if others is None else {"whitening": others})
    transform = partial(thumbnail, image_size=settings["image_size"], **normalization)
    forward = Forward(transform, 1, cfg.workers, cfg.precision)  # each image has its own size
    encoder_at_scales = MultiScale(encoder, scales)
    features = {
        name: extract_features(encoder_at_scales, images.with_decoding(decoding), forward, description=name)
        for name, images in sets.items()
    }
    distractors = features["distractors"] if distractors is None else distractors
    database, queries = torch.cat([features["database"], distractors]), features["queries"]
    if others is not None:
        whitening = Whitening.learn(features["whitening"], dim)
        database, queries = whitening(database), whitening(queries)

    preparation = {"preset": cfg.preset, **settings, "scales": scales, "resize": "longest side, Lanczos, never enlarged"}
    order = rank(queries, database)
    result: dict[str, Any] = {"ranks": order[:, :TOP].contiguous(), "kappas": KAPPAS, "queries_with_positives": {}}
    for protocol, scores in evaluate_ranks(order.T, truth).items():
        result["queries_with_positives"][protocol] = int((~np.isnan(scores.ap)).sum())
        result[f"ap_{protocol}"] = torch.from_numpy(100 * scores.ap)
        if not math.isnan(scores.map):
            result[f"map_{protocol}"] = 100 * scores.map
            result |= {f"mp{kappa}_{protocol}": 100 * float(value) for kappa, value in zip(KAPPAS, scores.mp, strict=True)}
    return result | {
        "dataset": cfg.dataset,
        "split": "test",
        "counts": {name: len(images) for name, images in sets.items()} | {"distractors": len(distractors)},
        "count_warnings": warnings,
        "decoding": to_dict(decoding),
        "preprocessing": preparation | normalization,
        "whitening": None if others is None else {"data": cfg.whitening_data, "dimensions": dim},
    }


def _distractors(file: str, width: int) -> Tensor | None:
    """The features (images, width) in a .npy file, none without a file, or None for images."""
    if not file:
        return torch.empty(0, width)
    if not file.endswith((".npy", ".npz")):
        return None
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not an array of features ({error}): give a .npy file of numbers") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.shape[1] != width or array.dtype.kind != "f":
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise ValueError(f"{file} holds {found}: distractors are features (images, {width}) of this encoder, in one .npy file")
    features = torch.from_numpy(np.array(array, np.float32))
    if not features.sum(1).isfinite().all():
        raise ValueError(f"{file} holds features that are not finite: extract them again")
    return features
