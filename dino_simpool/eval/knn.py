"""Weighted k-nearest-neighbor classification of frozen features, as in the DINO and SimPool papers.

The k training images with the highest cosine similarity s to a test image vote for their classes
with weight exp(s / temperature), temperature 0.07 (facebookresearch/dino and billpsomas/simpool,
eval_knn.py). The published code leaves some cases open. Here, of equal similarities the lower
training index is nearer, and of equal votes the lower class wins. A top-5 hit needs at least one
vote for its class. A k larger than the bank means all of it. The search is exact (neighbors.py).

M training images (the bank), T test images, D width, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dino_simpool import distributed
from dino_simpool.config import KnnConfig, to_dict
from dino_simpool.data import EvalTransform, ImageSet, class_numbers
from dino_simpool.eval import balanced_accuracy, class_folders, find_overlap, per_class, run
from dino_simpool.eval.stored import stored_class_folders
from dino_simpool.features import MAX_BYTES, chunks
from dino_simpool.features.encode import Forward, device_of, extract_features, preprocessing
from dino_simpool.features.neighbors import check_ks, neighbors
from dino_simpool.logs import say
from dino_simpool.models.encoder import Encoder


def knn_rank(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: int,
    temperature: float = KnnConfig.temperature,
    num_classes: int | None = None,
    top: int = 5,
) -> Tensor:
    """Classes of each test image by descending vote of its k nearest training images, (T, min(top,
    C)) int64. Classes with equal votes, or with none, are ordered by number.

    train_x: (M, D), train_y: (M,) classes 0..C-1, test_x: (T, D). Features may have any length.
    num_classes: C, by default the highest class + 1. k above M counts as M, with a warning.
    ValueError if k, temperature, a label or a feature is invalid.
    """
    num_classes = int(train_y.max()) + 1 if num_classes is None and len(train_y) else num_classes or 0
    if k > len(train_x) > 0:
        warnings.warn(f"k = {k} is more than the {len(train_x)} training images; all of them vote", stacklevel=2)
    votes = vote_each_k(train_x, train_y, test_x, ks=(k,), temperature=temperature, num_classes=num_classes, top=top)
    return votes[k][0].to(test_x.device)


def vote_each_k(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, ks: Sequence[int], temperature: float, num_classes: int, top: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """knn_rank for several k with one search: {k: (classes (T, min(top, C)), their votes)}, on the
    CPU, without a warning. The nearest neighbor has 1 vote."""
    check_settings(ks, temperature)
    if not len(train_y) == len(train_x) > 0:
        raise ValueError(
            f"{len(train_x)} training features and {len(train_y)} labels: give one label per feature, and at least one"
        )
    if not 0 <= int(train_y.min()) <= int(train_y.max()) < num_classes:
        raise ValueError(f"training labels are {int(train_y.min())} to {int(train_y.max())}: allowed is 0 to {num_classes - 1}")
    similarity, index = neighbors(train_x, test_x, k=min(max(ks), len(train_x)))
    labels = train_y.cpu().long()
    top, found = min(top, num_classes), {}
    for k in ks:
        classes = torch.empty(len(test_x), top, dtype=torch.int64)
        votes = torch.empty(len(test_x), top, dtype=torch.float64)
        for rows in chunks(len(test_x), 32 * num_classes, max_bytes=MAX_BYTES // 4):
            # A small temperature would overflow without the shift by the highest similarity, which
            # does not change the order.
            weight = ((similarity[rows, :k] - similarity[rows, :1]) / temperature).exp()
            sums = torch.zeros(len(weight), num_classes, dtype=torch.float64).scatter_add_(1, labels[index[rows, :k]], weight)
            ordered, order = sums.sort(dim=1, descending=True, stable=True)
            classes[rows], votes[rows] = order[:, :top], ordered[:, :top]
        found[k] = classes, votes
    return found


def check_settings(ks: Sequence[int], temperature: float) -> None:
    """ValueError unless there is a k, every k is 1 or more, and the temperature is above 0."""
    check_ks(ks)
    if not temperature > 0:
        raise ValueError(f"the k-NN temperature is {temperature}: give a number above 0 (published: 0.07)")


@dataclass(frozen=True)
class KnnAccuracy:
    """The accuracy of a k-NN classification."""

    percent: dict[str, dict[str, float]]
    """In %: {"10": {"top1": ..., "balanced": ..., "top5": ...}, ...} for each k."""
    per_class: dict[str, dict[str, Any]]
    """Of the first k, as `eval.per_class` has it."""
    overlap: dict[str, Any]
    """What the two sets have in common, as `eval.find_overlap` has it."""


def knn_accuracy(
    encoder: nn.Module,
    train_set: ImageSet,
    val_set: ImageSet,
    forward: Forward,
    *,
    ks: Sequence[int] = KnnConfig.k,
    temperature: float = KnnConfig.temperature,
    skip_broken: bool = False,
) -> KnnAccuracy:
    """Accuracy on val_set, with train_set as the bank.

    All processes call it together; each searches for its share of val_set. Classes are matched by
    name; ValueError for one that train_set lacks. skip_broken: leave out broken images, with a
    warning, instead of raising BrokenImage.
    """
    check_settings(ks, temperature)
    numbers = {"bank": train_set.labels, "val": class_numbers(val_set, train_set)}
    _warn_of_large_k(ks, train_set)
    used: list[tuple[Tensor, Tensor, Tensor]] = []
    for (name, classes), images in zip(numbers.items(), (train_set, val_set), strict=True):
        broken: set[int] | None = set() if skip_broken else None
        keys, labels = torch.empty(len(images), dtype=torch.int64), torch.from_numpy(classes)
        features = extract_features(encoder, images, forward, description=f"k-NN {name}", broken=broken, keys=keys)
        if broken:
            first = images.path(min(broken))
            if len(broken) == len(images):
                raise ValueError(f"no image of {images.root} can be read, such as {first}: `dino-simpool check-data` says why")
            say(f"warning: k-NN {name} leaves out {len(broken)} broken image(s), such as {first}")
            intact = [number for number in range(len(images)) if number not in broken]
            features, labels, keys = features[intact], labels[intact], keys[intact]
        used.append((features, labels, keys))
    (*bank, train_keys), (*val, val_keys) = used
    overlap = find_overlap(train_set, val_set, train_keys, val_keys)
    how: dict[str, Any] = {"ks": ks, "temperature": temperature, "classes": train_set.classes}
    return features_accuracy(*bank, *val, **how, overlap=overlap, device=device_of(encoder))


def features_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    classes: Sequence[str],
    overlap: dict[str, Any],
    device: torch.device,
) -> KnnAccuracy:
    """`knn_accuracy` of features (M, D) and (T, D), which may be mapped, and labels (M,) and (T,):
    positions in `classes`."""
    mine = torch.arange(distributed.rank(), len(test_y), distributed.world_size())
    own_x = test_x[distributed.rank() :: distributed.world_size()].to(device)  # with one process no copy on a CPU
    voted = vote_each_k(train_x, train_y, own_x, ks=ks, temperature=temperature, num_classes=len(classes), top=5)
    own = [((found == test_y[mine, None]) & (votes > 0)) for found, votes in voted.values()]
    own_hits = torch.stack([torch.stack([hit[:, 0], hit.any(1)], 1) for hit in own], 1)
    hits = distributed.gather_by_index(own_hits, mine, len(test_y))  # (T, ks, 2): top-1 and top-5
    percent = {}
    for number, k in enumerate(voted):
        top1, top5 = (100 * hits[:, number].double().mean(0)).tolist()
        percent[str(k)] = {"top1": top1, "balanced": balanced_accuracy(hits[:, number, 0], test_y), "top5": top5}
    return KnnAccuracy(percent, per_class(hits[:, 0, 0], test_y, classes), overlap)


def _warn_of_large_k(ks: Sequence[int], train_set: ImageSet) -> None:
    if max(ks) > len(train_set):
        say(f"warning: k = {max(ks)} is more than the {len(train_set)} training images; all of them vote")


class Pixels(nn.Flatten):
    """Not an encoder: the normalized pixels themselves, (B, 3, S, S) -> (B, 3 * S * S)."""

    def __init__(self, image_size: int, device: torch.device | None = None):
        super().__init__()
        self.embed_dim = 3 * image_size**2
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)


def main(cfg: KnnConfig) -> None:
    """The command `dino-simpool knn`."""
    run("knn", evaluate, cfg)


def evaluate(encoder: Encoder | None, cfg: KnnConfig) -> dict[str, Any]:
    """k-NN accuracy in % on cfg.data: top1_k10, balanced_k10 (the mean over the classes), top5_k10,
    ..., and the `counts` behind them; what val has in common with train (`overlap`), and for the
    first k the accuracy of each class (`per_class`)."""
    check_settings(cfg.k, cfg.temperature)
    if cfg.stored:
        (train_set, train_x), (val_set, val_x), about = stored_class_folders(cfg, encoder)
        _warn_of_large_k(cfg.k, train_set)
        labels = (torch.from_numpy(train_set.labels), torch.from_numpy(class_numbers(val_set, train_set)))
        accuracy = features_accuracy(
            train_x, labels[0], val_x, labels[1], ks=cfg.k, temperature=cfg.temperature, classes=train_set.classes,
            overlap=about["overlap"], device=distributed.setup(cfg.device),
        )  # fmt: skip
        return _result(cfg, accuracy, train_set, val_set) | about
    settings = preprocessing(None if encoder is None else encoder.config, image_size=cfg.image_size, resize=cfg.resize)
    train_set, val_set = class_folders(cfg, encoder)
    features: nn.Module | None = encoder
    if encoder is None or cfg.features == "pixels":
        features = Pixels(settings["image_size"], None if encoder is None else device_of(encoder))
    assert features is not None
    forward = Forward(EvalTransform(**settings), cfg.batch_size, cfg.workers, cfg.precision)
    accuracy = knn_accuracy(features, train_set, val_set, forward, ks=cfg.k, temperature=cfg.temperature)
    about = {"decoding": to_dict(train_set.decoding), "preprocessing": settings}
    return _result(cfg, accuracy, train_set, val_set) | about


def _result(cfg: KnnConfig, accuracy: KnnAccuracy, train_set: ImageSet, val_set: ImageSet) -> dict[str, Any]:
    metrics = {f"{name}_k{k}": value for k, names in accuracy.percent.items() for name, value in names.items()}
    return metrics | {
        "split": cfg.val,
        "counts": {"train": len(train_set), "val": len(val_set), "classes": len(train_set.classes)},
        "image_digests": {"train": train_set.digest(), "val": val_set.digest()},
        "overlap": accuracy.overlap,
        "per_class": accuracy.per_class,
    }
