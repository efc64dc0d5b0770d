"""Results beside the numbers of the paper: results.json files in, the paper's tables out, with the
settings that differ.

A row is one metric of one file. It shows the paper's number if there is one for the network,
pooling, epochs of pre-training and data set, and names the settings that differ from the paper's
protocol. Raw pixels, untrained weights and class folders without 1000 classes have no number in the
paper to compare with. The number of the release is shown where it differs. A figure is marked if
the weights are of other images than the paper's, or it is unknown of which.

Epochs are those of the checkpoint. If they are unknown, the row says so and compares with 100. A
ViT with its norm before the pooling counts as supervised, everything else as self-supervised.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

from dino_simpool.config import TableConfig
from dino_simpool.files import NUMBER, Fields, read_json, require_fields, write_atomically
from dino_simpool.logs import text_table
from dino_simpool.names import shown_lines
from dino_simpool.report import paper
from dino_simpool.report.paper import Figure, Key
from dino_simpool.results import overlap_note, unfinished_note

TABLE_OF = {"knn": "3", "linear": "3", "linear_grid": "3", "retrieval": "C4", "recall": "C5", "resources": "8"}
OTHERS = "Other results"
METRICS = {
    "knn": {"top1_k10": "k-NN"},
    "linear": {"best_top1": "probe"},
    "linear_grid": {"top1": "probe"},
    "retrieval": {"map_medium": "medium", "map_hard": "hard"},
    "recall": {f"recall_{k}": f"R@{k}" for k in (1, 2, 4, 10, 20, 100)},
}
"""The paper's names of metrics. Others keep their own names."""
MARK = "*"
FOOTNOTE = f"{MARK} of weights trained on all of ImageNet-1k; ours were trained on other images, or it is unknown on which"
COLUMNS = ("network", "method", "epochs", "data", "metric", "ours", "paper", "difference", "release", "differs", "file")


@dataclass(frozen=True)
class Row:
    """One metric of one result, in the paper's unit."""

    table: str
    network: str
    method: str
    epochs: str
    data: str
    metric: str
    ours: float
    figure: Figure | None
    release: Figure | None
    differences: tuple[str, ...]
    file: str
    other_images: bool = False
    """The weights are of other images than the paper's, or it is unknown of which."""


def main(cfg: TableConfig) -> None:
    """The command `dino-simpool table`."""
    if not cfg.results:
        raise ValueError("no results are given: give files or folders of results, as in dino-simpool table RUN1 RUN2")
    text = render([row for path in find_results(cfg.results) for row in rows_of(read_result(path), path)], cfg.format)
    if cfg.out:
        write_atomically(Path(cfg.out), lambda file: file.write_text(text, encoding="utf-8"))
    else:
        print(shown_lines(text), end="")


def find_results(places: Iterable[str]) -> list[Path]:
    """Each file once: those given, and of a folder all results/*.json in it and below, else its own
    *.json. ValueError if a place has no results."""
    found: dict[Path, Path] = {}
    for place in map(Path, places):
        files = [place] if place.is_file() else sorted(place.glob("**/results/*.json")) or sorted(place.glob("*.json"))
        if not files:
            raise ValueError(f"there are no results in {place}: give a file, a folder of them, or the folder of a run")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


RESULT: Fields = {
    "evaluator": str, "metrics": dict, "config": dict, "model?": dict, "model?.arch": str, "model?.pool": str, "counts?": dict,
    "versions?": dict, "overlap?": dict, "preprocessing?": dict, "decoding?": dict, "probe?": dict, "whitening?": dict,
    "image_digests?": dict, "split?": str,
}  # fmt: skip


def read_result(path: Path) -> dict[str, Any]:
    """The record that an evaluator wrote. ValueError names a file that is something else."""
    what, remedy = "a result of an evaluator", "leave it out, or evaluate again"
    record = read_json(path, RESULT, what=what, remedy=remedy)
    return record | {"metrics": require_fields(record["metrics"], dict.fromkeys(record["metrics"], NUMBER), path=path,
                                               what=what, remedy=remedy)}  # fmt: skip


