"""DINO pre-training: `train(cfg)` from the first image to the last checkpoint, read from top to bottom.

One step is in step.py. The random state of a step is a function of (seed, step, rank) and that of an image of (seed, epoch,
image, view): a run that stops anywhere goes on exactly, with any number of workers, and the ranks draw different stochastic
depth (in the published code they draw the same).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_simpool import __version__, distributed
from dino_simpool.checkpoint import check_same_run, export_encoder, keep_state, newest_state, save_state
from dino_simpool.config import ConfigError, TrainConfig, dump, to_dict
from dino_simpool.data import (
    EvalTransform,
    ImageSet,
    class_folder,
    default_workers,
    find_images,
    keep_freed_memory,
    read_or_replace,
)
from dino_simpool.data.bad_files import BadFiles
from dino_simpool.data.feed import Feed, build_feed, colors_on_device
from dino_simpool.dino.learner import METRICS, Learner, NonFiniteLoss, build_learner, train_step
from dino_simpool.dino.monitor import effective_rank, feature_spread, non_finite_names, write_failure
from dino_simpool.dino.plan import Plan, make_plan
from dino_simpool.eval.knn import knn_accuracy
from dino_simpool.features.encode import evaluation_mode, try_sizes
from dino_simpool.files import write_atomically
from dino_simpool.logs import RunLog, progress, say
from dino_simpool.models.encoder import Encoder
from dino_simpool.pictures import overlay, strip, unnormalize
from dino_simpool.signals import stop_signals


def train(cfg: TrainConfig) -> Path:
    """Pre-train as configured, or go on where cfg.run.out stopped; returns that folder.

    Under torchrun or in a SLURM job each process calls this. ValueError and OSError say in one line what is wrong with the
    options, the data or the folder, before anything is written. NonFiniteLoss: see OUT/error.txt.
    """
    device = distributed.setup(cfg.run.device)
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    keep_freed_memory()

    # -- what there is to do. Whatever can be wrong is found here, before the first file is written.
    roots = [cfg.data.root] if isinstance(cfg.data.root, str) else list(cfg.data.root)
    decoding: dict[str, Any] = {"max_pixels": cfg.data.max_pixels, "exif_orientation": cfg.data.exif_orientation}
    images = find_images(roots, subset_per_class=cfg.data.subset_per_class).with_decoding(**decoding)
    knn_sets = None
    if cfg.run.knn_train and cfg.run.knn_val:
        knn_sets = (
            class_folder(cfg.run.knn_train).with_decoding(**decoding),
            class_folder(cfg.run.knn_val).with_decoding(**decoding),
        )
    plan = make_plan(cfg, len(images))
    images_of_one_pass = _images_of_one_pass(cfg)
    learner = build_learner(cfg, device, warmup_steps=plan.warmup_steps)
    sizes = {cfg.crops.global_size, cfg.model.image_size} | ({cfg.crops.local_size} if cfg.crops.num_local else set())
    try_sizes(learner.teacher.encoder, sorted(sizes), device=device)
    out = _writable(cfg.run.out)
    saved = newest_state(out, say)
    facts = {"num_images": len(images), "images": images.digest(), "world_size": distributed.world_size()}
    if saved is not None:
        if saved["images"] != facts["images"]:
            raise ConfigError(
                f"{out} was trained on {saved['num_images']} images, now there are {len(images)}, not the same: "
                "give another run.out"
            )
        changes = check_same_run(to_dict(cfg), saved["config"], out)
        learner.load(saved)
        if saved["world_size"] != facts["world_size"]:
            changes.append(f"number of processes: {saved['world_size']} -> {facts['world_size']}")
        if learner.step > plan.total_steps:
            raise ConfigError(
                f"{out} has {learner.step} steps, but run.epochs {cfg.run.epochs} ends at {plan.total_steps}: give more"
            )
        for change in changes:
            say(f"changed since this run was saved: {change}")
    # Nobody writes before everybody has read, and read the same.
    distributed.require_agreement(
        "the images and the step to go on from", (len(images), str(facts["images"])[:8], learner.step)
    )

    # -- what is about to happen, said and written down.
    first, main = learner.step, distributed.is_main()
    workers = default_workers() if cfg.data.workers is None else cfg.data.workers
    say(_announce(cfg, plan, learner, device, workers))
    if main:
        if saved is not None and saved["file"] == "prev.pth":  # what is copied or kept from now on must be the state in use
            (out / "prev.pth").replace(out / "last.pth")
        (out / "error.txt").unlink(missing_ok=True)
        write_atomically(out / "config.yaml", lambda path: path.write_text(dump(cfg)))
    log = RunLog(out, resume_step=first, resume_epoch=_epochs_logged(learner, plan), enabled=main)
    forward: nn.Module = learner.student
    if distributed.world_size() > 1:
        forward = DistributedDataParallel(learner.student, forward_sync_buffers=False, gradient_as_bucket_view=True)

    # -- the loop.
    known = saved.get("bad_files", {}) if saved is not None else {}
    feed = build_feed(
        cfg, images, BadFiles(images, out, max_share=cfg.data.max_bad_share, found=known), batch_size=images_of_one_pass,
        start_step=first, total_steps=plan.total_steps, device=device,
    )  # fmt: skip
    saved_at = time.monotonic()
    bar = progress(plan.total_steps, first, "train", images_per_step=cfg.run.batch_size)
    with bar, stop_signals() as received, _failures_written(out, learner, plan, images, feed):
        if learner.epoch_open:
            _end_epoch(cfg, plan, learner, out, log, images, knn_sets, feed)
        while learner.step < plan.total_steps:
            values = plan.values(learner.step)
            # Stochastic depth of this step, whatever came before it: resuming needs no stored random state.
            torch.manual_seed(((cfg.run.seed * 1_000_003 + learner.step) * 65_537 + distributed.rank()) % 2**63)
            late = time.monotonic() - saved_at > 60 * cfg.run.save_minutes
            _, features, (stop, late) = train_step(
                learner, feed.batches(cfg.run.accumulate), values, forward=forward, accumulate=cfg.run.accumulate,
                clip=cfg.optim.clip, precision=cfg.run.precision, requests=(bool(received), late),
            )  # fmt: skip
            done = learner.step
            bar.update()
            if done == first + 1:
                log.image("crops", strip([unnormalize(view[0], cfg.model.mean, cfg.model.std) for view in feed.views]), done)
            if done == 1 or done % cfg.run.log_every == 0 or done == plan.total_steps:
                _log_step(cfg, learner, plan, features, log, feed, bar)
            learner.epoch_open = done % plan.steps_per_epoch == 0 or done == plan.total_steps
            stop = stop or done == cfg.run.stop_after_steps
            due = cfg.run.save_every_steps and done % cfg.run.save_every_steps == 0
            if learner.epoch_open or stop or due or late:
                _save(cfg, learner, out, facts, feed)
                saved_at = time.monotonic()
            if stop and done < plan.total_steps:
                say(f"stopped after step {done} of {plan.total_steps}; the same command goes on from there")
                break
            if learner.epoch_open:
                _end_epoch(cfg, plan, learner, out, log, images, knn_sets, feed)
        else:
            _save(cfg, learner, out, facts, feed)  # now with the last epoch evaluated
    log.close()
    feed.bad_files.say_total()
    distributed.barrier()
    return out


def _announce(cfg: TrainConfig, plan: Plan, learner: Learner, device: torch.device, workers: int) -> str:
    """What the user reads before step 1."""

    def count(module: nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()):,} parameters"

    place = "on the device" if colors_on_device(cfg, device) else "in the loaders"
    lines = [
        f"dino_simpool {__version__}: {cfg.model.arch} with {cfg.model.pool}, {count(learner.student.encoder)}, "
        f"head {count(learner.student.head)}, {cfg.run.precision} on {device}",
        f"{distributed.world_size()} process(es) x {_images_of_one_pass(cfg)} images x {cfg.run.accumulate} pass(es) = batch "
        f"{cfg.run.batch_size}; {workers} loader worker(s) a process; crops 2 x {cfg.crops.global_size} px + "
        f"{cfg.crops.num_local} x {cfg.crops.local_size} px, coloured {place}",
        plan.table(),
        *(f"warning: {text}" for text in plan.warnings),
        *(f"suggestion: {text}" for text in plan.suggestions),
    ]
    if learner.step:
        lines.append(f"resuming after step {learner.step} of {plan.total_steps}")
    return "\n".join(lines)


def _log_step(cfg: TrainConfig, learner: Learner, plan: Plan, features: Tensor, log: RunLog, feed: Feed, bar: Any) -> None:
    """A line of the log over the steps since the last one, and what the monitor thinks of it."""
    feed.bad_files.gather()
    _, means = learner.take_means(0)
    rows = features.flatten(0, 1).float()
    spread, rank = math.nan, math.nan
    if len(rows) >= 8:  # two views of a handful of images say nothing about a collapse
        measured = torch.tensor([feature_spread(rows), effective_rank(rows)], dtype=learner.sums.dtype, device=rows.device)
        spread, rank = distributed.all_mean(measured).tolist()
    log_k = math.log(cfg.head.out_dim)
    record = {
        "kind": "step", "step": learner.step, "epoch": (learner.step - 1) // plan.steps_per_epoch, "loss": means["loss"],
        "loss_over_lnK": means["loss"] / log_k, "entropy_over_lnK": means["entropy"] / log_k, "kl": means["kl"],
        "grad_norm": means["grad_norm"], "feature_spread": spread, "effective_rank": rank,
        "center_norm": learner.loss.center.norm().item(), "bad_files": len(feed.bad_files.found),
        **dataclasses.asdict(plan.values(learner.step - 1)), **feed.timings("window"),
    }  # fmt: skip
    log.write(record)
    waiting = record["data_wait_percent"]
    bar.set_postfix_str(f"loss/lnK {record['loss_over_lnK']:.3f}, data wait {waiting:.0f} %")
    if waiting > 10 and record["seconds"] > 10 and not feed.warned:
        feed.warned = True
        say(f"warning: {waiting:.0f} % of the time went into waiting for images: {feed.advice(cfg)}")
    for warning in learner.monitor.update(
        loss=means["loss"], entropy=means["entropy"], out_dim=cfg.head.out_dim, spread=spread, step=learner.step
    ):
        say(f"warning: {warning}")


def _end_epoch(
    cfg: TrainConfig,
    plan: Plan,
    learner: Learner,
    out: Path,
    log: RunLog,
    images: ImageSet,
    knn_sets: tuple[ImageSet, ImageSet] | None,
    feed: Feed,
) -> None:
    """Evaluate the teacher if it is time, write the epoch's line, keep what is to be kept. Its steps are saved already."""
    epoch = (learner.step - 1) // plan.steps_per_epoch
    started = time.monotonic()
    steps, means = learner.take_means(1)
    values = [plan.values(step) for step in range(learner.step - steps, learner.step)]
    record: dict[str, Any] = {
        "kind": "epoch", "step": learner.step, "epoch": epoch, "train_loss": means["loss"], "train_entropy": means["entropy"],
        "train_KL_div": means["kl"], "train_lr": sum(v.lr for v in values) / steps,
        "train_wd": sum(v.weight_decay for v in values) / steps, "train_momentum": sum(v.momentum for v in values) / steps,
        "train_teacher_temp": values[0].teacher_temperature, "train_grad_norm": means["grad_norm"],
        "bad_files": len(feed.bad_files.found),
    }  # fmt: skip
    last = learner.step == plan.total_steps
    due = cfg.run.knn_every > 0 and (epoch % cfg.run.knn_every == 0 or last)
    encoder, device, model = learner.teacher.encoder, learner.sums.device, cfg.model
    transform = EvalTransform(model.image_size, resize=model.resize, mean=model.mean, std=model.std)
    if due and distributed.is_main():
        shown = knn_sets[1] if knn_sets is not None else images
        log.image("attention", _attention_strip(encoder, shown, transform, device), learner.step)
    if due and knn_sets is not None:
        record["k-NN"] = knn_accuracy(
            encoder, *knn_sets, transform=transform, batch_size=128, workers=cfg.data.workers, device=device, skip_broken=True
        )
        top1 = record["k-NN"]["10"]["top1"]
        say(f"epoch {epoch}: k-NN (k = 10) {top1:.2f} %")
        if top1 > learner.best:
            learner.best = top1
            if distributed.is_main():
                keep_state(out, "best.pth")
    if distributed.is_main():
        export_encoder(out, encoder, seed=cfg.run.seed, epochs=learner.step / plan.steps_per_epoch)
        if cfg.run.keep_every and (epoch + 1) % cfg.run.keep_every == 0:
            keep_state(out, f"epoch_{epoch + 1:04d}.pth")
    timings = feed.timings("epoch")
    record |= {
        "img_per_s": timings["images_per_second"], "data_time": timings["data_wait_percent"],
        "knn_time": time.monotonic() - started, "max_mem": timings["max_memory_mb"],
    }  # fmt: skip
    log.write(record)
    learner.epoch_open = False


