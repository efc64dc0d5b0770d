"""Words that other tools (DINO, timm, Lightning, solo-learn) use for an option, and ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

SAME: dict[str, tuple[str, ...]] = {
    "model.arch": ("arch", "architecture", "backbone", "encoder", "model_name", "model_arch", "net"),
    "model.drop_path": ("drop_path_rate", "stochastic_depth"),
    "model.patch_size": ("patch", "vit_patch_size"),
    "model.width": ("embed_dim", "hidden_size"),
    "model.pool": ("global_pool", "pooling"),
    "crops.global_size": ("img_size", "image_size", "input_size", "crop_size", "global_crops_size", "resolution", "imgsz"),
    "model.image_size": ("img_size", "input_size", "resolution"),
    "image_size": ("img_size", "input_size", "crop_size", "resolution", "imgsz"),
    "resize": ("resize_size", "crop_pct"),
    "crops.local_size": ("local_crops_size", "small_crop_size"),
    "crops.num_local": ("local_crops_number", "num_local_crops", "num_small_crops", "n_local_crops"),
    "crops.global_scale": ("global_crops_scale", "scale"),
    "crops.local_scale": ("local_crops_scale",),
    "crops.jitter": ("color_jitter",),
    "crops.flip": ("hflip", "horizontal_flip", "horizontal_flip_prob"),
    "head.out_dim": ("num_prototypes", "n_prototypes", "prototypes"),
    "head.hidden_dim": ("proj_hidden_dim",),
    "head.bottleneck_dim": ("proj_output_dim", "bottleneck"),
    "head.batch_norm": ("use_bn_in_head", "use_bn", "sync_bn", "sync_batchnorm"),
    "teacher.momentum": ("momentum_teacher", "ema_momentum", "ema_decay", "base_tau", "base_tau_momentum", "tau", "ema"),
    "teacher.temperature": ("teacher_temp", "teacher_temperature"),
    "teacher.warmup_temperature": ("warmup_teacher_temp", "warmup_teacher_temperature"),
    "teacher.warmup": ("warmup_teacher_temp_epochs", "warmup_teacher_temperature_epochs"),
    "loss.student_temperature": ("student_temp", "temp"),
    "temperature": ("temp", "knn_temperature"),
    "loss.center_momentum": ("center_mom",),
    "optim.name": ("optimizer", "opt"),
    "optim.lr": ("lr", "learning_rate", "base_lr", "blr", "lr0"),
    "lr": ("learning_rate", "base_lr", "blr", "lr0"),
    "optim.min_lr": ("final_lr", "lr_min", "eta_min"),
    "optim.warmup": ("warmup_epochs", "warmup_steps", "num_warmup_epochs"),
    "optim.weight_decay": ("wd",),
    "optim.weight_decay_end": ("wd_end", "final_weight_decay"),
    "optim.clip": ("clip_grad", "gradient_clip_val", "grad_clip", "max_grad_norm", "clip_norm"),
    "run.epochs": ("epochs", "max_epochs", "n_epochs", "num_epochs", "num_train_epochs", "max_steps", "iterations"),
    "epochs": ("max_epochs", "n_epochs", "num_epochs"),
    "run.batch_size": ("batch", "bs", "batch_size", "batch_size_per_gpu", "per_device_train_batch_size", "train_batch_size"),
    "batch_size": ("batch", "bs", "batch_size_per_gpu", "test_batch_size", "val_batch_size"),
    "run.accumulate": ("accum_iter", "accumulate_grad_batches", "gradient_accumulation_steps", "update_freq", "grad_accum"),
    "run.precision": ("precision", "amp", "use_amp", "fp16", "use_fp16", "bf16", "mixed_precision", "half", "dtype"),
    "precision": ("amp", "use_amp", "fp16", "use_fp16", "bf16", "mixed_precision", "half", "dtype"),
    "run.device": ("device", "accelerator", "cuda", "no_cuda"),
    "device": ("accelerator", "cuda", "no_cuda"),
    "run.compile": ("torchcompile", "torch_compile", "compile_model"),
    "run.seed": ("seed", "random_seed", "manual_seed", "random_state"),
    "seed": ("random_seed", "manual_seed", "random_state"),
    "run.out": ("output_dir", "out", "out_dir", "output", "save_dir", "log_dir", "logdir", "work_dir", "checkpoint_dir",
                "exp_name", "default_root_dir"),
    "out": ("output_dir", "out_dir", "output", "save_dir", "log_dir", "logdir", "work_dir", "dump_features", "results_file"),
    "run.init": ("pretrained", "pretrained_weights", "weights", "init", "finetune", "fine_tune", "from_pretrained", "init_from",
                 "init_checkpoint", "load_weights", "load_from", "warm_start"),
    "optim.freeze_encoder": ("freeze_backbone", "freeze_trunk", "freeze_epochs", "freeze"),
    "run.log_every": ("print_freq", "log_interval", "log_every_n_steps", "log_freq"),
    "run.keep_every": ("saveckp_freq", "save_freq", "save_every", "save_interval", "checkpoint_frequency", "save_period"),
    "run.knn_every": ("knn_freq", "eval_freq", "val_freq", "eval_every", "val_interval", "check_val_every_n_epoch"),
    "data.root": ("root", "data", "data_path", "data_dir", "dataset", "train_dir", "train_data", "train_data_path",
                  "dataset_path", "imagenet_path", "train"),
    "data": ("data_path", "data_dir", "root", "dataset_path", "imgs", "images", "image_path", "source", "imagenet_path"),
    "data.workers": ("num_workers", "n_workers", "nworkers", "j", "dataloader_num_workers"),
    "workers": ("num_workers", "n_workers", "nworkers", "j", "dataloader_num_workers"),
    "k": ("nb_knn", "topk", "top_k", "num_neighbors", "n_neighbors", "recall_k"),
    "checkpoint": ("pretrained_weights", "pretrained", "weights", "ckpt", "ckpt_path", "checkpoint_path", "model_path",
                   "model", "timm_model", "backbone_weights", "init_checkpoint", "model_weights"),
    "weights": ("pretrained_path", "weights_path", "weights_file", "timm_weights", "backbone_path"),
    "model.heads": ("num_attention_heads", "n_heads", "nhead"),
    "model.mean": ("image_mean", "pixel_mean", "norm_mean", "img_mean"),
    "model.std": ("image_std", "pixel_std", "norm_std", "img_std"),
    "model.pos_interp": ("interpolate_offset", "interpolate_antialias", "pos_embed_interp"),
    "which": ("checkpoint_key", "use_ema", "model_ema"),
    "features": ("load_features", "features_dir", "feature_path", "embeddings"),
    "mass": ("threshold",),
}  # fmt: skip
"""Option -> words for it. A command takes the first option that it has."""

TOLD = ("arch", "gamma", "heads", "num_heads", "mean", "std", "pos_interp", "norm_order")
"""Options of `model` that evaluators are told for files of weights that do not say them."""

NONE: dict[tuple[str, ...], str] = {
    ("resume", "resume_from", "resume_from_checkpoint", "auto_resume", "checkpoint", "ckpt", "ckpt_path", "last"): (
        "a run is resumed by the same command with the same run.out"
    ),
    ("in_chans", "in_channels", "input_channels", "num_channels", "channels", "in_ch"): (
        "encoders have three channels; gray images fill all three, and data.extra_band says what to do with a fourth"
    ),
    ("devices", "gpus", "gpu", "num_gpus", "n_gpus", "ngpus", "num_devices", "nproc_per_node", "nodes", "num_nodes",
     "world_size", "local_rank", "dist_url", "strategy", "distributed", "ddp", "gpu_ids"): (
        "start a process for each GPU, as in torchrun --nproc_per_node 8 -m dino_simpool ...; the option `device` chooses one"
    ),
    ("wandb", "wandb_project", "project", "entity", "logger", "log_wandb", "mlflow", "tensorboard", "tb", "comet", "neptune"): (
        "a training run always writes log.jsonl and tensorboard/ into its folder, for any tool that reads these"
    ),
    ("num_classes", "nb_classes", "num_labels", "n_classes"): "classes are the folders of the data",
    ("n_last_blocks", "avgpool_patchtokens", "avgpool"): "what is evaluated is the pooled feature of the encoder",
    ("sched", "scheduler", "lr_scheduler"): "the schedule is the published one: linear warm-up, then a cosine",
    ("pin_mem", "pin_memory", "persistent_workers", "prefetch_factor", "drop_last", "shuffle"): "loading needs no such setting",
    ("mixup", "cutmix", "aa", "auto_augment", "random_erase", "reprob"): "the augmentation is DINO's, see the options crops",
    ("val_split", "val_path", "val_dir", "val_data", "val_data_path", "labels"): (
        "training needs no labels and no held-out images; run.knn_train and run.knn_val add a k-NN evaluation"
    ),
    ("benchmark", "deterministic", "cudnn_benchmark"): "equal options give equal runs on one kind of device",
    ("verbose", "debug", "quiet"): "DINO_SIMPOOL_TRACEBACK=1 in the environment shows full tracebacks",
}  # fmt: skip
"""Words for which a training, or any command, has no option, and how it is done instead."""


def explain_unknown(given: str, names: Sequence[str]) -> str:
    """What to write in place of an unknown option, given the options of the command.

    It is the options with the same last part, or those that other tools call so; how it is done
    without an option; what a training calls it; the option that is spelled alike; or --help.
    """
    names = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]  # no groups
    word = given.rpartition(".")[2].replace("-", "_").lower()
    meant = [option for option, words in SAME.items() if word in words or _last(option) == word]
    known = [name for name in names if _last(name) == word] or [name for name in meant if name in names]
    if known:
        return f"did you mean {' or '.join(known)}?"
    if without := next((text for words, text in NONE.items() if word in words), ""):
        return f"there is none, {without}"
    if meant := [option for option in meant if "." in option]:
        return f"this command has none; of train it is {' or '.join(meant)}"
    last = {_last(name): name for name in reversed(names)}
    parts = difflib.get_close_matches(word, last, len(last), 0.6)
    # A common group makes distant names look near, so that the last parts are compared too.
    near = [name for name in difflib.get_close_matches(given, names, 5, 0.75) if _last(name) in parts]
    near += [last[part] for part in difflib.get_close_matches(word, last, 1, 0.8)]
    return f"did you mean {near[0]}?" if near else "--help lists all options"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