def rows_of(record: dict[str, Any], path: Path) -> list[Row]:
    """The rows of one result. path: its file."""
    evaluator, model = record["evaluator"], record.get("model") or {}
    table = TABLE_OF.get(evaluator, "") if model else ""
    network, method = (paper.network_of(model), paper.method_of(model)) if model else ("", "raw pixels")
    given = str(record.get("dataset") or "")
    if table == "8":
        epochs, key = None, Key(table, network, method, "", 0, "", "")
    else:
        epochs, data = epochs_of(model), "ImageNet-1k" if table == "3" else given
        regime = paper.SUPERVISED if model.get("norm_order") == "norm_then_pool" else paper.SELF
        key = Key(table, network, method, regime, 300 if epochs == 300 else 100, data, "")
    refused = _no_comparison(record) if table else []
    other = other_images(record) if table and table != "8" and not refused else ""
    differences = refused or (_differences(record, key, epochs) if table else [])
    differences += [said for said in (other, overlap_note(record.get("overlap") or {}), unfinished_note(model)) if said]
    has_gamma = method == paper.SIMPOOL and model.get("gamma") is not None
    rows = []
    for name, value in record["metrics"].items():
        own = key._replace(metric=METRICS.get(evaluator, {}).get(name, name))
        figure = None if refused else paper.PAPER.get(own)
        release = None if refused else paper.RELEASE.get((own, has_gamma))
        scale = 1 if evaluator != "resources" else 1e6 if name == "params" else 1e9
        place = given if refused else key.dataset
        said = tuple(differences) if figure or refused else ()
        known = "" if epochs is None else str(epochs)
        numbers = (value / scale, figure, release)
        rows.append(Row(table, network, method, known, place, own.metric, *numbers, said, str(path), bool(other)))
    return rows


def epochs_of(model: dict[str, Any]) -> float | None:
    """Epochs of pre-training of the weights, to three digits. None if unknown."""
    epochs = model.get("epochs")
    if not isinstance(epochs, int | float):
        return None
    return int(epochs) if epochs == int(epochs) else float(f"{epochs:.3g}")


def other_images(record: dict[str, Any]) -> str:
    """How the images behind the weights differ from all of ImageNet-1k, on which the paper trained,
    in words; "" if they do not.

    Another number tells, and for the same number the names, where the evaluator read that many from
    train.
    """
    model, full = record["model"], paper.COUNTS["ImageNet-1k"]["train"]
    number, digest = model.get("num_images"), model.get("images")
    if number != full:
        name = ", ImageNet-20 %" if number == 260_000 else ""
        return f"images of pre-training {'unknown' if number is None else _plain(number)}{name} (paper: {full:,})"
    train = (record.get("image_digests") or {}).get("train")
    if (record.get("counts") or {}).get("train") == full and train and digest and train != digest:
        return f"images of pre-training {full:,}, but not those of train (their names differ)"
    return ""


def _no_comparison(record: dict[str, Any]) -> list[str]:
    """The reasons why no number of the paper can be compared."""
    classes = (record.get("counts") or {}).get("classes")
    imagenet = TABLE_OF[record["evaluator"]] != "3" or classes in (None, paper.COUNTS["ImageNet-1k"]["classes"])
    reasons = {
        "raw pixels": record["config"].get("features") == "pixels",
        "untrained weights": record["model"].get("which") == "untrained",
        f"not ImageNet-1k: {classes} classes": not imagenet,
    }
    return [reason for reason, holds in reasons.items() if holds]


