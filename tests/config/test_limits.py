"""Every option of every command, given numbers that are none, numbers too large or too small, nothing, and other types."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dino_simpool import cli
from dino_simpool.config import ConfigError, TrainConfig, option_names, parse
from dino_simpool.dino.plan import make_plan

DURATIONS = {"run.epochs", "optim.warmup", "optim.freeze_last_layer", "optim.freeze_encoder", "teacher.warmup"}
TEXT = re.compile(r"str( \| None)?|(str \| )?tuple\[str, \.\.\.\]")
"""Annotations of options that take any text: names of files, and of architectures, which only timm knows."""
DEVICES = {"device", "run.device"}
ZERO = {
    "crops.flip", "crops.grayscale", "crops.jitter_probability", "crops.num_local", "data.max_bad_share", "data.workers",
    "gpus", "loader_seconds", "loss.center_momentum", "model.drop_path", "noise", "num_classes", "optim.clip",
    "optim.freeze_encoder", "optim.freeze_last_layer",
    "optim.min_lr", "optim.momentum", "optim.warmup", "optim.weight_decay", "optim.weight_decay_end", "run.keep_every",
    "run.knn_every", "run.save_minutes", "run.seed", "run.verify_every", "seed", "teacher.drop_path", "teacher.momentum",
    "teacher.warmup", "workers",
}  # fmt: skip
"""Options for which 0 has a meaning."""
GIVEN = {
    "nan": set(), "inf": set(), "-inf": set(), ".nan": set(), ".inf": set(), "-.inf": set(), "-1": set(), "1e30": set(),
    "1_0x": set(), "1" + 40 * "0": set(), "": set(), "zebra": set(), "{a: 1}": set(), "[nan]": set(),
    "[1, 2, 3, 4, 5]": {"grid", "k", "published_chunks"},
    "[]": {"k"},  # Recall@k's, whose layout has its own
    "0": ZERO,
}  # fmt: skip
"""What is given -> the options that take it, beside those of text: an option that takes more must be looked at here."""


def options() -> Iterator[tuple[str, type, str]]:
    """(command, its options, name) of each option that is no group; those that commands share come once for each."""
    for command, (kind, _, _) in cli.COMMANDS.items():
        names = option_names(kind)
        for name in names:
            if not any(other.startswith(f"{name}.") for other in names):
                yield command, kind, name


@pytest.mark.parametrize("given", GIVEN)
def test_every_option_takes_only_what_it_can_mean(given: str) -> None:
    """One line for all that is refused, and nothing but ConfigError comes out."""
    taken, said = set(), set()
    seen = set()
    for _, kind, name in options():
        field = (name, option_names(kind)[name], str(getattr(kind, "group", "")))
        if (TEXT.fullmatch(field[1]) and name not in DEVICES) or (field in seen and name not in ("k", "seed", "workers")):
            continue
        seen.add(field)
        try:
            parse(kind, [f"--{name}={given}"])
        except ConfigError as error:
            assert "\n" not in str(error) and name in str(error), f"--{name}={given}: {error}"
            said.add(str(error))
        else:
            taken.add(name)
    assert taken == GIVEN[given]
    assert said


@pytest.mark.parametrize("given", [math.nan, math.inf, -math.inf, True, 10**40, "zebra", {"a": 1}, [math.nan, math.inf]])
def test_no_number_of_a_recipe_is_anything_else(tmp_path: Path, given: object) -> None:
    """A recipe has types of its own. Each option of a training, and of k-NN."""
    path, words = tmp_path / "recipe.yaml", json.dumps(given).replace("NaN", ".nan").replace("Infinity", ".inf")
    for command, kind, name in options():
        field = option_names(kind)[name]
        if command not in ("train", "knn") or ("int" not in field and "float" not in field and name not in DURATIONS):
            continue
        group, _, own = name.rpartition(".")
        path.write_text(f"{group}: {{{own}: {words}}}\n" if group else f"{own}: {words}\n")
        with pytest.raises(ConfigError, match=own):
            parse(kind, ["--config", str(path)])


@pytest.mark.parametrize("name", sorted(ZERO & set(option_names(TrainConfig))))
def test_a_training_with_nothing_of_something_has_a_plan(name: str) -> None:
    cfg = parse(TrainConfig, [f"--{name}=0"])
    plan = make_plan(cfg, 1000)
    assert plan.total_steps == 300 and "nan" not in plan.table()


@pytest.mark.parametrize(("unit", "most"), [("ep", 10**6), ("it", 10**12), ("img", 10**15), ("%", 100)])
def test_a_duration_has_an_upper_end(unit: str, most: int) -> None:
    assert parse(TrainConfig, [f"--optim.warmup={most}{unit}"]).optim.warmup == f"{most}{unit}"
    for given in (f"{most + 1}{unit}", f"1e30{unit}", f"1e999{unit}"):
        with pytest.raises(ConfigError, match=r"^optim\.warmup"):
            parse(TrainConfig, [f"--optim.warmup={given}"])
