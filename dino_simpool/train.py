"""Pre-training: `train(cfg)` from the first image to the last checkpoint, read from top to bottom.

What is trained, and how, is the learner's business (learners.py). The random state of a step is a
function of (seed, step, rank), and that of an image a function of (seed, epoch, image, view). So a
run that stops anywhere is resumed exactly, with any number of workers, and the ranks draw different
stochastic depth (in the published code they draw the same).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dino_simpool import __version__, distributed
from dino_simpool.checkpoint import RESUMED, check_same_run, export_encoder, keep_state, newest_state, read_state, save_state
from dino_simpool.config import ConfigError, TrainConfig, dump, from_dict, to_dict
from dino_simpool.data import (
    EvalTransform,
    ImageSet,
    default_workers,
    evenly,
    find_images,
    keep_freed_memory,
    labeled_sets,
    read_or_replace,
)
from dino_simpool.data.bad_files import BadFiles
from dino_simpool.data.feed import Feed, build_feed, colors_on_device
from dino_simpool.data.loaders import epoch_order
from dino_simpool.data.value_range import narrow_range, shorter_sides, used_range, with_range_of
from dino_simpool.dino.plan import jump, make_plan, small_images
from dino_simpool.eval.knn import knn_accuracy
from dino_simpool.failures import MISSING_COMPILER, NonFiniteLoss, non_finite_names, norms_by_module, plain, write_failure
from dino_simpool.features.encode import Forward, try_sizes
from dino_simpool.features.maps import attention_of
from dino_simpool.files import make_writable, require_fields, write_atomically, write_json
from dino_simpool.learners import Learner, build_learner, read_start
from dino_simpool.lock import Lock, locked
from dino_simpool.logs import RunLog, progress, say, writer_errors_raised_once
from dino_simpool.models.weights import weights_sha256
from dino_simpool.names import shown
from dino_simpool.pictures import overlay, strip, unnormalize
from dino_simpool.results import overlap_note
from dino_simpool.signals import KINDS, Stopped, job_ends_soon, stop_after_the_step

FALL = 3.0
"""Points of k-NN accuracy below the start of a run from run.init that are warned about."""
KEPT = "before_nan.pth"
"""The last checkpoint from before bad steps, kept while they go on, and if they end the run."""
WINDOW, EPOCH = 0, 1
"""The spans over which metrics are averaged: since the last log line, and since the epoch began."""


class Means:
    """Running sums of a learner's metrics over both spans: (2, 1 + metrics), steps first."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(2, 1 + len(names), dtype=distributed.exact_dtype(device), device=device)

    @torch.no_grad()
    def add(self, metrics: dict[str, Tensor]) -> None:
        """Count one step."""
        assert tuple(metrics) == self.names
        self.sums += torch.cat([self.sums.new_ones(1), torch.stack(list(metrics.values())).to(self.sums.dtype)])

    def take(self, span: int) -> tuple[int, dict[str, float]]:
        """Steps of a span and the means over all processes; the span starts again."""
        steps, *sums = distributed.all_mean(self.sums[span]).tolist()
        self.sums[span] = 0
        return int(steps), {name: value / steps for name, value in zip(self.names, sums, strict=True)}


