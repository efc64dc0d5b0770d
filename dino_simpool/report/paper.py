"""The numbers of "Keep It SimPool" (ICCV 2023) to compare results with, and where the release
differs.

Source: Tables 3, C2, C4, C5 and 8 of the paper; self_supervised/README.md of billpsomas/simpool.
The baseline is the class token for ViTs and global average pooling for CNNs. Numbers are in %,
parameters in millions and multiply-adds in billions (Table 8).
"""

from __future__ import annotations

from typing import NamedTuple

from dino_simpool.config import is_vit
from dino_simpool.layouts import LAYOUTS

SELF, SUPERVISED = "self-supervised", "supervised"
RESNET18, RESNET50, CONVNEXT, VIT = "ResNet-18", "ResNet-50", "ConvNeXt-S", "ViT-S"
BASELINE, SIMPOOL = "baseline", "SimPool"

TITLES = {
    "3": "Table 3, C2: k-NN and linear probe on ImageNet-1k, top-1 (%)",
    "C4": "Table C4: retrieval of landmarks, mAP (%)",
    "C5": "Table C5: fine-grained retrieval, Recall@k (%)",
    "8": "Table 8: parameters (M) and multiply-adds (G)",
}
"""Titles of the tables. Table C2 continues Table 3 with 300 epochs."""


class Key(NamedTuple):
    """What a number was measured on. regime, epochs: of the pre-training ("" and 0 in Table 8)."""

    table: str
    network: str
    method: str
    regime: str
    epochs: int
    dataset: str
    metric: str


class Figure(NamedTuple):
    """A number, and where it is printed."""

    value: float
    source: str


ROWS: list[tuple[str, str, str, int, str, tuple[str, ...], str, tuple[float, ...], tuple[float, ...]]] = [
    # table, network, regime, epochs, data set, metrics, source, baseline, SimPool
    ("3", RESNET50, SELF, 100, "ImageNet-1k", ("k-NN", "probe"), "Table 3", (61.8, 63.0), (63.8, 64.4)),
    ("3", CONVNEXT, SELF, 100, "ImageNet-1k", ("k-NN", "probe"), "Table 3", (65.1, 68.2), (68.8, 72.2)),
    ("3", VIT, SELF, 100, "ImageNet-1k", ("k-NN", "probe"), "Table 3", (68.9, 71.5), (69.8, 72.8)),
    ("3", VIT, SELF, 300, "ImageNet-1k", ("k-NN", "probe"), "Table C2", (72.2, 74.3), (72.6, 75.0)),
    ("C4", RESNET50, SELF, 100, "roxford5k", ("medium", "hard"), "Table C4", (27.2, 7.9), (29.7, 8.7)),
    ("C4", RESNET50, SELF, 100, "rparis6k", ("medium", "hard"), "Table C4", (47.3, 19.0), (51.6, 23.0)),
    ("C4", VIT, SELF, 100, "roxford5k", ("medium", "hard"), "Table C4", (29.4, 10.0), (32.1, 10.6)),
    ("C4", VIT, SELF, 100, "rparis6k", ("medium", "hard"), "Table C4", (54.6, 26.2), (56.5, 27.3)),
    ("C5", RESNET50, SUPERVISED, 100, "cub200", ("R@1", "R@2", "R@4"), "Table C5", (42.7, 55.2, 67.7), (43.0, 55.2, 67.9)),
    ("C5", RESNET50, SUPERVISED, 100, "cars196", ("R@1", "R@2", "R@4"), "Table C5", (42.3, 54.2, 65.7), (43.8, 56.2, 67.4)),
    ("C5", RESNET50, SUPERVISED, 100, "sop", ("R@1", "R@10", "R@100"), "Table C5", (48.3, 63.2, 71.8), (48.7, 64.1, 72.9)),
    ("C5", RESNET50, SUPERVISED, 100, "inshop", ("R@1", "R@10", "R@20"), "Table C5", (27.6, 49.9, 56.5), (27.0, 49.9, 56.5)),
    ("C5", VIT, SUPERVISED, 100, "cub200", ("R@1", "R@2", "R@4"), "Table C5", (55.8, 68.3, 78.3), (56.8, 69.6, 79.2)),
    ("C5", VIT, SUPERVISED, 100, "cars196", ("R@1", "R@2", "R@4"), "Table C5", (38.2, 50.3, 61.8), (38.9, 50.7, 63.3)),
    ("C5", VIT, SUPERVISED, 100, "sop", ("R@1", "R@10", "R@100"), "Table C5", (54.1, 69.2, 81.6), (54.2, 69.4, 81.9)),
    ("C5", VIT, SUPERVISED, 100, "inshop", ("R@1", "R@10", "R@20"), "Table C5", (30.9, 56.5, 63.2), (32.8, 57.6, 64.3)),
    ("C5", RESNET50, SELF, 100, "cub200", ("R@1", "R@2", "R@4"), "Table C5", (26.0, 36.2, 46.9), (30.7, 40.9, 53.3)),
    ("C5", RESNET50, SELF, 100, "cars196", ("R@1", "R@2", "R@4"), "Table C5", (34.1, 44.2, 55.0), (33.6, 43.6, 54.3)),
    ("C5", RESNET50, SELF, 100, "sop", ("R@1", "R@10", "R@100"), "Table C5", (51.2, 65.3, 76.5), (52.1, 66.5, 77.2)),
    ("C5", RESNET50, SELF, 100, "inshop", ("R@1", "R@10", "R@20"), "Table C5", (37.1, 58.4, 64.1), (38.1, 60.0, 65.6)),
    ("C5", VIT, SELF, 100, "cub200", ("R@1", "R@2", "R@4"), "Table C5", (56.7, 69.4, 80.5), (61.8, 74.4, 83.6)),
    ("C5", VIT, SELF, 100, "cars196", ("R@1", "R@2", "R@4"), "Table C5", (37.5, 47.5, 58.4), (37.6, 48.0, 58.4)),
    ("C5", VIT, SELF, 100, "sop", ("R@1", "R@10", "R@100"), "Table C5", (59.8, 74.4, 85.4), (59.5, 73.9, 85.0)),
    ("C5", VIT, SELF, 100, "inshop", ("R@1", "R@10", "R@20"), "Table C5", (40.4, 63.9, 70.3), (41.1, 64.3, 70.8)),
    ("8", RESNET18, "", 0, "", ("params", "macs_thop"), "Table 8", (11.7, 1.82), (12.2, 1.84)),
    ("8", RESNET50, "", 0, "", ("params", "macs_thop"), "Table 8", (25.6, 4.13), (33.9, 4.34)),
    ("8", CONVNEXT, "", 0, "", ("params", "macs_thop"), "Table 8", (50.2, 8.68), (51.4, 8.71)),
    ("8", VIT, "", 0, "", ("params", "macs_thop"), "Table 8", (22.1, 4.24), (22.3, 4.26)),
]