@torch.no_grad()
def _attention_strip(encoder: Encoder, images: ImageSet, transform: EvalTransform, device: torch.device) -> Tensor:
    """Eight images, evenly spread over the set, each above its attention: (3, H, W) in 0..1."""
    chosen = [int(i) for i in torch.linspace(0, len(images) - 1, min(8, len(images)))]
    pixels = torch.stack([transform(read_or_replace(images.read, i, total=len(images), seed=0, epoch=0)[0]) for i in chosen])
    shown = unnormalize(pixels, transform.mean, transform.std)
    try:
        with evaluation_mode(encoder):
            attention = encoder.attention(pixels.to(device)).cpu()
    except ValueError as error:  # the class token of an unusual block has no attention to show, and the training needs none
        say(f"no attention maps: {error}")
        return strip(list(shown))
    return torch.cat([strip(list(shown)), strip([overlay(image, a) for image, a in zip(shown, attention, strict=True)])], dim=1)


def _save(cfg: TrainConfig, learner: Learner, out: Path, facts: dict[str, Any], feed: Feed) -> None:
    """Write last.pth with the facts of the run, unless a weight of the student is not finite: then the last good one stays."""
    feed.bad_files.gather()
    sums = distributed.all_mean(learner.sums)  # of all processes: each goes on from the mean, and the next mean is the same
    if not torch.stack(torch._foreach_norm(list(learner.student.parameters()))).isfinite().all():  # equal in all processes
        raise NonFiniteLoss(f"a weight of the student is not finite after step {learner.step}; {out}/last.pth is from before")
    if not distributed.is_main():
        return
    versions = {"dino_simpool": __version__, "torch": str(torch.__version__), "python": sys.version.split()[0]}
    facts = {**facts, "versions": versions, "bad_files": feed.bad_files.found}
    save_state(out, {"config": to_dict(cfg), **facts, **learner.state(), "sums": sums.cpu()})


