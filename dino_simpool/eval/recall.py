"""Fine-grained retrieval: Recall@k, R-precision and MAP@R of frozen features, on classes that
training has not seen.

A query is a hit at k if one of its k nearest gallery images, by cosine, is of its class. Recall@k
is the share of hits; the rank of the first positive gives it for every k. With R gallery images of
the query's class (not counting the query), R-precision is the share of positives among the R
nearest, and MAP@R = 1/R * sum over ranks i <= R of [i is positive] * (positives up to i) / i
(Musgrave et al., "A Metric Learning Reality Check", arXiv 2003.08505).

If the queries are their own gallery (CUB, Cars, SOP), a query never finds itself: it is left out by
its index. The published code drops the first result, which may be a duplicate. In-Shop has a
separate gallery. A query without a positive, such as the only image of its class, is a miss and
counts in the denominator, as in the published code (which stops with an error if there is a
gallery). Its R-precision and MAP@R are 0. `ties` decides about equal similarities:

    stable       the lower index is nearer; the default if queries are their own gallery
    optimistic   a positive is nearer than equally similar negatives; the default with a gallery,
                 as published for In-Shop

R-precision and MAP@R always use the stable order.

Q queries, M gallery images, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dino_simpool import distributed
from dino_simpool.config import RecallConfig, to_dict
from dino_simpool.data import EvalTransform
from dino_simpool.eval import run
from dino_simpool.eval.stored import description
from dino_simpool.features import chunks
from dino_simpool.features.encode import Forward, decoding_of, device_of, extract_features, preprocessing
from dino_simpool.features.neighbors import check_ks, neighbors
from dino_simpool.features.ranking import NOTHING, Labeled, best_positive, count_nearer
from dino_simpool.features.stored import StoredFeatures
from dino_simpool.layouts import differing_counts, part_counts
from dino_simpool.layouts.metric_learning import fine_grained
from dino_simpool.logs import say
from dino_simpool.models.encoder import Encoder

Ties = Literal["stable", "optimistic"]

KS = {"cub200": (1, 2, 4), "cars196": (1, 2, 4), "sop": (1, 10, 100), "inshop": (1, 10, 20), "folder": (1, 2, 4)}
"""The columns of the paper's table C5. A folder is measured like CUB."""
INTERPOLATIONS: dict[str, Literal["bicubic", "bilinear"]] = {"dino_eval": "bicubic", "dml_eval": "bilinear"}
"""How the presets resize: DINO's evaluation, and the paper's authors' metric-learning code."""


def recall_at_k(
    features: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    *,
    gallery_features: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ties: Ties | None = None,
) -> dict[int, float]:
    """Recall@k in % for each k, over all queries.

    features: (Q, D) of any length (they are normalized here), labels: (Q,) integers.
    gallery_features: (M, D), gallery_labels: (M,); without them, the queries are their own gallery,
    without the query itself. A k larger than the gallery means all of it. ValueError if there is no
    query or no gallery image, a k is below 1, or a feature is not finite.
    """
    check_ks(ks)
    ranks = first_positive(features, labels, gallery_features=gallery_features, gallery_labels=gallery_labels, ties=ties)
    return recall_of(ranks, ks)