PAPER: dict[Key, Figure] = {
    Key(table, network, method, regime, epochs, dataset, metric): Figure(value, source)
    for table, network, regime, epochs, dataset, metrics, source, *both in ROWS
    for method, values in zip((BASELINE, SIMPOOL), both, strict=True)
    for metric, value in zip(metrics, values, strict=True)
}
"""Every number of the tables."""

README = "README of the release"
RELEASE: dict[tuple[Key, bool], Figure] = {
    # bool: whether the model has a gamma; the release published SimPool with and without
    (Key("3", RESNET50, BASELINE, SELF, 100, "ImageNet-1k", "probe"), False): Figure(63.8, README),
    (Key("3", RESNET50, SIMPOOL, SELF, 100, "ImageNet-1k", "k-NN"), False): Figure(63.7, README),
    (Key("3", RESNET50, SIMPOOL, SELF, 100, "ImageNet-1k", "probe"), False): Figure(64.2, README),
    (Key("3", CONVNEXT, BASELINE, SELF, 100, "ImageNet-1k", "k-NN"), False): Figure(59.3, README),
    (Key("3", CONVNEXT, BASELINE, SELF, 100, "ImageNet-1k", "probe"), False): Figure(63.9, README),
    (Key("3", CONVNEXT, SIMPOOL, SELF, 100, "ImageNet-1k", "k-NN"), True): Figure(68.7, README),
    (Key("3", CONVNEXT, SIMPOOL, SELF, 100, "ImageNet-1k", "k-NN"), False): Figure(68.8, README),
    (Key("3", VIT, SIMPOOL, SELF, 100, "ImageNet-1k", "k-NN"), True): Figure(69.7, README),
    (Key("3", VIT, SIMPOOL, SELF, 100, "ImageNet-1k", "k-NN"), False): Figure(69.8, README),
    (Key("3", VIT, SIMPOOL, SELF, 100, "ImageNet-1k", "probe"), False): Figure(72.6, README),
}
"""Numbers in the README of the release that differ from the paper, or that say which of the two
models was meant."""

COUNTS: dict[str, dict[str, int]] = {
    "ImageNet-1k" if name == "imagenet" else name: dict(layout.counts) for name, layout in LAYOUTS.items()
}
"""Official sizes of the data sets, by their names in the tables."""

NETWORKS = {
    RESNET18: ("resnet18",),
    RESNET50: ("resnet50",),
    CONVNEXT: ("convnext_small",),
    VIT: ("vit_small", "vit_small_patch16_224", "deit_small_patch16_224"),
}
"""Names of the paper's networks in `model.arch`."""


def network_of(model: dict[str, object]) -> str:
    """The paper's name of a network in its standard size; for any other network, its `arch`."""
    arch = str(model["arch"])
    standard = {"width": None, "depth": None, "heads": None, "stem": "standard", "patch_size": 16}
    if arch.startswith("timm:"):  # as timm makes it
        return arch
    changed = [f"{name} {model[name]}" for name, value in standard.items() if model.get(name, value) != value]
    if changed:
        return f"{arch} ({', '.join(changed)})"
    return next((network for network, names in NETWORKS.items() if arch in names), arch)


def method_of(model: dict[str, object]) -> str:
    """SimPool, baseline (a ViT's class token, a CNN's average), or the name of another pooling."""
    pool, gap = str(model["pool"]), "GAP" if is_vit(str(model["arch"])) else BASELINE
    return {"simpool": SIMPOOL, "cls": BASELINE, "gap": gap}.get(pool, pool)


def gamma_of(model: dict[str, object]) -> float:
    """The paper's exponent of SimPool."""
    return 1.25 if is_vit(str(model["arch"])) else 2.0