def _differences(record: dict[str, Any], key: Key, epochs: float | None) -> list[str]:
    """The settings that differ from the paper's protocol, and choices it leaves open."""
    evaluator, model, config = record["evaluator"], record["model"], record["config"]
    prepared, probe, whitening, counts = (record.get(name) or {} for name in ("preprocessing", "probe", "whitening", "counts"))
    resources, retrieval, linear = (evaluator == name for name in ("resources", "retrieval", "linear"))
    simpool = key.method == paper.SIMPOOL and not resources
    square = evaluator in ("knn", "linear", "linear_grid", "recall")
    checks = [  # where it applies, name, ours, the paper's
        (resources, "image size", record.get("image_size"), 224),
        (resources, "classes", record.get("num_classes"), 1000),
        (not resources, "weights", model.get("which"), "teacher"),
        (not resources, "precision", record.get("dtype"), "fp32"),
        (not resources, "exif_orientation", (record.get("decoding") or config).get("exif_orientation") or False, False),
        (not resources, "epochs of pre-training", "unknown" if epochs is None else epochs, key.epochs),
        (simpool, "gamma", model.get("gamma"), paper.gamma_of(model)),
        (simpool, "min_over", model.get("min_over"), "image"),
        (simpool, "heads of SimPool", model.get("num_heads"), 1),
        (square, "image_size", prepared.get("image_size"), 224),
        (square, "resize", prepared.get("resize"), 256),
        (evaluator == "knn", "temperature", config.get("temperature"), 0.07),
        (key.table == "3", "subset_per_class", config.get("subset_per_class"), None),
        (linear, "probe epochs", config.get("epochs"), 100),
        (linear, "probe lr", config.get("lr"), 1e-3),
        (linear, "probe batch", probe.get("batch_size"), 1024),
        (retrieval, "whitening", whitening.get("dimensions"), None),
        (retrieval, "distractors", config.get("distractors") or None, None),
        *((True, f"{name}:", counts.get(name), number) for name, number in paper.COUNTS.get(key.dataset, {}).items()),
    ]
    said = [f"{name} {_plain(ours)} (paper: {_plain(its)})" for holds, name, ours, its in checks if holds and ours != its]
    if evaluator == "linear_grid":
        said.append("grid of learning rates without augmentation, chosen on held-out images (paper: best epoch on val)")
    if evaluator in ("retrieval", "recall"):
        said.append(f"preset {config.get('preset')} (the paper is silent)")
    for name in ("image_size", "multi_scale", "query_crop"):
        if retrieval and config.get(name) is not None:
            said.append(f"{name} {_plain(config[name])} in place of the preset's")
    if evaluator == "recall" and (ties := config.get("ties", "published")) != "published":
        said.append(f"ties {ties} in place of the published")
    return said


def _plain(value: Any) -> str:
    return "null" if value is None else f"{value:,}" if type(value) is int else str(value)


def render(rows: Sequence[Row], form: str) -> str:
    """The tables of the paper, and one more with the rest.   form: text, markdown or csv."""
    if form == "csv":
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["table", *COLUMNS])
        writer.writerows([row.table or OTHERS, *_cells(row, exact=True)] for row in rows)
        return file.getvalue()
    parts = []
    for table, title in {**paper.TITLES, "": OTHERS}.items():
        lines = [list(COLUMNS), *(_cells(row) for row in rows if row.table == table)]
        if len(lines) > 1:
            kept = [column for column in zip(*lines, strict=True) if any(column[1:])]
            marked = any(row.other_images and row.figure for row in rows if row.table == table)
            parts.append(_drawn(title, list(zip(*kept, strict=True)), form, note=FOOTNOTE if marked else ""))
    return "\n".join(parts)


def _cells(row: Row, *, exact: bool = False) -> list[str]:
    ours = repr(row.ours) if exact else f"{row.ours:.2f}"
    mark = MARK if row.other_images and not exact else ""
    paper_value = f"{row.figure.value:g}{mark}" if row.figure else ""
    difference = f"{round(row.ours - row.figure.value, 2) + 0.0:+.2f}" if row.figure else ""  # no -0.00
    release = f"{row.release.value:g}" if row.release else ""
    numbers = [ours, paper_value, difference, release]
    return [row.network, row.method, row.epochs, row.data, row.metric, *numbers, "; ".join(row.differences), row.file]


def _drawn(title: str, lines: list[tuple[str, ...]], form: str, *, note: str) -> str:
    """One table under its title, with a note below. The first line is its header."""
    if form == "markdown":
        cells = [[cell.replace("|", "\\|").replace(MARK, f"\\{MARK}") for cell in line] for line in lines]
        body = [f"| {' | '.join(line)} |" for line in cells]
        below = ["", f"\\{note}"] if note else []
        return "\n".join([f"### {title}", "", body[0], "|" + "---|" * len(lines[0]), *body[1:], *below]) + "\n"
    return f"{title}\n{indent(text_table(lines), '  ')}\n" + (f"  {note}\n" if note else "")
