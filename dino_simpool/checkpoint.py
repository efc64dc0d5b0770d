"""Checkpoints: written atomically, self-describing, made of tensors and plain values only.

    OUT/
        config.yaml            all options; `train --config OUT/config.yaml` repeats the run
        log.jsonl              one line every run.log_every steps and one for each epoch
        tensorboard/           scalars, crops, attention maps
        last.pth  prev.pth     the newest two states; a run resumes from last, else from prev
        epoch_0020.pth ...     states that are kept (run.keep_every)
        best.pth               state with the best k-NN accuracy so far, if k-NN is run
        backbone.safetensors   the evaluated encoder alone (DINO: the teacher's), and
        model.json             the options to build it
        results/*.json         evaluations
        report.html            written by `dino-simpool report OUT`
        bad_files.txt          only if images cannot be read: name, tab, reason
        error.txt              only after a failure
        before_nan.pth         the last state from before steps whose loss is not finite, and
        nan_report.json        what is known of them, if the run has stopped because of them

A state holds the `config`, the learner's state (DINO: `step`, `student`, `teacher`, `optimizer`,
`scaler`, `loss` with the center, `monitor`), running sums of the log, facts about the data, and
library versions. It has no random state: every random number is a function of (seed, step) or
(seed, epoch, image, view).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dino_simpool.config import ConfigError, DecodingSettings, ModelConfig, from_dict, option_names, to_dict
from dino_simpool.files import (
    NUMBER,
    Fields,
    check_digest,
    digests_of,
    read_json,
    require_fields,
    sync_folder,
    write_atomically,
    write_json,
)
from dino_simpool.logs import say
from dino_simpool.models.encoder import TRAINING, Encoder, build_encoder
from dino_simpool.models.foreign import PREFIX, load_timm
from dino_simpool.models.recognize import Recognized, recognize
from dino_simpool.models.weights import load_official, load_strict, read_file

FORMAT = 1
RUN: Fields = {
    "config.model": dict, "config.run.batch_size": int, "config.run.seed": int, "config.data": dict, "step": int,
    "total_steps?": int,
}  # fmt: skip
"""What every reader of a state needs."""
RESUMED: Fields = RUN | {
    "images": str, "num_images": int, "world_size": int, "epoch_open": bool, "best": NUMBER, "sums": torch.Tensor,
    "bad_files?": dict, "versions?": dict, "decoding?": dict, "bad_steps?": list,
}  # fmt: skip
"""What a run needs to go on."""
REMEDY = "give last.pth, best.pth or backbone.safetensors of a run"


def save_state(out: Path, state: dict[str, Any]) -> None:
    """Write OUT/last.pth. The previous one becomes OUT/prev.pth."""
    last = out / "last.pth"
    fresh = out / ".last.pth.new"
    write_atomically(fresh, lambda path: torch.save({"format": FORMAT, **state}, path))
    if last.exists():
        os.replace(last, out / "prev.pth")
    os.replace(fresh, last)
    sync_folder(out)


def keep_state(out: Path, name: str) -> None:
    """Copy OUT/last.pth to OUT/<name>."""
    write_atomically(out / name, lambda path: shutil.copyfile(out / "last.pth", path))


def read_state(path: str | Path) -> dict[str, Any]:
    """A training state from a file, on the CPU.

    FileNotFoundError, or ValueError if the file is truncated or something else.
    """
    return _own_state(path, read_file(path))


def _own_state(path: str | Path, state: Any) -> dict[str, Any]:
    """The content of a file, if it is a training state. ValueError if it is something else."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of this tool (format {FORMAT}); its keys: "
            f"{list(state)[:5] if isinstance(state, dict) else '-'}"
        )
    return state


def newest_state(out: Path, announce: Callable[[str], object]) -> dict[str, Any] | None:
    """The state to resume from, OUT/last.pth, else OUT/prev.pth (announced); None without either.

    Its entry "file" is the name. ValueError if there are files but none can be read: starting over
    must be the user's choice.
    """
    failures = []
    for path in (out / "last.pth", out / "prev.pth"):
        if path.exists():
            try:
                state = read_state(path)
            except ValueError as error:
                failures.append(str(error))
                continue
            for failure in failures:
                announce(f"{failure}; resuming from {path.name} instead")
            if not failures and path.name == "prev.pth":
                announce("last.pth is missing; resuming from prev.pth")
            return {**state, "file": path.name}
    if failures:
        raise ValueError(f"{'; '.join(failures)}: nothing to resume from. Move the files away, or give another run.out")
    return None