def recall_of(ranks: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Recall@k in % for each k, from the ranks (Q,) of `first_positive`."""
    return {k: 100 * ((ranks > 0) & (ranks <= k)).double().mean().item() for k in ks}


def first_positive(
    features: Tensor,
    labels: Tensor,
    *,
    gallery_features: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ties: Ties | None = None,
    tile: int | None = None,
    shared: bool = False,
) -> Tensor:
    """The rank of the nearest gallery image of each query's class, (Q,) int32 on the CPU: 1 is the
    best, 0 means there is none.

    Arguments as in `recall_at_k`; the device of the features computes. tile: as in `count_nearer`.
    shared: all processes call it together with the same arguments, and each computes a share.
    """
    own = gallery_features is None
    bank, bank_labels = _gallery(features, labels, gallery_features, gallery_labels)
    ties = ties or default_ties(own)
    if ties not in ("stable", "optimistic"):
        raise ValueError(f"ties is {ties}: give stable or optimistic")
    features = features.cpu() if features.device.type == "mps" else features  # mps has no float64
    queries = Labeled.of(features, labels)
    gallery = queries if own else Labeled.of(bank.to(features.device), bank_labels)
    best = best_positive(queries, gallery, own=own)
    part = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    nearer = count_nearer(queries, gallery, best, own=own, tile=tile, part=part).cpu()
    if shared:
        nearer = torch.stack(distributed.gather_objects(nearer)).sum(0)
    ranks = torch.where(best.cpu() > NOTHING, 1 + nearer[:, ("stable", "optimistic").index(ties)], 0).int()
    return torch.empty_like(ranks).index_copy_(0, queries.number.cpu(), ranks)


def default_ties(own: bool) -> Ties:
    """The published rule for equal similarities. own: the queries are their own gallery."""
    return "stable" if own else "optimistic"


def precision_at_r(
    features: Tensor,
    labels: Tensor,
    *,
    gallery_features: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """R-precision and MAP@R of each query, (Q,) float64 in 0..1, on the CPU; 0 for a query without
    positives. Arguments and errors as in `first_positive`."""
    own = gallery_features is None
    bank, bank_labels = (each.cpu() for each in _gallery(features, labels, gallery_features, gallery_labels))
    labels, ordered = labels.cpu(), bank_labels.sort().values
    positives = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels) - int(own)
    most = int(positives.max())
    part, parts = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    mine = torch.arange(part, len(positives), parts)
    found = torch.zeros(len(mine), 2, dtype=torch.float64)
    for block in chunks(len(mine), 40 * (most + 1)) if most else ():
        rows = mine[block]
        _, index = neighbors(bank, features[rows], k=min(most + int(own), len(bank)))
        if own:  # move each query to the end of its list; the others keep their order
            index = index.gather(1, (index == rows[:, None]).to(torch.uint8).argsort(dim=1, stable=True))[:, :most]
        wanted, ranks = positives[rows, None], torch.arange(1, index.shape[1] + 1)
        hits = ((bank_labels[index] == labels[rows, None]) & (ranks <= wanted)).double()
        sums = torch.stack([hits.sum(1), (hits * hits.cumsum(1) / ranks).sum(1)], 1)
        found[block] = sums / wanted.clamp_min(1)
    found = distributed.gather_by_index(found, mine, len(positives)) if shared else found
    return found[:, 0], found[:, 1]


def _gallery(
    features: Tensor, labels: Tensor, gallery_features: Tensor | None, gallery_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Features and labels to search in. ValueError unless they and the queries match."""
    if (gallery_features is None) != (gallery_labels is None):
        raise ValueError("a gallery has features and labels: give both, or neither if the queries are their own gallery")
    bank, bank_labels = features, labels
    if gallery_features is not None and gallery_labels is not None:
        bank, bank_labels = gallery_features, gallery_labels
    for name, rows, its in (("query", features, labels), ("gallery", bank, bank_labels)):
        if rows.ndim != 2 or not len(its) == len(rows) > 0:
            given = f"{name} features {tuple(rows.shape)} and {len(its)} labels"
            raise ValueError(f"{given}: give features (images, width) and one label for each, at least one")
    if bank.shape[1] != features.shape[1]:
        widths = f"{features.shape[1]} and {bank.shape[1]}"
        raise ValueError(f"query and gallery features have {widths} dimensions: take both from one encoder")
    return bank, bank_labels


def main(cfg: RecallConfig) -> None:
    """The command `dino-simpool recall`."""
    run("recall", evaluate, cfg)


def evaluate(encoder: Encoder | None, cfg: RecallConfig) -> dict[str, Any]:
    """recall_<k>, r_precision and map_at_r in %, counts, the choices that the paper leaves open,
    and the tensor of `first_positive`."""
    if not cfg.data and cfg.needs("data"):
        raise ValueError(f"no data is given: give --data DIR, the folder that holds {cfg.layout} (layout folder: CLASS/IMAGE)")
    ks = cfg.k or KS[cfg.layout]
    check_ks(ks)
    stored = StoredFeatures.open(cfg.stored) if cfg.stored else None
    if stored is not None and not cfg.data:
        query_set, gallery_set = stored.labeled(), None
    else:
        query_set, gallery_set = fine_grained(cfg.layout, cfg.data)
    sets = {"queries": query_set} | ({} if gallery_set is None else {"gallery": gallery_set})
    counts = part_counts(sets)
    for line in (warnings := differing_counts(cfg.layout, counts)):
        say(f"warning: {line}")
    if stored is not None:
        device = distributed.setup(cfg.device)
        about = description([stored], encoder, cfg)
        prepared = about["preprocessing"] | {"interpolation": INTERPOLATIONS[cfg.preset]}  # that of `extract`
        features = {name: stored.of(images, files=bool(cfg.data)).to(device) for name, images in sets.items()}
    else:
        assert encoder is not None
        prepared = preprocessing(encoder.config, image_size=cfg.image_size, resize=cfg.resize)
        prepared["interpolation"] = INTERPOLATIONS[cfg.preset]
        forward = Forward(EvalTransform(**prepared), cfg.batch_size, cfg.workers, cfg.precision)
        decoding = decoding_of(cfg, encoder, query_set)
        about = {"decoding": to_dict(decoding)}
        features = {
            name: extract_features(encoder, images.with_decoding(decoding), forward, description=name).to(device_of(encoder))
            for name, images in sets.items()
        }
    labels = {name: torch.from_numpy(images.labels) for name, images in sets.items()}
    compared: dict[str, Any] = {"features": features["queries"], "labels": labels["queries"], "shared": True}
    compared |= {"gallery_features": features.get("gallery"), "gallery_labels": labels.get("gallery")}
    ties = default_ties(gallery_set is None) if cfg.ties == "published" else cfg.ties
    ranks = first_positive(**compared, ties=ties, tile=cfg.tile)
    metrics = {f"recall_{k}": value for k, value in recall_of(ranks, ks).items()}
    if cfg.map_at_r:
        both = precision_at_r(**compared)
        metrics |= {name: 100 * each.mean().item() for name, each in zip(("r_precision", "map_at_r"), both, strict=True)}
    return (
        metrics
        | about
        | {
            "dataset": cfg.layout,
            "split": "test",
            "counts": counts | {"queries_without_positive": int((ranks == 0).sum())},
            "count_warnings": warnings,
            "k": list(ks),
            "ties": ties,
            "preprocessing": {"preset": cfg.preset, **prepared},
            "first_positive": ranks,
        }
    )
