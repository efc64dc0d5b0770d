"""One self-contained HTML page about a run: results, curves, attention, crops, settings.

Everything comes from the folder of the run (log.jsonl, config.yaml, last.pth, results/*.json) and
from the images. Where something is missing, the page says so and shows the command that provides
it; nothing is made up.

    page.py   style sheet, tables    chart.py   curves as SVG    panels.py   attention and crops
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

import torch
import yaml

from dino_simpool import distributed
from dino_simpool.checkpoint import load_encoder, read_state
from dino_simpool.config import ReportConfig, TrainConfig, from_dict
from dino_simpool.files import write_atomically
from dino_simpool.logs import TIMING_FIELDS, read_log
from dino_simpool.report import page
from dino_simpool.report.chart import Point, line_chart, short
from dino_simpool.report.panels import attention_cards, crop_cards, ramp_css
from dino_simpool.results import versions

Record = dict[str, Any]

EVALUATORS = {"knn": "k-NN", "linear": "linear probe", "linear_grid": "linear probe (grid)", "masks": "attention on objects"}
"""Names of results/*.json, and what the page calls them."""
COLUMNS = {"": "trained", "_untrained": "untrained", "_pixels": "raw pixels"}
"""Endings of these names, and what the page calls them."""
METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "best_top1": "top-1, best epoch",
    "last_top1": "top-1, last epoch",
    "best_top5": "top-5, best epoch",
    "last_top5": "top-5, last epoch",
    "attention_in_mask": "inside the mask",
    "mask_area": "the mask's share of the area",
    "ratio": "inside / area",
}
"""Metrics in the table, and what the page calls them; for k-NN they end in k (top1_k10). All others
are in the folded list."""
CURVES = (
    (
        "Loss and teacher entropy",
        "over ln K; 1 is uniform, the gap is the KL",
        {"loss_over_lnK": "loss", "entropy_over_lnK": "entropy"},
    ),
    ("Learning rate", "scaled by batch / 256", {"lr": "rate"}),
    ("Feature spread", "0: all images alike; 1: independent directions", {"feature_spread": "spread"}),
    ("Effective rank", "directions in use before the prototypes", {"effective_rank": "rank"}),
    ("Gradient norm", "of all parameters, before clipping", {"grad_norm": "norm"}),
)
"""Charts of fields of log.jsonl: title, note, and field -> label of its line."""
NO_CURVES = TIMING_FIELDS | {"step", "epoch"} | {name for _, _, names in CURVES for name in names}
"""Every other number in the step lines has a chart under "More curves"."""


def main(cfg: ReportConfig) -> Path:
    """The command `dino-simpool report`: write the page and print its path."""
    path = build_report(Path(cfg.out), data=cfg.data, num_images=cfg.num_images, device=distributed.setup(cfg.device))
    print(f"report: {path}")
    return path


def build_report(out: Path, *, data: str, num_images: int, device: torch.device) -> Path:
    """Write OUT/report.html and return its path.

    out: folder of a training run.   data: folder with held-out images in val/ and, optionally,
    masks/val/; empty for none.   num_images: how many of these to show.   ValueError or OSError if
    `out` holds no run, or a file of the run is damaged.
    """
    if not (out / "config.yaml").is_file():
        raise ValueError(f"{out} holds no run (there is no config.yaml): give the run.out of a training run")
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}: give 1 or more")
    options = (out / "config.yaml").read_text()
    cfg = from_dict(TrainConfig, yaml.safe_load(options))
    records = read_log(out / "log.jsonl") if (out / "log.jsonl").is_file() else []
    results = {path.stem: _read_result(path) for path in sorted((out / "results").glob("*.json"))}
    state = read_state(out / "last.pth") if (out / "last.pth").is_file() else None
    name = out.resolve().name
    body = [
        f'<h1>{escape(name)}</h1><p class="soft">{escape(_lead(cfg, state))}</p>',
        f'<div class="tiles">{_tiles(cfg, records, results)}</div>',
        page.section("Results", "Frozen features of held-out images.", _results(out, data, results)),
        page.section("Curves", _curves_note(records), _curves(records, results)),
        page.section("Attention on held-out images", "", _attention(out, data, num_images, device, trained=state is not None)),
        page.section("Crops", "", _crops(cfg)),
        page.section("Settings", "", _settings(options, results, state)),
    ]
    path = out / "report.html"
    write_atomically(
        path, lambda file: file.write_text(page.document(f"{name} - dino_simpool", "\n".join(body)), encoding="utf-8")
    )
    return path


def _read_result(path: Path) -> Record:
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is not a results file ({error}): remove it, or evaluate again") from error


def _lead(cfg: TrainConfig, state: Record | None) -> str:
    """One sentence about what was trained."""
    gamma = "" if cfg.model.gamma is None else f", gamma {cfg.model.gamma:g}"
    pool = f"SimPool{gamma}" if cfg.model.pool == "simpool" else cfg.model.pool
    images = f"{state['num_images']:,} images" if state else "images"
    settings = f"Batch {cfg.run.batch_size}, seed {cfg.run.seed}."
    return f"DINO pre-training of {cfg.model.arch} ({pool}) on {images} without labels. {settings}"


def _tiles(cfg: TrainConfig, records: list[Record], results: dict[str, Record]) -> str:
    """The most important numbers."""
    steps = _of_kind(records, "step")
    tiles = []
    if "knn" in results:
        key, value = next(iter(results["knn"]["metrics"].items()))
        note = ", ".join(f"{label} {other:.1f}" for label, other in _baselines(results, "knn", key).items())
        tiles.append(page.tile(_metric_name("knn", key), f"{value:.1f} %", note or "trained teacher"))
    if "masks" in results:
        before = _baselines(results, "masks", "ratio").get("untrained")
        note = "uniform 1×" if before is None else f"untrained {before:.2f}×, uniform 1×"
        tiles.append(page.tile("Attention on the object", f"{results['masks']['metrics']['ratio']:.2f}×", note))
    if steps:
        last, done = steps[-1], steps[-1]["step"]
        if "loss_over_lnK" in last:
            loss, note = last["loss_over_lnK"], f"ln K = {math.log(cfg.head.out_dim):.2f}, K = {cfg.head.out_dim:,}"
            tiles.append(page.tile("Loss / ln K", "not finite" if loss is None else short(loss), note))
        seconds = sum(record.get("seconds") or 0 for record in steps)
        rate = f", {done * cfg.run.batch_size / seconds:,.0f} images/s" if seconds else ""
        tiles.append(page.tile("Training", _duration(seconds), f"{done:,} steps{rate}"))
    return "".join(tiles)


def _results(out: Path, data: str, results: dict[str, Record]) -> str:
    """A table of metrics (trained, untrained, raw pixels), what is missing, a list of everything."""
    rows, absent = [], []
    command = f"--checkpoint {out}/last.pth --data {data or 'DIR'}"
    for evaluator, name in EVALUATORS.items():
        if evaluator not in results:
            if evaluator != "linear_grid":  # the second protocol of the linear probe
                absent.append(f"No {name} was run: dino-simpool {evaluator} {command}")
            continue
        columns = [results.get(evaluator + ending, {}).get("metrics", {}) for ending in COLUMNS]
        first_k = next(iter(columns[0])).rpartition("_")[2]  # k-NN: of the k that is reported, k10
        keys = [key for key in columns[0] if key in METRICS or (evaluator == "knn" and key.endswith(f"_{first_k}"))]
        rows += [[_metric_name(evaluator, key), *(_metric(key, metrics.get(key)) for metrics in columns)] for key in keys]
        if evaluator in ("knn", "masks") and f"{evaluator}_untrained" not in results:
            absent.append(f"No {name} of the untrained encoder was run: dino-simpool {evaluator} --which untrained {command}")
    if "knn" in results and "knn_pixels" not in results:
        absent.append(f"No k-NN of raw pixels was run: dino-simpool knn --features pixels {command}")
    everything = [
        f"{stem:<24} {key:<20} {value:10.4f}"
        for stem, record in results.items()
        for key, value in record.get("metrics", {}).items()
    ]
    parts = [page.table(["", *COLUMNS.values()], rows, main=1)] if rows else []
    parts += [page.missing(text) for text in absent]
    parts += [page.folded("All metrics in results/*.json", page.lines("\n".join(everything)))] if everything else []
    return "".join(parts)


def _curves_note(records: list[Record]) -> str:
    """The number of steps, and how long the run waited for images."""
    steps = _of_kind(records, "step")
    note = f"{steps[-1]['step']:,} steps." if steps else ""
    timed = [record for record in steps if record.get("data_wait_percent") is not None]
    if total := sum(record["seconds"] for record in timed):
        waiting = sum(record["seconds"] * record["data_wait_percent"] for record in timed) / total
        note += f" {waiting:.0f} % of the time was spent waiting for images."
    return note


def _curves(records: list[Record], results: dict[str, Record]) -> str:
    """Small charts over the steps of training; fields that CURVES does not name are folded."""
    steps = _of_kind(records, "step")
    if not steps:
        return page.missing("No step is in log.jsonl yet.")
    cards = [_knn_card(_of_kind(records, "epoch"), results)]
    for title, note, names in CURVES:
        series = {label: _points(steps, name) for name, label in names.items()}
        chart = line_chart(series) if any(series.values()) else page.missing(f"log.jsonl has no {' and no '.join(names)}.")
        cards.append(page.card(title, note, chart))
    fields = dict.fromkeys(name for record in steps for name in record if name not in NO_CURVES)
    others = {name: points for name in fields if (points := _points(steps, name))}
    more = [page.card(name, "", line_chart({"value": points})) for name, points in others.items()]
    return page.charts(cards) + (page.folded("More curves", page.charts(more)) if more else "")


def _knn_card(epochs: list[Record], results: dict[str, Record]) -> str:
    """k-NN accuracy of the teacher during training, with the untrained encoder and raw pixels."""
    points = [(record["step"], record["k-NN"]["10"]["top1"]) for record in epochs if record.get("k-NN")]
    if not points:
        return page.card("k-NN", "", page.missing("No k-NN was run during training: set run.knn_train and run.knn_val."))
    chart = line_chart({"teacher": points}, references=_baselines(results, "knn", "top1_k10"))
    return page.card("k-NN during training", "top-1 in %, k = 10", chart)


def _baselines(results: dict[str, Record], evaluator: str, key: str) -> dict[str, float]:
    """A metric of the untrained encoder and of raw pixels, where they were evaluated, by label."""
    metrics = {label: results.get(evaluator + ending, {}).get("metrics", {}) for ending, label in COLUMNS.items() if ending}
    return {label: each[key] for label, each in metrics.items() if key in each}


def _attention(out: Path, data: str, num_images: int, device: torch.device, *, trained: bool) -> str:
    """Held-out images with the attention of the encoder before and after training."""
    if not trained:
        return page.missing(f"There is no {out}/last.pth.")
    if not data:
        return page.missing(f"No images were given: dino-simpool report --out {out} --data DIR (with val/ in it)")
    before, after = (load_encoder(out / "last.pth", which=which) for which in ("untrained", "teacher"))
    cards, top = attention_cards({"before": before, "after": after}, data, split="val", num_images=num_images, device=device)
    note = (
        "What the pooling of the encoder weighs: the image, the attention before training, and after training. Color: 0× "
        f'<span class="scale" style="background:{ramp_css()}"></span> {top:.1f}× uniform attention. Where the data have masks, '
        "the white line is the outline of the true object and the number is the density of attention on it (uniform: 1×). "
        "Without masks, the line encloses 60 % of the attention."
    )
    return f'<p class="soft">{note}</p>{cards}'


def _crops(cfg: TrainConfig) -> str:
    """The views that the run saw of a few training images."""
    roots = [root for root in ([cfg.data.root] if isinstance(cfg.data.root, str) else cfg.data.root) if root]
    gone = [root for root in roots if not Path(root).exists()]
    if gone or not roots:
        return page.missing(f"The training images are not here: {', '.join(gone) or 'data.root is empty'}.")
    note = "Views of training images in the first epoch. Boxes of global crops are blue, boxes of local crops orange."
    return f'<p class="soft">{note}</p>{crop_cards(cfg, num_images=4)}'


def _settings(options: str, results: dict[str, Record], state: Record | None) -> str:
    """The options of the run, and the library versions of training, evaluation and this page."""
    columns: dict[str, Record] = {"training": state["versions"] if state else {}, "this page": versions()}
    for stem, record in results.items():
        if record.get("versions") not in (None, *columns.values()):  # equal versions share a column
            columns[stem] = record["versions"]
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(str(column.get(name, "–")) for column in columns.values())] for name in names]
    return page.folded("config.yaml: every option of the run", page.lines(options)) + page.table(["version", *columns], rows)


def _of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _points(records: list[Record], name: str) -> list[Point]:
    """(step, value) of the records in which the field is a number."""
    values = [(record["step"], record.get(name)) for record in records]
    return [(step, value) for step, value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]


def _metric_name(evaluator: str, key: str) -> str:
    """What the page calls a metric, such as "k-NN: top-1, k = 10" for top1_k10 of knn."""
    name, _, k = key.partition("_k")
    return f"{EVALUATORS[evaluator]}: {METRICS.get(name, name)}{f', k = {k}' if k else ''}"


def _metric(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}×" if key == "ratio" else f"{value:.1f} %"


def _duration(seconds: float) -> str:
    """Seconds as text: 3 h 12 min, 5 min 8 s or 8 s."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{seconds:.0f} s"