def check_same_run(config: dict[str, Any], saved: dict[str, Any], where: Path) -> list[str]:
    """The options that differ from those of the state that a run would resume, one line each.

    ValueError if they build another network or optimizer, or change which images a step sees.
    """
    before = {(group, name): value for group, options in saved.items() for name, value in options.items()}
    changed = [
        (group, name, before.get((group, name)), value)
        for group, options in config.items()
        for name, value in options.items()
        if before.get((group, name)) != value
    ]
    fixed = [c for c in changed if c[0] in ("model", "head") or c[:2] == ("optim", "name")]
    # If one of these differs, a position in the run means other images: epochs would be skipped or
    # repeated unnoticed.
    order = [c for c in changed if c[:2] in (("run", "batch_size"), ("run", "seed"), ("data", "subset_per_class"))]
    start = [c for c in changed if c[:2] == ("run", "init")]
    kinds = (("of another model", fixed), ("with another order of images", order), ("that started from other weights", start))
    for kind, different in kinds:
        if different:
            lines = ", ".join(f"{group}.{name} {old} -> {new}" for group, name, old, new in different)
            raise ValueError(f"{where} holds a run {kind} ({lines}): give another run.out, or the options of that run")
    return [f"{group}.{name}: {old} -> {new}" for group, name, old, new in changed if (group, name) != ("run", "out")]


