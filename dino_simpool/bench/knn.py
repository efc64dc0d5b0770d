"""k-NN beside the published code, and Recall@k beside the matrix products that it needs at least.

Published: what knn_classifier in eval_knn.py of facebookresearch/dino and billpsomas/simpool
computes, rewritten: a chunk of the queries times the whole bank, the k largest of every row,
one-hot classes (chunk * k, C) weighted and summed, all classes sorted, and all of that again for
the next k.

Bare products: each product of unit features is computed once in float32, in tiles that fit in the
processor's cache, and dropped. Any exact search without pruning costs at least that, except for
queries that are their own gallery: half of their symmetric matrix is enough, so Recall@k can be
faster. Features are normally distributed around class centers.

N images of Recall@k, M of the bank, T test images, D width, C classes.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_simpool import distributed
from dino_simpool.bench import interleave, medians, run
from dino_simpool.config import BenchKnnConfig
from dino_simpool.eval.knn import knn_rank, vote_each_k
from dino_simpool.eval.recall import first_positive, precision_at_r, recall_of
from dino_simpool.features.neighbors import full_precision
from dino_simpool.features.ranking import DEVICE_TILE, TILE
from dino_simpool.logs import text_table

TEMPERATURE = 0.07
RECALL_KS = (1, 10, 100)


def published_knn(bank: Tensor, labels: Tensor, queries: Tensor, *, k: int, num_classes: int, parts: int) -> Tensor:
    """Classes of each query by descending vote, (T, C), as published, but with a last chunk for
    remaining queries.

    bank: (M, D) and queries: (T, D) of unit length, labels: (M,). parts: chunks of the queries.
    """
    columns, found = bank.T, []
    for chunk in queries.split(max(1, len(queries) // parts)):
        similarity, index = torch.mm(chunk, columns).topk(k, largest=True, sorted=True)
        neighbors = labels.expand(len(chunk), -1).gather(1, index)
        one_hot = torch.zeros(len(chunk) * k, num_classes, device=bank.device).scatter_(1, neighbors.view(-1, 1), 1)
        weights = similarity.div(TEMPERATURE).exp().view(len(chunk), k, 1)
        votes = (one_hot.view(len(chunk), k, num_classes) * weights).sum(1)
        found.append(votes.sort(1, descending=True).indices)
    return torch.cat(found)


def bare_products(rows: Tensor, columns: Tensor) -> None:
    """Compute all similarities of unit features (T, D) and (M, D), tile by tile, and drop them."""
    side = TILE if rows.device.type == "cpu" else DEVICE_TILE
    memory = torch.empty(side * side, device=rows.device)
    with full_precision():
        for a in rows.split(side):
            for b in columns.split(side):
                torch.mm(a, b.T, out=memory[: len(a) * len(b)].view(len(a), len(b)))


def make_features(count: int, num_classes: int, *, cfg: BenchKnnConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Unit features (count, D) and classes (count,). The centers depend on cfg.seed only."""
    centers = torch.randn(num_classes, cfg.width, generator=torch.Generator().manual_seed(cfg.seed))
    generator = torch.Generator().manual_seed(1 + cfg.seed + seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    noise = torch.randn(count, cfg.width, generator=generator)
    return F.normalize(centers[labels] + cfg.noise * noise, dim=1), labels


def main(cfg: BenchKnnConfig) -> None:
    """The command bench knn."""
    run("knn", cfg, cfg.out, lambda device: {"recall": measure_recall(cfg, device), "knn": measure_knn(cfg, device)}, describe)


def measure_recall(cfg: BenchKnnConfig, device: torch.device) -> dict[str, Any]:
    """Seconds of Recall@k, R-precision and MAP@R beside the bare products; peak memory in GB."""
    features, labels = make_features(cfg.images, cfg.products, cfg=cfg, seed=1)
    features = features.to(device)
    ways: dict[str, Callable[[], Any]] = {
        "bare products": lambda: bare_products(features, features),
        "Recall@k": lambda: first_positive(features, labels),
        "R-precision and MAP@R": lambda: precision_at_r(features, labels),
    }
    seconds, results = interleave(ways, repetitions=cfg.repetitions, device=device)
    middle = medians(seconds)
    middle["Recall@k, R-precision, MAP@R"] = middle["Recall@k"] + middle["R-precision and MAP@R"]
    return {
        "seconds": seconds,
        "medians": middle,
        "times_the_products": {name: value / middle["bare products"] for name, value in middle.items()},
        "recall": {str(k): value for k, value in recall_of(results["Recall@k"], RECALL_KS).items()},
        "map_at_r": 100 * results["R-precision and MAP@R"][1].mean().item(),
        "peak_gb": peak_memory(cfg),
    }


def measure_knn(cfg: BenchKnnConfig, device: torch.device) -> dict[str, Any]:
    """Seconds of k-NN, published and ours, for each k and all k; whether the classes agree."""
    bank, labels = make_features(cfg.bank, cfg.classes, cfg=cfg, seed=2)
    queries, truth = make_features(cfg.queries, cfg.classes, cfg=cfg, seed=3)
    bank, labels, queries = bank.to(device), labels.to(device), queries.to(device)
    ways: dict[str, Callable[[], Any]] = {"bare products": lambda: bare_products(queries, bank)}
    for k in cfg.k:
        ways[f"ours, k = {k}"] = partial(knn_rank, bank, labels, queries, k=k, num_classes=cfg.classes)
        for parts in cfg.published_chunks:
            way = partial(published_knn, bank, labels, queries, k=k, num_classes=cfg.classes, parts=parts)
            ways[f"published, {parts} chunks, k = {k}"] = way
    ways["ours, all k"] = partial(
        vote_each_k, bank, labels, queries, ks=cfg.k, temperature=TEMPERATURE, num_classes=cfg.classes, top=5
    )
    seconds, results = interleave(ways, repetitions=cfg.repetitions, device=device)
    middle = medians(seconds)
    comparisons: dict[str, dict[str, float]] = {}
    for parts in cfg.published_chunks:
        total, differing_total = 0.0, 0
        for k in cfg.k:
            ours, published = f"ours, k = {k}", f"published, {parts} chunks, k = {k}"
            differing = int((results[ours][:, 0] != results[published][:, 0]).sum())
            times = middle[published] / middle[ours]
            comparisons[f"{parts} chunks, k = {k}"] = {"times_as_fast": times, "differing_predictions": differing}
            total += middle[published]
            differing_total += differing
        times = total / middle["ours, all k"]
        comparisons[f"{parts} chunks, all k"] = {"times_as_fast": times, "differing_predictions": differing_total}
    accuracy = {str(k): 100 * results[f"ours, k = {k}"][:, 0].cpu().eq(truth).double().mean().item() for k in cfg.k}
    return {"seconds": seconds, "medians": middle, "comparisons": comparisons, "accuracy": accuracy}


def peak_memory(cfg: BenchKnnConfig) -> float | None:
    """Largest resident memory, in GB of 10**9 bytes, of a new process that makes the features and
    computes Recall@k once. None where the system does not say it (Windows)."""
    if resource is None:
        return None
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    process = context.Process(target=_recall_alone, args=(cfg, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"the process that measures the memory ended with status {process.exitcode}: is there enough memory?")
    return float(queue.get())


def _recall_alone(cfg: BenchKnnConfig, queue: Any) -> None:
    features, labels = make_features(cfg.images, cfg.products, cfg=cfg, seed=1)
    first_positive(features.to(distributed.setup(cfg.device)), labels)
    if sys.platform == "linux":  # ru_maxrss here includes the process that started this one
        largest = 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    else:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    queue.put(largest / 1e9)


def describe(record: dict[str, Any]) -> str:
    """The tables that are printed."""
    config, recall, knn = record["config"], record["recall"], record["knn"]
    rows = [["method", "seconds", "times the products"]]
    rows += [[name, f"{value:.2f}", f"{recall['times_the_products'][name]:.2f}"] for name, value in recall["medians"].items()]
    lines = [f"Recall@k, {config['images']} x {config['width']}, {config['products']} classes", text_table(rows, rule=True)]
    peak = recall["peak_gb"]
    lines += [f"peak memory of Recall@k: {'not measured here' if peak is None else f'{peak:.2f} GB'}", ""]
    lines += [f"k-NN, {config['queries']} queries in {config['bank']} x {config['width']}, {config['classes']} classes"]
    rows = [["method", "seconds"], *([name, f"{value:.2f}"] for name, value in knn["medians"].items())]
    lines += [text_table(rows, rule=True), ""]
    rows = [["ours beside the published code", "times as fast", "predictions"]]
    for name, found in knn["comparisons"].items():
        same = "identical" if not found["differing_predictions"] else f"{found['differing_predictions']} differ"
        rows.append([name, f"{found['times_as_fast']:.2f}", same])
    machine = record["machine"]
    load = "not measured here" if machine["load"] is None else f"{machine['load']:.1f}"
    lines += [text_table(rows, rule=True), f"{machine['device']}, {machine['threads']} threads, load before {load}"]
    return "\n".join(lines)
