"""Linear classification of frozen features: the published protocol, and a grid of learning rates
chosen without the val images.

protocol "paper" (billpsomas/simpool and facebookresearch/dino, eval_linear.py): softmax regression
on features of augmented images (random resized crop of 8 to 100 % of the area, bilinear, and flip).
SGD with momentum 0.9 and no weight decay, learning rate 0.001 * batch / 256 with a cosine to 0 over
the epochs, 100 epochs, weights from N(0, 0.01), bias 0. It is validated after every epoch.
best_top1 is the highest accuracy of all epochs, as published, hence selected on the val images.
last_top1 is that of the last epoch.

protocol "grid": features of all images are extracted once, without augmentation. One head per
learning rate is trained, all in one tensor; their losses are added and they share nothing, so each
head is the same as if trained alone. The learning rate with the highest accuracy on a held-out part
of train (a share of each class; of equals, the lower rate) is trained again on all of train, and
only that head sees val.

Features are not standardized. The gradient of softmax regression is written out: (softmax -
one-hot) times feature. The augmentation of an image is a function of (seed, epoch, image). A batch
is split over the processes and gradients are summed, so neither workers nor processes change the
result beyond rounding. Classes come from the train folders.

M images, B images of a batch, D width, C classes, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from dino_simpool import distributed
from dino_simpool.config import LinearConfig, to_dict
from dino_simpool.data import (
    AugmentedImages,
    EvalTransform,
    ImageSet,
    class_numbers,
    default_workers,
    epoch_order,
    file_key,
    start_worker,
)
from dino_simpool.data.augment import CROP_NUMBERS, crop_box, to_tensor, uniforms
from dino_simpool.data.decode import EncodedImage
from dino_simpool.eval import balanced_accuracy, class_folders, find_overlap, per_class, run
from dino_simpool.eval.stored import stored_class_folders
from dino_simpool.features import chunks
from dino_simpool.features.encode import Forward, device_of, encode, extract_features, preprocessing
from dino_simpool.features.neighbors import lengths_of
from dino_simpool.logs import progress, say
from dino_simpool.models.encoder import Encoder

MOMENTUM = 0.9
INIT_STD = 0.01


class Heads:
    """Independent softmax regressions, a learning rate each: weight (H, C, D), bias (H, C)."""

    def __init__(self, learning_rates: Sequence[float], num_classes: int, dim: int, *, seed: int, device: torch.device):
        # Drawn once on the CPU and repeated: every head starts from the same weights on any device.
        weight = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(seed)) * INIT_STD
        self.weight = weight.to(device).repeat(len(learning_rates), 1, 1)
        self.bias = torch.zeros(len(learning_rates), num_classes, device=device)
        self.learning_rates = torch.tensor(learning_rates, device=device)
        self._velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, H, C) of features (B, D)."""
        return (features @ self.weight.flatten(0, 1).T + self.bias.flatten()).unflatten(1, self.bias.shape)

    def step(self, features: Tensor, labels: Tensor, *, batch_size: int, decay: float) -> Tensor:
        """One SGD step of all heads on the mean cross-entropy of a global batch; returns it, (H,).

        features (b, D), labels (b,): this process's part (perhaps none) of the batch. decay: factor
        of the learning rates.
        """
        gradient = self.logits(features).log_softmax(2)
        picked = labels[:, None, None].expand(-1, len(self.bias), 1)
        loss = -gradient.gather(2, picked).sum((0, 2)) / batch_size
        gradient = gradient.exp_()
        gradient.scatter_add_(2, picked, gradient.new_full((), -1.0).expand(picked.shape)).div_(batch_size)
        weight = (gradient.flatten(1).T @ features).view_as(self.weight)
        for parameter, velocity, slope in zip((self.weight, self.bias), self._velocity, (weight, gradient.sum(0)), strict=True):
            velocity.mul_(MOMENTUM).add_(distributed.all_sum(slope))
            rate = (decay * self.learning_rates).view(-1, *[1] * (parameter.dim() - 1))
            parameter.sub_(rate * velocity)
        return distributed.all_sum(loss)

    def fit(self, features: Tensor | _Part, labels: Tensor, *, epochs: int, batch_size: int, seed: int) -> Heads:
        """Train on features (M, D) and labels (M,) on any device, cosine to 0 by epoch."""
        device = self.bias.device
        with progress(epochs * math.ceil(len(features) / batch_size), 0, "linear probes", images_per_step=batch_size) as bar:
            for epoch in range(epochs):
                for size, parts in _batches(len(features), epoch, seed=seed, batch_size=batch_size, forward_size=batch_size):
                    index = parts[0] if parts else np.empty(0, np.int64)
                    x, y = features[index].to(device, torch.float32), labels[index].to(device)
                    self.step(x, y, batch_size=size, decay=cosine(epoch, epochs))
                    bar.update()
        return self

    def hits(self, features: Tensor | _Part, labels: Tensor) -> Tensor:
        """Whether the class (M,) of each image is the first, and among the first five, of each head
        (M, H, 2), bool on the CPU; features may be on any device."""
        found = torch.empty(len(features), len(self.bias), 2, dtype=torch.bool)
        for rows in chunks(len(features), 16 * self.bias.numel()):
            logits = self.logits(features[rows].to(self.weight.device, torch.float32))
            best = logits.topk(min(5, logits.shape[2]), dim=2).indices == labels[rows].to(logits.device)[:, None, None]
            found[rows] = torch.stack([best[..., 0], best.any(2)], 2).cpu()
        return found

    def accuracy(self, features: Tensor | _Part, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Top-1 and top-5 accuracy in % of each head, both (H,); features may be on any device."""
        top1, top5 = 100 * self.hits(features, labels).sum(0).double().T / max(1, len(features))
        return top1, top5


def cosine(epoch: int, epochs: int) -> float:
    """Factor of the learning rate in an epoch: half a cosine, 1 in epoch 0, 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def probe_view(
    file: EncodedImage, *, image_size: int, mean: Sequence[float], std: Sequence[float], seed: int, epoch: int, index: int
) -> list[Tensor]:
    """The published augmentation of an image file: a tensor (3, S, S), and in epoch 0, once for
    each file, its `file_key`."""
    image = file.rgb()
    *numbers, flip = uniforms(seed, epoch, index, rows=1, columns=CROP_NUMBERS + 1)[0].tolist()
    top, left, height, width = crop_box(image.height, image.width, scale=(0.08, 1.0), numbers=numbers)
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    if flip < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    view = list(to_tensor([image], mean=mean, std=std))
    return [*view, torch.tensor(file_key(file.file))] if epoch == 0 else view


def main(cfg: LinearConfig) -> None:
    """The command `dino-simpool linear`."""
    run("linear", evaluate, cfg)


def evaluate(encoder: Encoder | None, cfg: LinearConfig) -> dict[str, Any]:
    """Accuracy in % of the linear probe on cfg.data (no top5 with fewer than 5 classes), its
    settings (`probe`), and the head: `weight` (C, D) and `bias` (C,).

    paper: best_top1, last_top1, the balanced accuracy (the mean over the classes) and top5 of these
    epochs, the `curve` over the epochs, and the last head. grid: top1, balanced, top5, the `grid`
    of held-out accuracies, and the head of the chosen rate. Both: the accuracy of each class (of
    the best epoch; `per_class`), and what val has in common with train (`overlap`).
    """
    if cfg.stored:
        (train, train_x), (val, val_x), about = stored_class_folders(cfg, encoder)
        lengths_of(train_x)  # ValueError for features that are not finite, from which no rate could be chosen
        result, head = _grid(cfg, train, val, train_x, val_x, distributed.setup(cfg.device))
    else:
        assert encoder is not None
        settings = preprocessing(encoder.config, image_size=cfg.image_size, resize=cfg.resize)
        train, val = class_folders(cfg, encoder)
        about = {"decoding": to_dict(train.decoding), "preprocessing": settings}
        forward = Forward(EvalTransform(**settings), cfg.batch_size, cfg.workers, cfg.precision)
        features_of = partial(extract_features, encoder, forward=forward)
        if cfg.protocol == "paper":
            result, head = _paper(encoder, cfg, train, val, features_of)
        else:
            train_keys, val_keys = (torch.empty(len(images), dtype=torch.int64) for images in (train, val))
            train_x, val_x = features_of(train, keys=train_keys), features_of(val, keys=val_keys)
            result, head = _grid(cfg, train, val, train_x, val_x, device_of(encoder))
            about["overlap"] = find_overlap(train, val, train_keys, val_keys)
    if len(train.classes) < 5:
        result = {key: value for key, value in result.items() if not key.endswith("top5")}
    return result | {
        "weight": head.weight[0].cpu(),
        "bias": head.bias[0].cpu(),
        "split": cfg.val,
        "counts": {"train": len(train), "val": len(val), "classes": len(train.classes)},
        "image_digests": {"train": train.digest(), "val": val.digest()},
        "classes": train.classes,
        **about,
    }


def _paper(
    encoder: Encoder, cfg: LinearConfig, train: ImageSet, val: ImageSet, features_of: Callable[..., Tensor]
) -> tuple[dict[str, Any], Heads]:
    model, device = encoder.config, device_of(encoder)
    augmentation = partial(probe_view, image_size=cfg.image_size or model.image_size, mean=model.mean, std=model.std)
    # The encoder is frozen and val is not augmented, so its features are the same in every epoch.
    train_keys, val_keys = (torch.empty(len(images), dtype=torch.int64) for images in (train, val))
    val_x, val_y = features_of(val, keys=val_keys), torch.from_numpy(class_numbers(val, train))
    train_y = torch.from_numpy(train.labels)
    batch_size = _batch_size(cfg, len(train))
    learning_rate = cfg.lr * batch_size / 256
    heads = Heads([learning_rate], len(train.classes), encoder.embed_dim, seed=cfg.seed, device=device)
    batches = partial(_batches, len(train), seed=cfg.seed, batch_size=batch_size, forward_size=cfg.batch_size)
    # (epoch, image) of every forward pass, so one loader serves all epochs without a pause.
    samples = (
        [(epoch, index) for index in part.tolist()]
        for epoch in range(cfg.epochs)
        for _, parts in batches(epoch)
        for part in parts
    )
    items = iter(
        DataLoader(
            AugmentedImages(train, augmentation, cfg.seed),
            num_workers=default_workers() if cfg.workers is None else cfg.workers,
            pin_memory=device.type == "cuda",
            batch_sampler=samples,
            worker_init_fn=start_worker,
            generator=torch.Generator(),
        )
    )
    curve: list[dict[str, float]] = []
    hits: list[Tensor] = []
    total = cfg.epochs * math.ceil(len(train) / batch_size)
    with progress(total, 0, "linear probe", images_per_step=batch_size) as bar:
        for epoch in range(cfg.epochs):
            decay, loss = cosine(epoch, cfg.epochs), 0.0
            for size, parts in batches(epoch):
                features, labels = torch.empty(0, encoder.embed_dim, device=device), torch.empty(0, dtype=torch.int64)
                for _ in parts:
                    (images, *read), index, *_ = next(items)
                    if read:
                        train_keys[index] = read[0]
                    features = torch.cat([features, encode(encoder, images, precision=cfg.precision)])
                    labels = torch.cat([labels, train_y[index]])
                loss += heads.step(features, labels.to(device), batch_size=size, decay=decay).item() * size / len(train)
                bar.update()
            if not math.isfinite(loss):
                raise ValueError(f"the probe's loss is not finite in epoch {epoch}: lower --lr, or check weights and images")
            hits.append(heads.hits(val_x, val_y))
            curve.append({"epoch": epoch, "lr": learning_rate * decay, "train_loss": loss} | _accuracies(hits[-1], val_y))
    mine = torch.tensor([index for _, parts in batches(0) for part in parts for index in part], dtype=torch.int64)
    train_keys = distributed.gather_by_index(train_keys[mine], mine, len(train))
    best, last = max(curve, key=lambda line: line["top1"]), curve[-1]
    result = {
        "best_top1": best["top1"],
        "best_balanced": best["balanced"],
        "last_top1": last["top1"],
        "last_balanced": last["balanced"],
        "best_top5": best["top5"],
        "last_top5": last["top5"],
        "selected_on": "val_epochs",
        "probe": {"learning_rate": learning_rate, "batch_size": batch_size, "best_epoch": best["epoch"]},
        "curve": curve,
        "per_class": per_class(hits[int(best["epoch"])][:, 0, 0], val_y, train.classes),
        "overlap": find_overlap(train, val, train_keys, val_keys),
    }
    return result, heads


@dataclass(frozen=True)
class _Part:
    """Some rows of features, which stay where they are: all may be larger than the memory."""

    features: Tensor
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: slice | np.ndarray) -> Tensor:
        return self.features[self.numbers[rows]]