@contextlib.contextmanager
def _failures_written(out: Path, learner: Learner, plan: Plan, images: ImageSet, feed: Feed) -> Iterator[None]:
    """On NonFiniteLoss write OUT/error.txt: the step, its schedules, its images, which weights and gradients are not finite."""
    try:
        yield
    except NonFiniteLoss as error:
        paths = distributed.gather_objects([images.path(i) for i in feed.indices])  # all processes raise it together
        if distributed.is_main():
            write_failure(out / "error.txt", _failure(learner, plan, paths, error))
        raise


def _failure(learner: Learner, plan: Plan, paths: list[list[str]], error: NonFiniteLoss) -> dict[str, Any]:
    """What is known when the training stops."""
    return {
        "error": str(error), "step": learner.step + 1, "epoch": learner.step // plan.steps_per_epoch,
        "not_finite": non_finite_names(learner.student),
        "schedules": dataclasses.asdict(plan.values(learner.step)), "images_of_each_process": paths,
        "sums_since_the_last_log_line": dict(zip(("steps", *METRICS), learner.sums[0].tolist(), strict=True)),
    }  # fmt: skip


def _writable(folder: str) -> Path:
    """The folder of the run, made if it is not there. OSError or ConfigError if nothing can be written into it."""
    if not folder:
        raise ConfigError("run.out is empty: give the folder of this run")
    out = Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"nothing can be written to {out} ({error.strerror}): give another run.out") from None
    return out


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


def _epochs_logged(learner: Learner, plan: Plan) -> int:
    """Epochs whose line is in the log."""
    if learner.step == plan.total_steps:
        return plan.epochs - learner.epoch_open
    return learner.step // plan.steps_per_epoch - learner.epoch_open
