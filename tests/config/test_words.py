"""Options of other tools: each leads to one of ours, or to how it is done without."""

from __future__ import annotations

import re

import pytest

from dino_simpool import cli
from dino_simpool.config import ConfigError, KnnConfig, LinearConfig, TrainConfig, option_names, parse
from dino_simpool.config.words import NONE, SAME, explain_unknown

ALL = set().union(*(option_names(kind) for kind, _, _ in cli.COMMANDS.values()))


def said(kind: type, option: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(kind, [f"--{option}", "1"])
    return str(caught.value)


def test_every_word_leads_to_an_option_that_exists() -> None:
    assert set(SAME) <= ALL
    for text in NONE.values():
        assert set(re.findall(r"\b(?:run|data|model|crops)\.\w+", text)) <= ALL | {"log.jsonl"}
    for words in (*SAME.values(), *NONE):
        assert len(set(words)) == len(words) and all(re.fullmatch(r"[a-z0-9_]+", word) for word in words)


@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("img_size", "crops.global_size or model.image_size"),
        ("epochs", "run.epochs"),
        ("lr", "optim.lr"),
        ("batch_size", "run.batch_size"),
        ("batch_size_per_gpu", "run.batch_size"),
        ("arch", "model.arch"),
        ("data_path", "data.root"),
        ("output_dir", "run.out"),
        ("output-dir", "run.out"),
        ("num_workers", "data.workers"),
        ("seed", "run.seed"),
        ("precision", "run.precision"),
        ("amp", "run.precision"),
        ("use_fp16", "run.precision"),
        ("patch_size", "model.patch_size"),
        ("drop_path_rate", "model.drop_path"),
        ("drop_path", "model.drop_path or teacher.drop_path"),
        ("momentum_teacher", "teacher.momentum"),
        ("global_crops_scale", "crops.global_scale"),
        ("local_crops_number", "crops.num_local"),
        ("warmup_teacher_temp", "teacher.warmup_temperature"),
        ("warmup_epochs", "optim.warmup"),
        ("gradient_clip_val", "optim.clip"),
        ("optim.batch_size", "run.batch_size"),
        ("train.lr", "optim.lr"),
        ("pretrained", "run.init"),
        ("pretrained_weights", "run.init"),
        ("model.pretrained", "run.init"),
        ("finetune", "run.init"),
        ("init", "run.init"),
        ("freeze_backbone", "optim.freeze_encoder"),
    ],
)
def test_words_of_other_tools_lead_to_ours(word: str, options: str) -> None:
    assert said(TrainConfig, word) == f"unknown option {word}: did you mean {options}?"


@pytest.mark.parametrize("word", ["resume", "in_chans", "devices", "gpus", "wandb", "num_nodes"])
def test_words_without_an_option_say_how_it_is_done(word: str) -> None:
    text = said(TrainConfig, word)
    assert text.startswith(f"unknown option {word}: there is none, ") and "did you mean" not in text


@pytest.mark.parametrize(
    ("kind", "word", "text"),
    [
        (KnnConfig, "lr", "this command has none; of train it is optim.lr"),
        (KnnConfig, "patch_size", "this command has none; of train it is model.patch_size"),  # and not batch_size
        (KnnConfig, "heads", "did you mean model.heads?"),  # for files that do not say it
        (KnnConfig, "architecture", "did you mean model.arch?"),
        (KnnConfig, "image_mean", "did you mean model.mean?"),
        (KnnConfig, "model.zebra", "see train --help"),
        (KnnConfig, "model.headz", "did you mean model.heads?"),
        (KnnConfig, "model.min_over", "give --min_over"),
        (KnnConfig, "timm_model", "did you mean checkpoint?"),
        (KnnConfig, "weights_file", "did you mean weights?"),
        (KnnConfig, "use_ema", "did you mean which?"),
        (LinearConfig, "learning_rate", "did you mean lr?"),
        (KnnConfig, "pretrained_weights", "did you mean checkpoint?"),
        (KnnConfig, "nb_knn", "did you mean k?"),
    ],
)
def test_words_of_a_training_given_to_an_evaluator(kind: type, word: str, text: str) -> None:
    assert said(kind, word) == f"unknown option {word}: {text}"


def test_only_near_names_are_meant() -> None:
    """A distant name sends people astray."""
    names = list(option_names(TrainConfig))
    for given in ("zebra", "model.zebra", "banana_split", "x", "run.tags", "model.notes"):
        assert explain_unknown(given, names) == "--help lists all options"
    assert explain_unknown("arh", names) == "did you mean model.arch?"
    assert explain_unknown("modell.arch", names) == "did you mean model.arch?"