def _grid(
    cfg: LinearConfig, train: ImageSet, val: ImageSet, train_x: Tensor, val_x: Tensor, device: torch.device
) -> tuple[dict[str, Any], Heads]:
    train_y, val_y = torch.from_numpy(train.labels), torch.from_numpy(class_numbers(val, train))
    learn, held = split_held_out(train_y, cfg.held_out, seed=cfg.seed)
    rates = sorted(set(cfg.grid))
    batch_size = _batch_size(cfg, len(learn))
    scaled = [rate * batch_size / 256 for rate in rates]

    def fit(x: Tensor | _Part, y: Tensor, rates: list[float]) -> Heads:
        heads = Heads(rates, len(train.classes), train_x.shape[1], seed=cfg.seed, device=device)
        return heads.fit(x, y, epochs=cfg.epochs, batch_size=batch_size, seed=cfg.seed)

    held_top1, _ = fit(_Part(train_x, learn), train_y[learn], scaled).accuracy(_Part(train_x, held), train_y[held])
    chosen = int(held_top1.argmax())  # the first of equals
    heads = fit(train_x, train_y, scaled[chosen : chosen + 1])
    hits = heads.hits(val_x, val_y)
    result = {
        "evaluator": "linear_grid",
        **_accuracies(hits, val_y),
        "selected_on": "train_heldout",
        "probe": {"lr": rates[chosen], "learning_rate": scaled[chosen], "batch_size": batch_size, "held_out": len(held)},
        "grid": [{"lr": rate, "held_out_top1": value} for rate, value in zip(rates, held_top1.tolist(), strict=True)],
        "per_class": per_class(hits[:, 0, 0], val_y, train.classes),
    }
    return result, heads