def export_encoder(
    out: Path,
    encoder: Encoder,
    *,
    seed: int = 0,
    epochs: float | None = None,
    total_epochs: float | None = None,
    num_images: int | None = None,
    images: str | None = None,
    init: dict[str, Any] | None = None,
) -> None:
    """Write OUT/backbone.safetensors and OUT/model.json.

    seed: the one that made the initial weights, for comparisons. epochs, total_epochs, num_images,
    images: of training behind the weights and when the run is done, how many images it had, and
    their digest; None if unknown. init: the weights that the training started from, if not random.
    """
    # One entry: several would come in random order, and equal runs would write unequal files.
    run = {
        "seed": seed,
        "epochs": epochs,
        "total_epochs": total_epochs,
        "num_images": num_images,
        "images": images,
        "init": init,
        "decoding": to_dict(encoder.decoding),
    }
    about = {"run": json.dumps(run)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    write_atomically(out / "backbone.safetensors", lambda path: save_file(tensors, path, metadata=about))
    write_json(out / "model.json", to_dict(encoder.config) | {"sha256": digests_of(out, ["backbone.safetensors"])})


@dataclass
class _Stored:
    """What a file holds of an encoder."""

    options: dict[str, Any]
    """Of `ModelConfig`."""
    seed: int
    """Of the initial weights."""
    weights: dict[str, dict[str, torch.Tensor]]
    """By which."""
    training: dict[str, Any]
    """What the file says of `TRAINING`."""
    decoding: dict[str, Any]
    foreign: Recognized | None = None
    """What a file of others was recognized as."""


def load_encoder(
    path: str | Path,
    *,
    which: Literal["teacher", "student", "untrained"] = "teacher",
    weights: str | Path | None = None,
    answers: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Encoder:
    """The encoder of a checkpoint, in evaluation mode on the CPU, with every weight matched.

    path: last.pth, best.pth, epoch_*.pth, or backbone.safetensors with model.json beside it; or a
    file of others, which are recognized (models/recognize.py) and said: checkpoints of SimPool and
    DINO, state dicts of timm and torchvision; or timm:NAME for any encoder of timm, as it is
    (models/foreign.py). weights: for timm:NAME, a file or "random"; None for those that timm
    downloads. which: the weights; `untrained` is the encoder as the run's seed initialized it (0
    for files of others). overrides: ModelConfig options to change (gamma=2.0), or that a file of
    others cannot say. answers: those that count only if it does not say them. FileNotFoundError or
    ValueError in one line if the file is missing, is broken, does not fit, or does not say enough.
    """
    if str(path).startswith(PREFIX):
        return load_timm(str(path), weights=str(weights or ""), which=which, overrides=overrides)
    if weights:
        raise ValueError(f"weights {weights} are for a checkpoint timm:NAME: give the file itself as the checkpoint")
    path = Path(path)
    if path.suffix == ".safetensors" and (not path.is_file() or _is_export(path)):
        stored = _read_export(path)
    else:
        content = load_official(path)
        stored = _read_run(path, content) if "format" in content else _read_foreign(path, content, which, overrides, answers)
    try:
        config = from_dict(ModelConfig, {**stored.options, **overrides})
    except ConfigError as error:
        file = path.parent / "model.json" if path.suffix == ".safetensors" and not stored.foreign else path
        raise ConfigError(f"the model options in {file}: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stored.seed)
        encoder = build_encoder(config)
    if which != "untrained" and which not in stored.weights:
        raise ValueError(f"{path} has no {which} weights, only {', '.join(stored.weights)}")
    if stored.foreign:
        stored.foreign.check(encoder)
        say(stored.foreign.describe(which))
        stored.weights = dict.fromkeys(stored.weights, stored.foreign.weights)
    if which != "untrained":
        load_strict(encoder, stored.weights[which], source=str(path))
        for name, value in stored.training.items():
            setattr(encoder, name, value)
    else:
        encoder.epochs = 0.0
    try:
        encoder.decoding = from_dict(DecodingSettings, stored.decoding)
    except ConfigError as error:
        raise ConfigError(f"the decoding options in {path}: {error}") from None
    return encoder.eval()


def _read_run(path: Path, content: dict[str, Any]) -> _Stored:
    """A training state."""
    state = require_fields(_own_state(path, content), RUN, path=path, what="a training state", remedy=REMEDY)
    run = state["config"]["run"]
    steps_per_epoch = state.get("num_images", 0) // max(1, run["batch_size"])
    training = {
        "epochs": state["step"] / steps_per_epoch if steps_per_epoch else None,
        "total_epochs": state["total_steps"] / steps_per_epoch if steps_per_epoch and state.get("total_steps") else None,
        "num_images": state.get("num_images"),
        "images": state.get("images"),
        "init": state.get("init"),
    }
    options = option_names(DecodingSettings)  # those of training are complete but for a range `data`
    decoding = state.get("decoding") or {name: x for name, x in state["config"]["data"].items() if name in options}
    weights: dict[str, dict[str, torch.Tensor]] = {
        name: {key.removeprefix("encoder."): x for key, x in state[name].items() if key.startswith("encoder.")}
        for name in ("teacher", "student")
        if name in state
    }
    return _Stored(state["config"]["model"], run["seed"], weights, training, decoding)


def _read_foreign(
    path: Path, content: dict[str, Any], which: str, overrides: dict[str, Any], answers: Mapping[str, Any] | None
) -> _Stored:
    """A file of others. Its untrained encoder is that of seed 0."""
    kind = "student" if which == "student" else "teacher"
    found = recognize(content, which=kind, given=overrides, answers=answers, source=str(path))
    training = {"epochs": found.epochs, "total_epochs": found.total_epochs}
    answered = {name: value for name, value in found.given.items() if name not in overrides}
    return _Stored(found.options | answered, 0, {kind: found.weights}, training, {}, found)


def _is_export(path: Path) -> bool:
    """Whether a .safetensors file is an export of this tool, or none that can be read, which
    `_read_export` says."""
    try:
        with safe_open(path, "pt") as file:
            return "run" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return (path.parent / "model.json").is_file()


def _read_export(path: Path) -> _Stored:
    """What `export_encoder` wrote; version 0.1 wrote no total_epochs, num_images, images and
    decoding."""
    options = path.parent / "model.json"
    if not (path.is_file() and options.is_file()):
        raise FileNotFoundError(f"{path} needs to exist with model.json beside it: give a checkpoint of a run, or both files")
    saved = read_json(options, {"arch": str, "pool": str, "sha256?": dict}, what="the model.json of an export", remedy=REMEDY)
    digests = saved.pop("sha256", None)
    if note := check_digest(path, digests, remedy="export or copy it again"):
        say(note)
    try:
        with safe_open(path, "pt") as file:
            run = json.loads((file.metadata() or {})["run"])
        weights = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read (truncated, or not of this tool): {error}") from error
    fields: Fields = {
        "seed": int, "epochs?": NUMBER, "total_epochs?": NUMBER, "num_images?": int, "images?": str, "decoding?": dict,
        "init?": dict,
    }  # fmt: skip
    run = require_fields(run, fields, path=path, what="an export of this tool", remedy=REMEDY)
    training = {name: run.get(name) for name in TRAINING}
    return _Stored(saved, run["seed"], {"teacher": weights}, training, run.get("decoding") or {})
