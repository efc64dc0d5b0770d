"""One self-contained HTML page about a run: results, curves, attention, crops, settings.

Everything comes from the folder of the run (log.jsonl, config.yaml, last.pth, results/*.json) and
from the images. Where something is missing, the page says so and how to provide it.

    page.py   style sheet, tables    chart.py   curves as SVG    panels.py   attention and crops
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import torch
import yaml

from dino_simpool import distributed
from dino_simpool.checkpoint import REMEDY, RUN, load_encoder, read_state
from dino_simpool.config import ReportConfig, TrainConfig, from_dict
from dino_simpool.files import Fields, read_json, require_fields, write_atomically
from dino_simpool.logs import TIMING_FIELDS, read_log
from dino_simpool.names import shown_lines
from dino_simpool.paths import folder_or_archive
from dino_simpool.report import page
from dino_simpool.report.chart import Point, line_chart, short
from dino_simpool.report.panels import attention_cards, crop_cards
from dino_simpool.results import overlap_note, unfinished_note, versions

Record = dict[str, Any]

EVALUATORS = {"knn": "k-NN", "linear": "linear probe", "linear_grid": "linear probe (grid)", "masks": "attention on objects"}
"""Name of results/*.json -> what the page calls it."""
COLUMNS = {"": "trained", "_untrained": "untrained", "_pixels": "raw pixels"}
"""Ending of these names -> what the page calls it."""
METRICS = {
    "top1": "top-1", "best_top1": "top-1, best epoch", "last_top1": "top-1, last epoch",
    "balanced": "mean over classes", "best_balanced": "mean over classes, best epoch",
    "last_balanced": "mean over classes, last epoch",
    "top5": "top-5", "best_top5": "top-5, best epoch", "last_top5": "top-5, last epoch",
    "attention_in_mask": "inside the mask", "mask_area": "the mask's share of the area", "ratio": "inside / area",
}  # fmt: skip
"""Metrics in the table; for k-NN they end in k (top1_k10). All others are in the folded list."""
CURVES = (
    ("Loss and teacher entropy", "over ln K; 1 is uniform, the gap is the KL",
     {"loss_over_lnK": "loss", "entropy_over_lnK": "entropy"}),
    ("Learning rate", "scaled by batch / 256", {"lr": "rate"}),
    ("Feature spread", "0: all images alike; 1: independent directions", {"feature_spread": "spread"}),
    ("Effective rank", "directions in use before the prototypes", {"effective_rank": "rank"}),
    ("Gradient norm", "of all parameters, before clipping", {"grad_norm": "norm"}),
)  # fmt: skip
"""Charts of fields of log.jsonl: title, note, and field -> label of its line."""
NO_CURVES = TIMING_FIELDS | {"step", "epoch"} | {name for _, _, names in CURVES for name in names}
"""Every other number in the step lines has a chart under More curves."""


def main(cfg: ReportConfig) -> Path:
    """The command `dino-simpool report`: write the page and print its path."""
    path = build_report(Path(cfg.out), data=cfg.data, num_images=cfg.num_images, device=distributed.setup(cfg.device))
    print(shown_lines(f"report: {path}"))
    return path


def build_report(out: Path, *, data: str, num_images: int, device: torch.device) -> Path:
    """Write OUT/report.html and return its path.

    out: folder of a training run.   data, num_images: as in ReportConfig.   ValueError or OSError
    if `out` holds no run, or a file of the run is broken.
    """
    if not (out / "config.yaml").is_file():
        raise ValueError(f"{out} holds no run (there is no config.yaml): give the run.out of a training run")
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}: give 1 or more")
    options = (out / "config.yaml").read_text(encoding="utf-8", errors="replace")
    try:
        cfg = from_dict(TrainConfig, yaml.safe_load(options))
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{out}/config.yaml is not that of a run ({' '.join(str(error).split())[:300]})") from None
    records = read_log(out / "log.jsonl") if (out / "log.jsonl").is_file() else []
    steps = [record for record in records if record["kind"] == "step"]
    evaluated = [record for record in records if record["kind"] in ("start", "epoch")]
    fields: Fields = {f"{name}?": dict for name in ("metrics", "model", "versions", "overlap")}
    what, remedy = "a result of an evaluator", "move it away, or evaluate again"
    files = sorted((out / "results").glob("*.json"))
    results = {path.stem: read_json(path, fields, what=what, remedy=remedy) for path in files}
    metrics = {name: record.get("metrics", {}) for name, record in results.items()}
    last = out / "last.pth"
    state = read_state(last) if last.is_file() else None
    if state is not None:
        fields = RUN | {"num_images": int, "versions": dict}
        require_fields(state, fields, path=last, what="a training state", remedy=REMEDY)
    name = out.resolve().name
    body = [
        f'<h1>{page.escape(name)}</h1><p class="soft">{page.escape(_lead(cfg, state))}</p>',
        f'<div class="tiles">{_tiles(cfg, steps, metrics)}</div>',
        page.section("Results", _results(out, data, results), "Frozen features of held-out images."),
        page.section("Curves", _curves(steps, evaluated, metrics), _curves_note(steps)),
        page.section("Attention on held-out images", _attention(out, data, num_images, device)),
        page.section("Crops", _crops(cfg)),
        page.section("Settings", _settings(options, results, state)),
    ]
    text = page.document(f"{name} - dino_simpool", "\n".join(body))
    write_atomically(out / "report.html", lambda file: file.write_text(text, encoding="utf-8"))
    return out / "report.html"


def _lead(cfg: TrainConfig, state: Record | None) -> str:
    """One sentence about what was trained."""
    gamma = "" if cfg.model.gamma is None else f", gamma {cfg.model.gamma:g}"
    pool = f"SimPool{gamma}" if cfg.model.pool == "simpool" else cfg.model.pool
    images = f"{state['num_images']:,} images" if state else "images"
    settings = f"Batch {cfg.run.batch_size}, seed {cfg.run.seed}."
    if state and state["step"] < (state.get("total_steps") or 0):  # version 0.1 did not store it
        settings += f" The run is unfinished: step {state['step']:,} of {state['total_steps']:,}."
    return f"DINO pre-training of {cfg.model.arch} ({pool}) on {images} without labels. {settings}"


def _tiles(cfg: TrainConfig, steps: list[Record], metrics: dict[str, Record]) -> str:
    """The most important numbers."""
    tiles = []
    if "knn" in metrics:
        key, value = next(iter(metrics["knn"].items()))
        note = ", ".join(f"{label} {other:.1f}" for label, other in _baselines(metrics, "knn", key).items())
        tiles.append(page.tile(_metric_name("knn", key), f"{value:.1f} %", note or "trained teacher"))
    if "masks" in metrics:
        before = _baselines(metrics, "masks", "ratio").get("untrained")
        note = "uniform 1×" if before is None else f"untrained {before:.2f}×, uniform 1×"
        tiles.append(page.tile("Attention on the object", f"{metrics['masks']['ratio']:.2f}×", note))
    if steps:
        done = steps[-1]["step"]
        if "loss_over_lnK" in steps[-1]:
            loss, note = steps[-1]["loss_over_lnK"], f"ln K = {math.log(cfg.head.out_dim):.2f}, K = {cfg.head.out_dim:,}"
            tiles.append(page.tile("Loss / ln K", "not finite" if loss is None else short(loss), note))
        seconds = sum(record.get("seconds") or 0 for record in steps)
        rate = f", {done * cfg.run.batch_size / seconds:,.0f} images/s" if seconds else ""
        tiles.append(page.tile("Training", _duration(seconds), f"{done:,} steps{rate}"))
    return "".join(tiles)


def _results(out: Path, data: str, results: dict[str, Record]) -> str:
    """A table of metrics (trained, untrained, raw pixels), what is missing, and a full list."""
    metrics = {name: record.get("metrics", {}) for name, record in results.items()}
    records = results.items()
    notes = [(name, overlap_note(record.get("overlap") or {})) for name, record in records]
    notes += [(name, unfinished_note(record.get("model"))) for name, record in records]
    rows, absent = [], [f"{name}: {note}" for name, note in notes if note]
    for evaluator, name in EVALUATORS.items():
        if evaluator not in metrics:
            if evaluator != "linear_grid":  # the second protocol of the linear probe
                absent.append(f"No {name} was run: {_command(out, data, evaluator)}")
            continue
        columns = [metrics.get(evaluator + ending, {}) for ending in COLUMNS]
        first_k = next(iter(columns[0])).rpartition("_")[2]  # k-NN: of the k that is reported, k10
        keys = [key for key in columns[0] if key in METRICS or (evaluator == "knn" and key.endswith(f"_{first_k}"))]
        rows += [[_metric_name(evaluator, key), *(_metric(key, column.get(key)) for column in columns)] for key in keys]
        if evaluator in ("knn", "masks") and f"{evaluator}_untrained" not in metrics:
            command = _command(out, data, evaluator, "--which", "untrained")
            absent.append(f"No {name} of the untrained encoder was run: {command}")
    if "knn" in metrics and "knn_pixels" not in metrics:
        absent.append(f"No k-NN of raw pixels was run: {_command(out, data, 'knn', '--features', 'pixels')}")
    everything = [f"{stem:<24} {key:<20} {value:10.4f}" for stem, own in metrics.items() for key, value in own.items()]
    parts = [page.table(["", *COLUMNS.values()], rows, main=1)] if rows else []
    parts += [page.missing(text) for text in absent]
    parts += [page.folded("All metrics in results/*.json", page.lines("\n".join(everything)))] if everything else []
    return "".join(parts)


def _command(out: Path, data: str, evaluator: str, *options: str) -> str:
    """The command that adds a result, or what the data lacks for it."""
    parts = ("val", "masks/val") if evaluator == "masks" else ("train", "val")
    if lacking := [part for part in parts if data and not Path(folder_or_archive(str(Path(data, part)))).exists()]:
        return f"it needs {' and '.join(lacking)} in {data}"
    files = [out / name for name in ("last.pth", "backbone.safetensors")]
    weights = next(filter(Path.is_file, files), files[0])
    return shlex.join(["dino-simpool", evaluator, *options, "--checkpoint", str(weights), "--data", data or "DIR"])


def _curves_note(steps: list[Record]) -> str:
    """The number of steps, and how long the run waited for images."""
    note = f"{steps[-1]['step']:,} steps." if steps else ""
    timed = [record for record in steps if record.get("data_wait_percent") is not None]
    if total := sum(record["seconds"] for record in timed):
        waiting = sum(record["seconds"] * record["data_wait_percent"] for record in timed) / total
        note += f" {waiting:.0f} % of the time was spent waiting for images."
    return note


def _curves(steps: list[Record], evaluated: list[Record], metrics: dict[str, Record]) -> str:
    """Small charts over the steps of training; fields that CURVES does not name are folded."""
    if not steps:
        return page.missing("No step is in log.jsonl yet.")
    cards = [_knn_card(evaluated, metrics)]
    for title, note, names in CURVES:
        series = {label: _points(steps, name) for name, label in names.items()}
        chart = line_chart(series) if any(series.values()) else page.missing(f"log.jsonl has no {' and no '.join(names)}.")
        cards.append(page.card(title, note, chart))
    fields = dict.fromkeys(name for record in steps for name in record if name not in NO_CURVES)
    others = {name: points for name in fields if (points := _points(steps, name))}
    more = [page.card(name, "", line_chart({"value": points})) for name, points in others.items()]
    return page.charts(cards) + (page.folded("More curves", page.charts(more)) if more else "")


def _knn_card(evaluated: list[Record], metrics: dict[str, Record]) -> str:
    """k-NN accuracy of the teacher during training, from its start with run.init on, with the
    untrained encoder and raw pixels."""
    points = [(record["step"], record["k-NN"]["10"]["top1"]) for record in evaluated if record.get("k-NN")]
    if not points:
        return page.card("k-NN", "", page.missing("No k-NN was run during training: set run.knn_train and run.knn_val."))
    chart = line_chart({"teacher": points}, references=_baselines(metrics, "knn", "top1_k10"))
    return page.card("k-NN during training", "top-1 in %, k = 10", chart)


def _baselines(metrics: dict[str, Record], evaluator: str, key: str) -> dict[str, float]:
    """A metric of the untrained encoder and of raw pixels, where they were evaluated, by label."""
    others = {label: metrics.get(evaluator + ending, {}) for ending, label in COLUMNS.items() if ending}
    return {label: own[key] for label, own in others.items() if key in own}


def _attention(out: Path, data: str, num_images: int, device: torch.device) -> str:
    """Held-out images with the attention of the encoder before and after training."""
    if not (out / "last.pth").is_file():
        return page.missing(f"There is no {out}/last.pth.")
    if not data:
        return page.missing(f"No images were given: dino-simpool report {shlex.quote(str(out))} --data DIR (with val/ in it)")
    before, after = (load_encoder(out / "last.pth", which=which).to(device) for which in ("untrained", "teacher"))
    try:  # with one black image, since not every pooling has attention
        before.attention(torch.zeros(1, 3, before.config.image_size, before.config.image_size, device=device))
    except ValueError as error:
        return page.missing(f"There is no attention to show: {error}.")
    return attention_cards({"before": before, "after": after}, data, num_images=num_images)


def _crops(cfg: TrainConfig) -> str:
    """The views that the run saw of a few training images."""
    roots = [root for root in ([cfg.data.root] if isinstance(cfg.data.root, str) else cfg.data.root) if root]
    gone = [root for root in roots if not Path(root).exists()]
    if gone or not roots:
        return page.missing(f"The training images are not here: {', '.join(gone) or 'data.root is empty'}.")
    return crop_cards(cfg, roots, num_images=4)


def _settings(options: str, results: dict[str, Record], state: Record | None) -> str:
    """The options of the run, and the library versions of training, evaluation and this page."""
    columns: dict[str, Record] = {"training": state["versions"] if state else {}, "this page": versions()}
    for stem, record in results.items():
        if record.get("versions") not in (None, *columns.values()):  # equal versions share a column
            columns[stem] = record["versions"]
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(str(column.get(name, "–")) for column in columns.values())] for name in names]
    return page.folded("config.yaml: every option of the run", page.lines(options)) + page.table(["version", *columns], rows)


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