class StepResult:
    """Whether a step was bad, on its way from the device, and the norms of its gradients."""

    def __init__(self, step: int, bad: Tensor, norms: tuple[list[str], Tensor]) -> None:
        self.step, self.norms = step, norms
        self._bad = bad.to("cpu", non_blocking=True)
        self._arrived = None if bad.device.type == "cpu" else torch.Event(bad.device)
        if self._arrived is not None:
            self._arrived.record()

    def bad(self) -> bool:
        """The answer. It is waited for until the step has ended, but not what was queued since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._bad)


@dataclasses.dataclass
class Run:
    """A run in progress: its options, what it trains, and where it writes."""

    cfg: TrainConfig
    device: torch.device
    images: ImageSet
    knn_sets: tuple[ImageSet, ImageSet] | None
    """Bank and held-out images of the k-NN evaluation, if there is one."""
    learner: Learner
    out: Path
    facts: dict[str, Any]
    """About data, processes and length, for the checkpoint: num_images, images (digest), decoding
    (with numbers for a value range `data`), world_size, total_steps; init: the weights that it
    started from (`read_start`), with their k-NN accuracy in %, or None."""
    means: Means
    epoch_open: bool = False
    """All steps of the last epoch are done, but it is not yet evaluated and logged."""
    best: float = -1.0
    """Highest k-NN accuracy so far, in %."""
    unread: StepResult | None = None
    """Of the last step, read after the next one is queued, or before anything is written."""
    bad_steps: list[int] = dataclasses.field(default_factory=list)
    """Numbers of the last steps in a row that were bad, up to the last one read."""
    first_bad: StepResult | None = None
    """Of the first of them, since this start."""
    back_to: int | None = None
    """The step of the checkpoint that the run went back to because of bad steps."""
    lock: Lock | None = None
    """That of the folder, in the main process."""
    log: RunLog = dataclasses.field(init=False)
    feed: Feed = dataclasses.field(init=False)

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.learner.steps == self.learner.plan.total_steps


def train(cfg: TrainConfig) -> Path:
    """Pre-train as configured, or resume what is in cfg.run.out. Returns that folder.

    Under torchrun or in a SLURM job each process calls this. ValueError and OSError say in one line
    what is wrong with the options, the data or the folder, before anything is written.
    NonFiniteLoss, UnequalGradients: see OUT/error.txt. Stopped if a signal stopped it, or the end
    of its SLURM job was near; the state is saved. A stop that was asked for (run.stop_after_steps,
    run.max_minutes) returns.
    """
    started = time.monotonic()
    run = _prepare(cfg)
    with writer_errors_raised_once(), locked(run.out) if distributed.is_main() else contextlib.nullcontext() as run.lock:
        return _train(run, _load(run), started)


def _train(run: Run, saved: dict[str, Any], started: float) -> Path:
    """From the saved state, empty for a new run, to the end or a stop.

    started: time.monotonic() at the start of the process's work.
    """
    cfg = run.cfg
    learner, plan, first = run.learner, run.learner.plan, run.learner.steps
    say(_announce(run))
    if distributed.is_main():
        if saved.get("file") == "prev.pth":  # what is copied or kept from now on must be the state in use
            (run.out / "prev.pth").replace(run.out / "last.pth")
        for name in ("error.txt", "nan_report.json"):
            (run.out / name).unlink(missing_ok=True)
        write_atomically(run.out / "config.yaml", lambda path: path.write_text(dump(cfg)))
    _open(run, saved)
    if run.facts["init"] and not saved:
        _log_start(run)
        _save(run)  # from now on the run does not need the file
    now = saved_at = time.monotonic()
    stop, number = False, 0
    bar = progress(plan.total_steps, first, "train", images_per_step=cfg.run.batch_size)
    with bar, stop_after_the_step() as signals, _failures_written(run):
        if run.epoch_open:
            _end_epoch(run)
        while not (run.done or stop):
            before, now = now, time.monotonic()
            ends_soon = job_ends_soon(margin=60 + 2 * (now - before))  # a step, and a minute to save
            asked = (
                len(KINDS) if ends_soon else signals.strongest(),
                now - saved_at > 60 * cfg.run.save_minutes,
                cfg.run.max_minutes is not None and now - started > 60 * cfg.run.max_minutes,
            )
            # Stochastic depth depends on the step alone: resuming needs no stored random state.
            torch.manual_seed(((cfg.run.seed * 1_000_003 + learner.steps) * 65_537 + distributed.rank()) % 2**63)
            metrics = learner.step(run.feed.batches(cfg.run.accumulate), plan.values(learner.steps))
            run.means.add(metrics)
            bar.update()
            bad_before = run.unread is not None and run.unread.bad()
            number, late, ended, bad = distributed.largest_of_all(*asked, bad_before)
            _count(run, bad)
            done = learner.steps
            run.unread = StepResult(done, metrics["bad_step"], learner.norms)
            if done == first + 1:
                views = [unnormalize(view[0], cfg.model.mean, cfg.model.std) for view in run.feed.views]
                run.log.image("crops", strip(views), done)
            logs = done == 1 or done % cfg.run.log_every == 0 or run.done
            run.epoch_open = done % plan.steps_per_epoch == 0 or run.done
            stop = bool(number or ended or done == cfg.run.stop_after_steps) and not run.done
            due = cfg.run.save_every_steps and done % cfg.run.save_every_steps == 0
            saves = run.epoch_open or stop or due or late
            if logs or saves:
                _count(run, *distributed.largest_of_all(run.unread.bad()))
            hopeless = saves and run.bad_steps and not _weights_are_finite(run)  # no later step would be better
            if len(run.bad_steps) >= cfg.run.max_bad_steps or hopeless:
                _go_back(run)
                bar.update(learner.steps - done)
                continue
            if logs:
                _log_step(run, bar)
            if saves:
                _save(run)
                saved_at = time.monotonic()
            if run.epoch_open and not stop:
                _end_epoch(run)
        if not stop:
            _save(run)  # now with the last epoch evaluated
            if distributed.is_main():
                (run.out / KEPT).unlink(missing_ok=True)
        run.log.close()
        run.feed.bad_files.say_total()
        distributed.barrier()
        if stop and number:
            signals.call_handler_before(KINDS[number - 1])
            raise Stopped(KINDS[number - 1], learner.steps, plan.total_steps)
    if stop:
        say(f"the run is unfinished, after step {learner.steps} of {plan.total_steps}: run the same command again to resume")
    return run.out


def _open(run: Run, saved: dict[str, Any]) -> None:
    """The log and the images, from the learner's step on. saved: the state it is in, or empty."""
    cfg, plan, first = run.cfg, run.learner.plan, run.learner.steps
    logged = (plan.epochs if run.done else first // plan.steps_per_epoch) - run.epoch_open  # epochs with a line
    run.log = RunLog(run.out, resume_step=first, resume_epoch=logged, enabled=distributed.is_main())
    run.feed = build_feed(
        cfg,
        BadFiles(run.images, run.out, max_share=cfg.data.max_bad_share, found=saved.get("bad_files", {})),
        batch_size=_images_of_one_pass(cfg),
        start_step=first,
        total_steps=plan.total_steps,
        device=run.device,
    )


def _prepare(cfg: TrainConfig) -> Run:
    """The run, at its beginning. What can be wrong is found here, before the folder is made."""
    device = distributed.setup(cfg.run.device)
    distributed.require_same_options(to_dict(cfg))
    if cfg.run.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise ConfigError(MISSING_COMPILER)
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    keep_freed_memory()
    roots = [cfg.data.root] if isinstance(cfg.data.root, str) else list(cfg.data.root)
    images = find_images(roots, cfg.data.excluded, subset_per_class=cfg.data.subset_per_class)
    decoding = with_range_of(images, cfg.data.decoding)
    images = images.with_decoding(decoding)
    knn_sets = None
    if cfg.run.knn_train and cfg.run.knn_val:
        bank, val = labeled_sets(
            cfg.run.knn_train,
            cfg.run.knn_val,
            options=("--run.knn_train", "--run.knn_val"),
            exclude=cfg.data.excluded,
            subset_per_class=cfg.run.knn_subset_per_class,
        )
        knn_sets = bank.with_decoding(decoding), val.with_decoding(decoding)
    _images_of_one_pass(cfg)
    start, init = read_start(cfg) if cfg.run.init and not cfg.run.resumes else (None, None)
    learner = build_learner(cfg, images, device, start)
    learner.encoder.decoding = decoding
    sizes = {cfg.crops.global_size, cfg.model.image_size} | ({cfg.crops.local_size} if cfg.crops.num_local else set())
    try_sizes(learner.encoder, sorted(sizes))
    if not cfg.run.out:
        raise ConfigError("run.out is empty: give the folder of this run")
    out = make_writable(Path(cfg.run.out), "run.out")
    facts: dict[str, Any] = {
        "num_images": len(images),
        "images": images.digest(),
        "decoding": to_dict(decoding),
        "world_size": distributed.world_size(),
        "total_steps": learner.plan.total_steps,
        "init": init,
    }
    return Run(cfg, device, images, knn_sets, learner, out, facts, Means(learner.metrics, device))


def _load(run: Run) -> dict[str, Any]:
    """The state that the run goes on from, loaded; empty for a new run."""
    if distributed.is_main():
        for file in (*run.out.glob(".*.tmp"), run.out / ".last.pth.new"):  # of processes that were killed
            file.unlink(missing_ok=True)
    saved = newest_state(run.out, say) or {}
    if saved:
        _resume(run, saved)
    # No process writes until all have read, and have read the same.
    weights = weights_sha256(run.learner.network)[:8] if (saved or run.facts["init"]) and distributed.world_size() > 1 else ""
    what = "the images, and the step and the weights to go on from"
    distributed.require_agreement(what, (len(run.images), run.facts["images"][:8], run.learner.steps, weights))
    return saved


def _resume(run: Run, saved: dict[str, Any]) -> None:
    """Load a stored state, and say what has changed since. ConfigError if it is of another run."""
    require_fields(saved, RESUMED, path=run.out / saved["file"], what="a training state", remedy="give another run.out")
    if saved["images"] != run.facts["images"]:
        raise ConfigError(
            f"{run.out} was trained on {saved['num_images']} images, now there are {len(run.images)}, not the same: "
            "give another run.out"
        )
    changes = check_same_run(to_dict(run.cfg), saved["config"], run.out)
    try:
        run.learner.load(saved)
        sums = saved["sums"]
        run.means.sums[:, : sums.shape[1]].copy_(sums)  # version 0.1 did not count skipped steps
        before, now = (facts["decoding"]["value_range"] for facts in (run.facts | saved, run.facts))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{run.out}/{saved['file']} does not fit this run ({said}): give another run.out") from error
    run.epoch_open, run.best, run.facts["init"] = saved["epoch_open"], saved["best"], saved.get("init")
    run.bad_steps = list(saved.get("bad_steps", []))  # version 0.1 stopped at one
    if before != now:  # perhaps of other files with the same names
        changes.append(f"value range of the images: {before} -> {now}")
    if saved["world_size"] != run.facts["world_size"]:
        changes.append(
            f"number of processes: {saved['world_size']} -> {run.facts['world_size']}; each step has the "
            f"{run.cfg.run.batch_size} images that it would have had, but stochastic depth draws others and sums are rounded "
            "otherwise"
            + ("; the minimum of model.min_over batch is over other images" if run.cfg.model.min_over == "batch" else "")
        )
    steps, total = run.learner.steps, run.learner.plan.total_steps
    if steps > total:
        raise ConfigError(f"{run.out} has {steps} steps, but run.epochs {run.cfg.run.epochs} ends at {total}: give more")
    for change in changes:
        say(f"changed since this run was saved: {change}")
    if changes and steps:
        before = make_plan(from_dict(TrainConfig, saved["config"]), saved["num_images"])
        if advice := jump(before, run.learner.plan, steps):
            say(f"warning: {advice}")


def _announce(run: Run) -> str:
    """What the user reads before step 1."""
    cfg, plan = run.cfg, run.learner.plan
    workers = default_workers() if cfg.data.workers is None else cfg.data.workers
    advice = ""
    if distributed.is_main() and cfg.data.value_range == "full":
        advice = narrow_range(used_range(run.images, share=1, most=16), "data.value_range")
    sides = shorter_sides(run.images, most=16) if distributed.is_main() else []
    place = "on the device" if colors_on_device(cfg, run.device) else "in the loaders"
    lines = [
        f"dino_simpool {__version__}: {run.learner.describe()}, {cfg.run.precision} on {run.device}",
        f"{distributed.world_size()} process(es) x {_images_of_one_pass(cfg)} images x {cfg.run.accumulate} pass(es) = batch "
        f"{cfg.run.batch_size}; {workers} loader worker(s) per process; crops 2 x {cfg.crops.global_size} px + "
        f"{cfg.crops.num_local} x {cfg.crops.local_size} px, colors made {place}",
        plan.table(),
        *(f"warning: {text}" for text in plan.warnings),
        *(f"suggestion: {text}" for text in plan.suggestions),
        *(f"warning: {text}" for text in (advice, small_images(sides, cfg)) if text),
    ]
    if run.learner.steps or (cfg.run.init and cfg.run.resumes):
        again = f"; run.init {cfg.run.init} is not read again" * bool(cfg.run.init)
        lines.append(f"resuming after step {run.learner.steps} of {plan.total_steps}{again}")
    return "\n".join(lines)


def _log_step(run: Run, bar: tqdm[Any]) -> None:
    """A log line over the steps since the last one, and warnings if something looks wrong."""
    learner, feed = run.learner, run.feed
    _require_folder(run)
    feed.bad_files.gather()
    _, means = run.means.take(WINDOW)
    fields, warnings = learner.watch(means)
    record: dict[str, Any] = {
        "kind": "step",
        "step": learner.steps,
        "epoch": (learner.steps - 1) // learner.plan.steps_per_epoch,
        **fields,
        "bad_files": len(feed.bad_files.found),
        **dataclasses.asdict(learner.plan.values(learner.steps - 1)),
        **feed.timings("window"),
    }
    if run.facts["init"] is None:  # nothing to freeze: the fields of such runs stay those of version 0.1
        record.pop("freeze_encoder", None)
    run.log.write(record)
    waiting = record["data_wait_percent"]
    shown = learner.shown.replace("_over_", "/")
    bar.set_postfix_str(f"{shown} {record[learner.shown]:.3f}, data wait {waiting:.0f} %")
    if waiting > 10 and record["seconds"] > 10 and not feed.warned:
        feed.warned = True
        say(f"warning: {waiting:.0f} % of the time was spent waiting for images: {feed.advice(run.cfg)}")
    for warning in warnings:
        say(f"warning: {warning}")


def _count(run: Run, bad: bool | int) -> None:
    """Take note of the step in run.unread. bad: whether it was, in any process."""
    result, run.unread = run.unread, None
    if result is None or not (bad or run.bad_steps):
        return
    if distributed.is_main() and not (bad and run.bad_steps):  # the first bad step, or a good one again
        (run.out / KEPT).unlink(missing_ok=True)
    if not bad:
        run.bad_steps, run.first_bad = [], None
        return
    run.bad_steps.append(result.step)
    run.first_bad = run.first_bad or result
    names = [run.images.name(i) for i in _images_of(run, result.step)]
    epoch = (result.step - 1) // run.learner.plan.steps_per_epoch
    run.log.write({"kind": "skipped", "step": result.step, "epoch": epoch, "files": names})
    more = f" and {len(names) - 16} more (log.jsonl)" if len(names) > 16 else ""
    say(
        f"warning: step {result.step} was left out, because its loss or gradients are not finite; its images: "
        f"{', '.join(map(shown, names[:16]))}{more}"
    )


def _images_of(run: Run, step: int) -> list[int]:
    """Numbers of the images of a step (from 1 on), over all processes."""
    batch = run.cfg.run.batch_size
    epoch, position = divmod(step - 1, run.learner.plan.steps_per_epoch)
    order = epoch_order(len(run.images), seed=run.cfg.run.seed, epoch=epoch)
    return order[position * batch : (position + 1) * batch].tolist()


def _go_back(run: Run) -> None:
    """To the last checkpoint from before the bad steps, or to the start of a run without one.

    NonFiniteLoss, with OUT/nan_report.json, if the run has been there already.
    """
    bad, kept, last = run.bad_steps, run.out / KEPT, run.out / "last.pth"
    if distributed.is_main() and last.exists() and not kept.exists():
        keep_state(run.out, KEPT)
    distributed.barrier()
    [there] = distributed.largest_of_all(kept.exists())
    saved = {**read_state(kept), "file": KEPT} if there else {}
    if saved and saved["step"] == run.back_to:
        if distributed.is_main():
            write_json(run.out / "nan_report.json", plain(_report(run)))
        raise NonFiniteLoss(
            f"loss or gradients of {len(bad)} step(s) in a row from {bad[0]} on are not finite, also after going back to step "
            f"{run.back_to}: {run.out}/nan_report.json says more, and has a command that repeats such a step"
        )
    run.log.close()
    if saved:
        _resume(run, saved)
    else:
        run.learner.load(build_learner(run.cfg, run.images, run.device).state())
        run.means.sums.zero_()
        run.epoch_open, run.best = False, -1.0
    run.back_to, run.unread, run.bad_steps, run.first_bad = run.learner.steps, None, [], None
    _open(run, saved)
    distributed.barrier()  # all have read it
    if saved and distributed.is_main():
        kept.replace(last)
    run.log.write({"kind": "restored", "step": run.back_to, "bad_steps": bad})
    say(f"warning: after {len(bad)} bad step(s) in a row, {bad[0]} to {bad[-1]}, the run goes back to step {run.back_to}")
    if not saved:
        _save(run)
    if run.epoch_open:
        _end_epoch(run)


def _report(run: Run) -> dict[str, Any]:
    """The first of the bad steps in a row, and the command that repeats it from OUT/KEPT."""
    assert run.first_bad is not None, "a step of this start was bad"
    step, plan = run.first_bad.step, run.learner.plan
    names, norms = run.first_bad.norms
    folder = run.out / "nan_step"
    options = ["train", "--config", run.out / "config.yaml", "--run.out", folder, "--run.stop_after_steps", step]
    copy = f"mkdir -p {shlex.quote(str(folder))} && cp {shlex.quote(str(run.out / KEPT))} {shlex.quote(str(folder))}/last.pth"
    return {
        "step": step,
        "epoch": (step - 1) // plan.steps_per_epoch,
        "bad_steps": run.bad_steps,
        "files": [run.images.path(i) for i in _images_of(run, step)],
        "gradient_norms": norms_by_module(names, norms.tolist()),
        "not_finite": non_finite_names(run.learner.network)["parameters"],
        "schedules": dataclasses.asdict(plan.values(step - 1)),
        "processes": distributed.world_size(),
        "checkpoint": str(run.out / KEPT),
        "checkpoint_step": run.back_to,
        "command": f"{copy} && {_program()} {shlex.join(map(str, options))}",
    }


def _program() -> str:
    """What starts as many processes as this run has, with `train ...` behind it. On several nodes
    it is to be started on each of them; they meet on the first one."""
    size, here = distributed.world_size(), distributed.local_world_size()
    if size == 1:
        return "dino-simpool"
    nodes = ""
    if size > here:
        first = os.environ.get("MASTER_ADDR", "HOST")
        nodes = f"--nnodes {size // here} --rdzv_backend c10d --rdzv_endpoint {first}:29400 --rdzv_id nan_step "
    return f"torchrun {nodes}--nproc_per_node {here} -m dino_simpool"


def _log_start(run: Run) -> None:
    """The line of a run from run.init before its first step: what it starts from, and its k-NN."""
    record: dict[str, Any] = {"kind": "start", "step": 0, **run.facts["init"]}
    if run.knn_sets is not None:
        transform = _eval_transform(run)
        found = knn_accuracy(
            run.learner.encoder, *run.knn_sets, Forward(transform, 128, run.cfg.data.workers), skip_broken=True
        )
        record["k-NN"] = found.percent
        run.facts["init"]["knn"] = top1 = found.percent["10"]["top1"]
        say(f"start: k-NN (k = 10) {top1:.2f} %, of {run.cfg.run.init}")
    run.log.write(record)


def _eval_transform(run: Run) -> EvalTransform:
    """What the images of evaluations go through."""
    model = run.cfg.model
    return EvalTransform(model.image_size, resize=model.resize, mean=model.mean, std=model.std)


def _end_epoch(run: Run) -> None:
    """Evaluate if it is due, write the epoch's line, and keep checkpoints. Its steps are saved."""
    cfg, learner, plan, encoder = run.cfg, run.learner, run.learner.plan, run.learner.encoder
    epoch = (learner.steps - 1) // plan.steps_per_epoch
    started = time.monotonic()
    steps, means = run.means.take(EPOCH)
    values = [plan.values(step) for step in range(learner.steps - steps, learner.steps)]
    record: dict[str, Any] = {
        "kind": "epoch",
        "step": learner.steps,
        "epoch": epoch,
        **learner.epoch_fields(means, values),
        "bad_files": len(run.feed.bad_files.found),
    }
    due = cfg.run.knn_every > 0 and (epoch % cfg.run.knn_every == 0 or run.done)
    transform = _eval_transform(run)
    if due and distributed.is_main():
        shown = run.knn_sets[1] if run.knn_sets is not None else run.images
        run.log.image("attention", _attention_strip(run, shown, transform), learner.steps)
    if due and run.knn_sets is not None:
        found = knn_accuracy(encoder, *run.knn_sets, Forward(transform, 128, cfg.data.workers), skip_broken=True)
        record["k-NN"] = found.percent
        top1, balanced = (found.percent["10"][name] for name in ("top1", "balanced"))
        shared = overlap_note(found.overlap)
        say(f"epoch {epoch}: k-NN (k = 10) {top1:.2f} %, balanced {balanced:.2f} %{f'; warning: {shared}' if shared else ''}")
        first = (run.facts["init"] or {}).get("knn")
        if first is not None and top1 < first - FALL:
            say(
                f"warning: k-NN is {first - top1:.1f} points below the {first:.2f} % of the start: lower optim.lr, or raise "
                "teacher.momentum or optim.freeze_encoder"
            )
        if top1 > run.best:
            run.best = top1
            if distributed.is_main():
                keep_state(run.out, "best.pth")
    if distributed.is_main():
        data = {name: run.facts[name] for name in ("num_images", "images", "init")}
        epochs, total = (steps / plan.steps_per_epoch for steps in (learner.steps, plan.total_steps))
        export_encoder(run.out, encoder, seed=cfg.run.seed, epochs=epochs, total_epochs=total, **data)
        if cfg.run.keep_every and (epoch + 1) % cfg.run.keep_every == 0:
            keep_state(run.out, f"epoch_{epoch + 1:04d}.pth")
    timings = run.feed.timings("epoch")
    record |= {
        "img_per_s": timings["images_per_second"],
        "data_time": timings["data_wait_percent"],
        "knn_time": time.monotonic() - started,
        "max_mem": timings["max_memory_mb"],
    }
    run.log.write(record)
    run.epoch_open = False


def _attention_strip(run: Run, images: ImageSet, transform: EvalTransform) -> Tensor:
    """Eight images, evenly spread over the set, each above its attention: (3, H, W) in 0..1."""
    chosen = evenly(len(images), 8).tolist()
    pixels = torch.stack([transform(read_or_replace(images.read, i, total=len(images), seed=0, epoch=0)[0]) for i in chosen])
    shown = unnormalize(pixels, transform.mean, transform.std)
    try:
        attention = attention_of(run.learner.encoder, pixels, names=[images.name(i) for i in chosen])
    except ValueError as error:  # a pooling or block without attention to show; training needs none
        say(f"no attention maps: {error}")
        return strip(list(shown))
    return torch.cat([strip(list(shown)), strip([overlay(image, a) for image, a in zip(shown, attention, strict=True)])], dim=1)


def _save(run: Run) -> None:
    """Write last.pth, unless a trained weight is not finite: then the last good file stays."""
    run.feed.bad_files.gather()
    sums = distributed.all_mean(run.means.sums)  # each process resumes from the mean, and the next mean is the same
    if not _weights_are_finite(run):
        raise NonFiniteLoss(f"a weight is not finite after step {run.learner.steps}; {run.out}/last.pth is from before")
    if not distributed.is_main():
        return
    _require_folder(run)
    versions = {"dino_simpool": __version__, "torch": str(torch.__version__), "python": sys.version.split()[0]}
    state = {
        "config": to_dict(run.cfg),
        **run.facts,
        "versions": versions,
        "bad_files": run.feed.bad_files.found,
        **run.learner.state(),
        "epoch_open": run.epoch_open,
        "best": run.best,
        "bad_steps": run.bad_steps,
        "sums": sums.cpu(),
    }
    if run.bad_steps and (run.out / "last.pth").exists() and not (run.out / KEPT).exists():
        keep_state(run.out, KEPT)  # the one from before the bad steps
    save_state(run.out, state)


def _weights_are_finite(run: Run) -> bool:
    """Whether all trained weights are; the answer is the same in all processes."""
    weights: list[Tensor] = list(run.learner.network.parameters())
    return bool(torch.stack(torch._foreach_norm(weights)).isfinite().all())


def _require_folder(run: Run) -> None:
    """BlockingIOError if the folder was removed, or taken by another run."""
    if run.lock is not None and run.lock.lost():
        raise BlockingIOError(f"{run.lock.path} is gone or names another run: this one ends without saving over it")


@contextlib.contextmanager
def _failures_written(run: Run) -> Iterator[None]:
    """Append to OUT/error.txt what ends the run: where, when, and the traceback.

    For NonFiniteLoss the main process writes: step, schedules, images, and what is not finite; for
    bad steps it is the content of nan_report.json. Any other error is written by each process that
    it ends, so the first line is of the first.
    """
    try:
        yield
    except NonFiniteLoss as error:
        paths = distributed.gather_objects([run.images.path(i) for i in run.feed.indices])  # all processes raise it together
        if distributed.is_main():
            steps, plan = run.learner.steps, run.learner.plan
            record = {
                "step": steps + 1,
                "epoch": steps // plan.steps_per_epoch,
                "not_finite": non_finite_names(run.learner.network),
                "schedules": dataclasses.asdict(plan.values(steps)),
                "images_of_each_process": paths,
                "sums_since_the_last_log_line": dict(
                    zip(("steps", *run.means.names), run.means.sums[WINDOW].tolist(), strict=True)
                ),
            }
            if run.bad_steps:
                record = _report(run)
            write_failure(run.out / "error.txt", {"error": str(error), **record})
        raise
    except Exception as error:
        record = {
            "error": f"{type(error).__name__}: {error}",
            "process": distributed.rank(),
            "host": socket.gethostname(),
            "step": run.learner.steps + 1,
            "traceback": traceback.format_exc().splitlines(),
        }
        with contextlib.suppress(OSError):  # the folder may be the reason
            write_failure(run.out / "error.txt", record)
        raise


def _images_of_one_pass(cfg: TrainConfig) -> int:
    """Images in one forward pass of one process."""
    parts = distributed.world_size() * cfg.run.accumulate
    if cfg.run.batch_size % parts:
        lower = cfg.run.batch_size // parts * parts
        raise ConfigError(
            f"run.batch_size {cfg.run.batch_size} cannot be split over {distributed.world_size()} process(es) x "
            f"{cfg.run.accumulate} accumulation step(s): use {f'{lower} or ' if lower else ''}{lower + parts}"
        )
    return cfg.run.batch_size // parts