def _accuracies(hits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracies in % of the only head, from its `hits` (M, 1, 2)."""
    top1, top5 = (100 * hits[:, 0].sum(0).double() / max(1, len(hits))).tolist()
    return {"top1": top1, "balanced": balanced_accuracy(hits[:, 0, 0], labels), "top5": top5}


def split_held_out(labels: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to learn from and indices held out, both ascending: about `share` of each class, at
    least one image if it has two or more, but never all. ValueError if nothing is held out."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)].split(labels.bincount().tolist())
    sizes = [0 if len(rows) < 2 else min(max(round(share * len(rows)), 1), len(rows) - 1) for rows in by_class]
    held = torch.zeros(len(labels), dtype=torch.bool)
    for rows, size in zip(by_class, sizes, strict=True):
        held[rows[:size]] = True
    if not held.any():
        raise ValueError("every class of train has one image only, so none can be held out: give more, or --protocol paper")
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def _batches(
    num_images: int, epoch: int, *, seed: int, batch_size: int, forward_size: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """For each global batch of an epoch, its size (smaller at the end) and this process's image
    numbers by forward pass."""
    order = epoch_order(num_images, seed=seed, epoch=epoch)
    for start in range(0, num_images, batch_size):
        batch = order[start : start + batch_size]
        mine = batch[distributed.rank() :: distributed.world_size()]
        yield len(batch), [mine[i : i + forward_size] for i in range(0, len(mine), forward_size)]


def _batch_size(cfg: LinearConfig, num_images: int) -> int:
    """The global batch size, by which learning rates are scaled."""
    if cfg.probe_batch_size > num_images:
        say(f"warning: probe_batch_size {cfg.probe_batch_size} is cut to the {num_images} images to learn from")
    return min(cfg.probe_batch_size, num_images)
