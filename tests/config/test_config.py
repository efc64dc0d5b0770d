"""Options: each is defined once, read somewhere and explained; each mistake is one line; nothing is lost on the way to YAML."""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import pickle
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import dino_simpool
from dino_simpool import cli, config
from dino_simpool.config import ConfigError, KnnConfig, ModelConfig, TrainConfig, dump, from_dict, option_names, parse, to_dict

PACKAGE = Path(dino_simpool.__file__).parent
ROOT = PACKAGE.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
KINDS = [kind for kind, _, _ in cli.COMMANDS.values()]
GROUPS = {f.name: f.default_factory for f in dataclasses.fields(TrainConfig)}


def train(*arguments: str) -> TrainConfig:
    return parse(TrainConfig, list(arguments))


def refusal(*arguments: str, kind: type = TrainConfig) -> str:
    """What is said about arguments that must be refused: one line."""
    with pytest.raises(ConfigError) as caught:
        parse(kind, list(arguments))
    assert str(caught.value).strip() and "\n" not in str(caught.value)
    return str(caught.value)


def recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


# -- typos and types


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("model.arh", "model.arch"),
        ("modle.arch", "model.arch"),
        ("arch", "model.arch"),
        ("lr", "optim.lr"),
        ("epochs", "run.epochs"),
        ("crops.global_scales", "crops.global_scale"),
        ("run.ou", "run.out"),  # a prefix is a typo too
    ],
)
def test_typo_on_the_command_line_names_the_nearest_option(given: str, nearest: str) -> None:
    assert refusal(f"--{given}", "1") == f"unknown option {given}: did you mean {nearest}?"


def test_unknown_option_like_no_other() -> None:
    assert refusal("--zzzzzz", "1") == "unknown option zzzzzz: --help lists all options"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {archh: vit_small}", "unknown option model.archh: did you mean model.arch?"),
        ("modle: {arch: vit_small}", "unknown option modle.arch: did you mean model.arch?"),
        ("model.gama: 2", "unknown option model.gama: did you mean model.gamma?"),
        ("run: {seed: zero}", "run.seed is zero: allowed is a whole number"),
        ("run: {seed: 1.5}", "run.seed is 1.5: allowed is a whole number"),
        ("run: {seed: true}", "run.seed is True: allowed is a whole number"),
        ("run: {out: 5}", "run.out is 5: allowed is text"),
        ("head: {batch_norm: 3}", "head.batch_norm is 3: allowed is true or false"),
        ("model: {pool: max}", "model.pool is max: allowed is one of simpool, cls, gap"),
        ("model: {gamma: None}", "model.gamma is None: allowed is a number or null (write null, not None)"),
        ("crops: {global_scale: [0.3]}", "crops.global_scale is [0.3]: allowed is [number, number]"),
        ("crops: {global_scale: 0.3}", "crops.global_scale is 0.3: allowed is [number, number]"),
        ("model: 3", "model is a group of options: write model: {NAME: VALUE}"),
        ("model:", "model is a group of options: write model: {NAME: VALUE}"),
    ],
)
def test_mistake_in_a_recipe(tmp_path: Path, text: str, said: str) -> None:
    assert refusal("--config", recipe(tmp_path, text + "\n")) == said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a recipe"),
        ("hello\n", "is not a recipe"),
        ("- model\n- run\n", "is not a recipe"),
        ("run: {seed: 1\nmodel: 2\n", "is not YAML, line 2"),
        ("run: {seed: 1, seed: 2}\n", "gives run.seed twice"),
        ("run: {seed: 1}\nmodel: {gamma: 2}\nrun: {epochs: 5}\n", "gives run twice"),
    ],
)
def test_recipe_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    path = recipe(tmp_path, text)
    assert refusal("--config", path).startswith(f"{path} {words}")


@pytest.mark.parametrize("text", ["config: {file}", "<<: {{config: {file}}}", "run: {file}", "<<: {{run: {file}}}"])
def test_a_recipe_reads_no_other_file(tmp_path: Path, text: str) -> None:
    """`config: /etc/passwd` would be read, and printed in the error."""
    (tmp_path / "secret.txt").write_text("secret\n")
    said = refusal("--config", recipe(tmp_path, text.format(file=tmp_path / "secret.txt")))
    assert "secret" not in said.replace("secret.txt", "")
    assert said.startswith(("config is no option of a recipe: to merge recipes, write", "run is a group of options"))
    for values in ({"config": str(tmp_path / "secret.txt")}, {"run": str(tmp_path / "secret.txt")}):
        with pytest.raises(ConfigError, match=r"^(config is no option|run is a group)"):
            from_dict(TrainConfig, values)


@pytest.mark.parametrize("text", ["run: {{config: {file}}}", "model: {{config: {file}, pool: gap}}"])
def test_a_group_of_a_recipe_reads_no_other_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "secret.txt").write_text("secret\n")
    said = refusal("--config", recipe(tmp_path, text.format(file=tmp_path / "secret.txt")))
    assert said.startswith(("unknown option run.config", "unknown option model.config")) and "secret" not in said


@pytest.mark.parametrize("option", ["--run", "--run.config", "--model", "--config"])
def test_no_option_prints_a_file(tmp_path: Path, option: str) -> None:
    path = tmp_path / "passwd"
    path.write_text("root:x:0:0\nnobody:x:1:1\n")
    assert "root:x" not in refusal(option, str(path))


def test_recipe_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"run: {out: \xe9}\n")
    assert "is not YAML" in refusal("--config", str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--run.seed", "zero"), "run.seed is zero: allowed is a whole number"),
        (("--run.seed",), "--run.seed"),
        (("--run", "5"), "--run.out"),
        (("stray",), "stray"),
        (("--config",), "a file or a name"),
        (("--config", "vit_small_simpol"), "did you mean vit_small_simpool?"),
        (("--config", "zzzzz"), "recipes: cifar10_resnet18_gap, "),
        (("--model.mean", "[0.5, 0.5]"), "[number, number, number]"),
    ],
)
def test_mistake_on_the_command_line(arguments: tuple[str, ...], words: str) -> None:
    assert words in refusal(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--whch", "student"), "unknown option whch: did you mean which?"),
        (("--which", "best"), "which is best: allowed is one of teacher, student, untrained"),
        (("--k", "5"), "k is 5: allowed is [whole number, ...]"),
        (("--device", "gpu"), "device is gpu: allowed are auto, cpu, mps, cuda and cuda:N"),
        (("--batch_size", "0"), "batch_size is 0: allowed is 1 to 1,048,576"),
        (("--subset_per_class", "0"), "subset_per_class is 0: allowed is 1 to 1,000,000,000, or null"),
        (("--image_size", "0"), "image_size is 0: allowed is 1 to 4,096, or null"),
        (("--resize", "0"), "resize is 0: allowed is 1 to 8,192, or null"),
        (("--max_pixels", "0"), "max_pixels is 0: allowed is 1 to 100,000,000,000"),
        (("--workers", "-1"), "workers is -1: allowed is 0 to 1,024, or null"),
        (("--checkpoint", "timm:resnet18"), "timm:resnet18 has no folder for the results: give --out DIR"),
        (
            ("--checkpoint", "last.pth", "--weights", "random"),
            "weights random are those of a checkpoint timm:NAME: give one, or the file as --checkpoint",
        ),
        (
            ("--model", "last.pth"),
            "model is last.pth: allowed is options of the encoder by name, as in --model.heads 6; a file of weights is a "
            "--checkpoint",
        ),
    ],
)
def test_mistake_in_an_evaluators_options(arguments: tuple[str, ...], said: str) -> None:
    assert refusal(*arguments, kind=KnnConfig) == said


def test_resources_count_no_encoder_of_others() -> None:
    said = refusal("--checkpoint", "timm:resnet18", kind=config.ResourcesConfig)
    assert said.startswith("checkpoint is timm:resnet18: encoders of this tool are counted, give --model.arch")


def test_evaluators_take_options_of_the_model_by_name() -> None:
    given = ["--model.heads", "3", "--model.gamma", "null", "--model.mean", "[0.5, 0.5, 0.5]"]
    cfg = parse(KnnConfig, given)
    assert cfg.model == {"heads": 3, "gamma": None, "mean": [0.5, 0.5, 0.5]}
    assert from_dict(KnnConfig, to_dict(cfg)) == cfg


# -- values


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 5e-4 as text."""
    cfg = train("--config", recipe(tmp_path, "optim: {lr: 5e-4, min_lr: 1e-6, clip: 3}\n"), "--teacher.momentum", "99e-2")
    assert (cfg.optim.lr, cfg.optim.min_lr, cfg.optim.clip, cfg.teacher.momentum) == (0.0005, 1e-6, 3.0, 0.99)
    assert all(isinstance(value, float) for value in (cfg.optim.lr, cfg.optim.min_lr, cfg.optim.clip, cfg.teacher.momentum))


def test_tuples_from_yaml_and_command_line(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        "crops: {global_scale: [0.3, 1], blur: [1, 0, 0.5]}\nmodel: {arch: resnet18, depth: [1, 2]}\n"
        "data: {root: [a, b.txt]}\n",
    )
    cfg = train("--config", path, "--crops.local_scale", "[0.1, 0.2]", "--model.arch", "resnet18")
    assert cfg.crops.global_scale == (0.3, 1.0) and cfg.crops.local_scale == (0.1, 0.2) and cfg.crops.blur == (1.0, 0.0, 0.5)
    assert cfg.model.depth == (1, 2) and cfg.data.root == ("a", "b.txt")
    assert parse(KnnConfig, ["--k", "[5, 7]"]).k == (5, 7)
    assert train("--model.depth", "6").model.depth == 6 and train("--data.root", "images").data.root == "images"


def test_null_on_the_command_line_undoes_a_recipe(tmp_path: Path) -> None:
    path = recipe(tmp_path, "model: {gamma: 2}\ndata: {workers: 0}\n")
    assert train("--config", path).model.gamma == 2.0
    cfg = train("--config", path, "--model.gamma", "null", "--data.workers=null")
    assert cfg.model.gamma is None and cfg.data.workers is None


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        train().run.seed = 1  # type: ignore[misc]


# -- several recipes, and their order


def test_recipes_are_merged_and_options_come_last(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text("model: {arch: resnet18, gamma: 2}\nrun: {seed: 1, epochs: 3}\n")
    second = tmp_path / "second.yaml"
    second.write_text("model: {gamma: 3}\nrun: {seed: 2}\n")
    cfg = train("--config", str(first), f"--config={second}", "--run.seed", "9")
    assert (cfg.model.arch, cfg.model.gamma, cfg.run.epochs, cfg.run.seed) == ("resnet18", 3.0, 3, 9)
    assert train("--config", str(second), "--config", str(first)).model.gamma == 2.0
    assert cfg.optim == TrainConfig().optim


@pytest.mark.parametrize("argument", [["--run.seed", "3"], ["--run.seed=3"]])
def test_recipe_after_an_option_is_refused(argument: list[str]) -> None:
    said = refusal(*argument, "--config", "cifar_gap")
    assert said == "--config comes before the options that change it: here --run.seed comes first"
    assert "unknown option conf" in refusal(*argument, "--conf", "cifar_gap")  # an abbreviation would slip through


# -- there and back


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_defaults_survive_yaml_dict_and_pickle(tmp_path: Path, kind: type) -> None:
    cfg = kind()
    assert parse(kind, []) == cfg
    assert from_dict(kind, to_dict(cfg)) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert parse(kind, ["--config", recipe(tmp_path, dump(cfg))]) == cfg


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_resolved_recipe_repeats_the_run(tmp_path: Path, path: Path) -> None:
    cfg = train("--config", str(path), "--data.root", "[a, b]", "--optim.warmup", "5%", "--model.image_size", "32")
    again = train("--config", recipe(tmp_path, dump(cfg)))
    assert again == cfg == from_dict(TrainConfig, to_dict(cfg)) == pickle.loads(pickle.dumps(cfg))
    assert dump(again) == dump(cfg) and hash(again) == hash(cfg)
    assert yaml.safe_load(dump(cfg)) == to_dict(cfg), "plain values only: no python tags"


def test_from_dict_is_as_strict_as_a_recipe() -> None:
    assert from_dict(ModelConfig, {"arch": "resnet18", "gamma": 2}) == ModelConfig(arch="resnet18", gamma=2.0)
    cases: list[tuple[type, dict[str, object], str]] = [
        (ModelConfig, {"gama": 2}, "unknown option gama: did you mean gamma?"),
        (ModelConfig, {"gamma": "x"}, "gamma is x: allowed is a number or null"),
        (TrainConfig, {"run": {"sed": 2}}, "unknown option run.sed: did you mean run.seed?"),
        (TrainConfig, {"run": None}, "run is a group of options: write run: {NAME: VALUE}"),
        (
            TrainConfig,
            {"model": {"arch": "resnet18", "pool": "cls"}},
            "model.pool cls needs a ViT, and resnet18 has no class token",
        ),
    ]
    for kind, values, said in cases:
        with pytest.raises(ConfigError) as caught:
            from_dict(kind, values)
        assert str(caught.value).startswith(said)


# -- impossible values and combinations


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--model.arch resnet50 --model.pool cls", "no class token: use gap or simpool"),
        ("--model.gamma 0", "model.gamma is 0.0: allowed is 0.01 to 100, or null"),
        ("--model.gamma .inf", "model.gamma is inf"),
        ("--model.beta true", "set model.gamma, or model.beta false"),
        ("--model.beta true --model.gamma 2 --model.pool gap", "only with pool simpool"),
        ("--model.arch resnet50 --model.norm_order norm_then_pool", "is for ViTs"),
        ("--model.stem small", "smaller model.patch_size"),
        ("--model.image_size 225", "not divisible by model.patch_size 16: use 224 or 240"),
        ("--crops.global_size 230", "crops.global_size 230 is not divisible by model.patch_size 16: use 224 or 240"),
        ("--crops.local_size 100", "crops.local_size 100 is not divisible by model.patch_size 16: use 96 or 112"),
        ("--crops.local_size 10", "use 16, or another patch_size"),
        ("--model.patch_size 0", "allowed is 1 to"),
        ("--model.depth 0", "allowed is 1 to 1,000, or null"),
        ("--model.depth [1] --model.arch resnet18", "give one to four numbers of blocks"),
        ("--model.depth [1,1,1,1,1] --model.arch resnet18", "give one to four numbers of blocks"),
        ("--model.depth [2]", "vit_small has no stages: give the number of its blocks"),
        ("--model.depth [2,0] --model.arch resnet18", "allowed is 1 to 1,000, or null"),
        ("--model.drop_path 1", "allowed is 0 to 0.99"),
        ("--model.std [1,1,0]", "allowed is 0.001 to 1,000"),
        ("--head.out_dim 1", "head.out_dim is 1: allowed is 2 to"),
        ("--head.layers 0", "allowed is 1 to"),
        ("--teacher.momentum 1.1", "teacher.momentum is 1.1: allowed is 0 to 1"),
        ("--teacher.momentum .nan", "teacher.momentum is nan"),
        ("--teacher.temperature 0", "allowed is 0.001 to 10"),
        ("--teacher.warmup 120%", "a share is 0% to 100%"),
        ("--loss.student_temperature 0", "allowed is 0.001 to 10"),
        ("--loss.center_momentum 2", "allowed is 0 to 1"),
        ("--crops.global_scale [0.5,0.2]", "0 < lowest <= highest <= 1"),
        ("--crops.local_scale [0,0.2]", "allowed is above 0 to 1"),
        ("--crops.blur_sigma [2,1]", "lowest <= highest"),
        ("--crops.solarize [0,1.2,0]", "crops.solarize is (0.0, 1.2, 0.0): allowed is 0 to 1"),
        ("--crops.jitter [0.4,0.4,0.2,0.6]", "hue in 0..0.5"),
        ("--crops.num_local -1", "crops.num_local is -1: allowed is 0 to 100"),
        ("--data.workers -1", "data.workers is -1: allowed is 0 to 1,024, or null"),
        ("--data.subset_per_class 0", "allowed is 1 to"),
        ("--optim.lr 0", "lr is 0.0: allowed is above 0 to 1,000"),
        ("--optim.warmup ten", "'ten' is not a duration"),
        ("--run.epochs 0", "give a length above 0"),
        ("--run.epochs -1", "-1 is not a duration"),
        ("--run.epochs 10%", "give epochs, steps or images"),
        ("--run.batch_size 0", "allowed is 1 to"),
        ("--run.save_every_steps 0", "allowed is 1 to"),
        ("--run.knn_train x", "give both class folders or neither"),
        ("--run.device gpu", "allowed are auto, cpu, mps, cuda and cuda:N"),
    ],
)
def test_impossible_options_are_one_line(options: str, words: str) -> None:
    said = refusal(*options.split())
    assert words in said
    assert any(group in said for group in GROUPS), "the line names the option"


def numbers_of(value: typing.Any) -> list[typing.Any]:
    """The numbers in a value, also those in a tuple."""
    return [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, (int, float))]


def fields_of(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """All options of a configuration class by their dotted names."""
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.default_factory):
            yield from fields_of(f.default_factory, f"{f.name}.")
        else:
            yield prefix + f.name, f


def all_fields() -> list[tuple[type, str, dataclasses.Field]]:
    """Each option once, with a command that has it; the same in several commands (a mixin's) comes once."""
    found = {}
    for kind, _, _ in cli.COMMANDS.values():
        for name, f in fields_of(kind):
            found.setdefault((name, f.type, str(f.metadata), str(f.default)), (kind, name, f))
    return list(found.values())


def test_every_number_has_both_ends_of_its_range() -> None:
    """A nan is within no range."""
    for _, name, f in all_fields():
        if re.search(r"\b(int|float)\b", str(f.type)):
            limits = f.metadata["limits"]
            assert math.isfinite(max(limits.least, limits.above)) and math.isfinite(limits.most), name
            assert all(limits.hold(x) for x in numbers_of(f.default)), name
            assert not any(limits.hold(x) for x in (math.nan, math.inf, -math.inf, (limits.most, math.nan))), name


def test_patch_size_is_no_matter_to_a_cnn() -> None:
    assert train("--model.arch", "resnet18", "--crops.global_size", "33", "--model.image_size", "33").crops.global_size == 33


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (10, (10.0, "ep")),
        (0.5, (0.5, "ep")),
        ("10ep", (10.0, "ep")),
        ("5000it", (5000.0, "it")),
        ("5000 it", (5000.0, "it")),
        ("1e6img", (1e6, "img")),
        ("5%", (5.0, "%")),
        ("2.5%", (2.5, "%")),
        (0, (0.0, "ep")),
    ],
)
def test_durations(given: int | float | str, meant: tuple[float, str]) -> None:
    assert config.parse_duration(given) == meant


@pytest.mark.parametrize("given", ["", "ten", "10 days", "-3", "1e-3ep", "ep", "5%%", math.nan, math.inf, None])
def test_what_is_no_duration(given: object) -> None:
    with pytest.raises(ValueError, match="is not a duration: give epochs"):
        config.parse_duration(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["7", "0.5", "10ep", "5000it", "1e6img", "1e2"])
def test_durations_from_the_command_line(tmp_path: Path, given: str) -> None:
    expected = config.parse_duration(given)
    assert config.parse_duration(train("--run.epochs", given).run.epochs) == expected
    assert config.parse_duration(train("--config", recipe(tmp_path, f"run: {{epochs: {given}}}\n")).run.epochs) == expected


# -- recipes


BASELINES = [
    ("vit_small", "cls"), ("resnet50", "gap"), ("convnext_small", "gap"), ("cifar", "gap"), ("cifar10_resnet18", "gap"),
    ("cifar10_vit_tiny", "cls"),
]  # fmt: skip


def test_there_are_recipes() -> None:
    named = {path.stem for path in RECIPES}
    backbones = {f"{arch}_{pool}" for arch, pool in BASELINES}
    assert backbones | {name.rsplit("_", 1)[0] + "_simpool" for name in backbones} <= named
    assert {"epochs_300", "imagenet20", "quickstart"} <= named


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_says_how_to_run_it_and_what_to_expect(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    command = next(line for line in header if "dino-simpool train" in line or "-m dino_simpool train" in line)
    _, _, arguments = command.partition(" train ")
    words = arguments.split()
    assert path.stem in words, "the command names this recipe"
    cfg = train(*words)
    assert cfg.run.out and cfg.data.root, "the command says where from and where to"
    body = yaml.safe_load(path.read_text())
    prose = " ".join(line for line in header if line != command)
    assert re.search(r"\d\d\.\d|README", prose) or "model" not in body, "what to expect, or where that is said"
    assert len(header) >= 3 and len(lines) <= 25
    assert dump(train("--config", str(path))) == dump(from_dict(TrainConfig, body))


@pytest.mark.parametrize(("simpool", "baseline"), BASELINES)
def test_baseline_recipe_differs_in_the_pooling_only(simpool: str, baseline: str) -> None:
    ours, theirs = (to_dict(train("--config", f"{simpool}_{pool}")) for pool in ("simpool", baseline))
    differing = {f"{group}.{name}" for group in ours for name in ours[group] if ours[group][name] != theirs[group][name]}
    assert differing == {"model.pool", "model.gamma"}


def test_cifar_differs_from_the_quickstart_in_length_and_crops_only() -> None:
    ours, theirs = (to_dict(train("--config", name)) for name in ("cifar_simpool", "quickstart"))
    assert {group for group in ours if ours[group] != theirs[group]} <= {"crops", "run"}


def test_recipe_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_path = train("--config", str(ROOT / "configs" / "vit_small_simpool.yaml"))
    monkeypatch.chdir(tmp_path)
    assert train("--config", "vit_small_simpool") == by_path
    (tmp_path / "vit_small_simpool").write_text("run: {seed: 5}\n")
    assert train("--config", "vit_small_simpool").run.seed == 5, "a file of that name is meant"


# -- help, and what it costs


def options_with_text() -> Iterator[tuple[str, str, str]]:
    """(class, field, the string under it) of every option, from the source."""
    for path in sorted((PACKAGE / "config").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                for field, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        text = (
                            after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                        )
                        yield node.name, field.target.id, str(text)


def test_help_shows_the_string_under_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {(cls, field): text for cls, field, text in options_with_text()}
    for kind in KINDS:
        with pytest.raises(SystemExit) as left:
            parse(kind, ["--help"])
        assert left.value.code == 0
        shown = "".join(capsys.readouterr().out.split())  # argparse wraps lines, also at hyphens
        for name in option_names(kind):
            *group, field = name.split(".")
            owner: type = GROUPS[group[0]] if group else kind  # type: ignore[assignment]
            if any(other.startswith(f"{name}.") for other in option_names(kind)):  # a group
                continue
            assert f"--{name}" in shown
            text = next(texts[base.__name__, field] for base in owner.__mro__ if (base.__name__, field) in texts)
            assert text, f"{owner.__name__}.{field} has no text"
            assert "".join(text.split()) in shown, name


def test_print_config_prints_the_resolved_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        train("--config", "resnet50_simpool", "--run.seed", "7", "--print_config")
    assert left.value.code == 0
    printed = train("--config", recipe(tmp_path, capsys.readouterr().out))
    assert printed == train("--config", "resnet50_simpool", "--run.seed", "7")


@pytest.mark.parametrize("option", ["--optim.min_lr=.nan", "--run.log_every=0", "--model.pool=cls"])
def test_print_config_prints_no_run_that_would_be_refused(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert refusal("--model.arch", "resnet18", option, "--print_config") == refusal("--model.arch", "resnet18", option)
    assert capsys.readouterr().out == ""


def test_help_shows_both_ends_of_every_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Steps between entries in log.jsonl and TensorBoard. Allowed: 1 to " in shown
    assert "scaled by batch / 256. Allowed: above 0 to 1,000." in shown


def test_help_and_print_config_import_no_torch(tmp_path: Path) -> None:
    """On a login node they must answer at once. From another directory, in a new interpreter."""
    program = (
        "import sys, contextlib\n"
        "from dino_simpool import cli\n"
        "cli.main(['--help']), cli.main(['--version']), cli.main(['nonsense'])\n"
        f"commands = [[c, '--help'] for c in {list(cli.COMMANDS)}] + [['train', '--config', 'quickstart', '--print_config']]\n"
        "for arguments in commands:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        cli.main(arguments)\n"
        "        raise AssertionError(arguments)\n"
        "cli.main(['train', '--model.arh', 'x'])\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'faiss', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"dino-simpool: error: there is no command nonsense; commands: {', '.join(cli.COMMANDS)}",
        "dino-simpool train: error: unknown option model.arh: did you mean model.arch?",
    ]


# -- no dead options


CONFIGS = {name: kind for name, kind in vars(config).items() if dataclasses.is_dataclass(kind) and isinstance(kind, type)}


def definer(kind: type, field: str) -> str:
    """The class that defines a field which `kind` has or inherits."""
    return next(base.__name__ for base in reversed(kind.__mro__) if field in getattr(base, "__annotations__", {}))


def options_read(source: str) -> set[tuple[str, str]]:
    """(class, field) of the options that a module reads, following annotations, assignments and groups.

    Counted are `cfg.run.seed`, `getattr(cfg, "k")`, and a whole group given on by `f(**asdict(cfg.crops))`; not its dump.
    """
    tree = ast.parse(source)
    found: set[tuple[str, str]] = set()
    members: dict[str, type] = {"config": ModelConfig}  # encoder.config, and the annotated fields of the module's own classes
    for node in ast.walk(tree):
        for member in node.body if isinstance(node, ast.ClassDef) else []:
            match member:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation) if ast.unparse(annotation) in CONFIGS:
                    members[name] = CONFIGS[ast.unparse(annotation)]

    def kind_of(node: ast.expr, known: dict[str, type]) -> type | None:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        if owner := kind_of(node.value, known):
            factory = {f.name: f.default_factory for f in dataclasses.fields(owner)}.get(node.attr)
            return factory if isinstance(factory, type) else None
        return members.get(node.attr)

    def note(owner: type, field: str) -> None:
        for kind in CONFIGS.values():
            if issubclass(kind, owner) and field in {f.name for f in dataclasses.fields(kind)}:
                found.add((definer(kind, field), field))

    def learn(names: list[ast.expr], values: list[ast.expr], known: dict[str, type]) -> None:
        for name, value in zip(names, values, strict=True):
            if isinstance(name, ast.Name) and (kind := kind_of(value, known)):
                known[name.id] = kind

    def visit(node: ast.AST, known: dict[str, type]) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            known = known | {
                a.arg: CONFIGS[ast.unparse(a.annotation)]
                for a in arguments
                if a.annotation and ast.unparse(a.annotation) in CONFIGS
            }
            for statement in ast.walk(node):
                match statement:
                    case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation) if ast.unparse(annotation) in CONFIGS:
                        known[name] = CONFIGS[ast.unparse(annotation)]
                    case ast.Assign(targets=[ast.Name() as name], value=value):
                        learn([name], [value], known)
                    case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                        learn(names, values, known)
        if isinstance(node, ast.Attribute) and (owner := kind_of(node.value, known)):
            note(owner, node.attr)
        if isinstance(node, ast.Call):
            match node:
                case ast.Call(func=ast.Name(id="getattr"), args=[whose, ast.Constant(value=str(field)), *_]):
                    if owner := kind_of(whose, known):
                        note(owner, field)
            for keyword in node.keywords:
                match keyword:
                    case ast.keyword(arg=None, value=ast.Call(func=ast.Attribute(attr="asdict"), args=[group])):
                        if owner := kind_of(group, known):
                            found.update((definer(owner, f.name), f.name) for f in dataclasses.fields(owner))
        for child in ast.iter_child_nodes(node):
            visit(child, known)

    visit(tree, {})
    return found


def test_the_search_for_dead_options_finds_reads_and_nothing_else() -> None:
    source = (
        "class Plan:\n"
        "    options: LinearConfig\n"
        "def g(plan):\n"
        "    plan.options.held_out, plan.others.epochs\n"
        "def f(cfg: TrainConfig, other: KnnConfig):\n"
        "    model, run = cfg.model, cfg.run\n"
        "    g(model.arch, run.seed, other.data, getattr(other, 'k', None), to_dict(cfg.loss), dump(cfg))\n"
        "    MultiCrop(**dataclasses.asdict(cfg.teacher)), asdict(cfg.optim), unknown.gamma, encoder.config.mean\n"
    )
    teacher = {("TeacherConfig", f.name) for f in dataclasses.fields(config.TeacherConfig)}
    groups = {("TrainConfig", name) for name in ("model", "run", "loss", "teacher", "optim")}
    others = {
        ("ModelConfig", "arch"),
        ("RunConfig", "seed"),
        ("EvalConfig", "data"),
        ("KnnConfig", "k"),
        ("ModelConfig", "mean"),
        ("LinearConfig", "held_out"),
    }
    assert options_read(source) == teacher | groups | others


def test_every_option_is_read_somewhere() -> None:
    read = set().union(*(options_read(path.read_text()) for path in PACKAGE.rglob("*.py") if path.parent.name != "config"))
    defined = {(definer(kind, f.name), f.name) for kind in CONFIGS.values() for f in dataclasses.fields(kind)}
    assert sorted(defined - read) == []


def test_a_command_has_only_options_that_it_uses() -> None:
    """What is mixed in is used; nothing is taken along and then refused."""
    absent = {
        config.RetrievalConfig: {"train", "val", "subset_per_class", "resize", "batch_size"},
        config.RecallConfig: {"train", "val", "subset_per_class"},
        config.MasksConfig: {"train", "subset_per_class", "exif_orientation"},
        config.AttentionConfig: {"train", "resize"},
        config.SearchConfig: {"precision", "batch_size", "max_pixels", "exif_orientation"},
    }
    for kind, names in absent.items():
        for name in names:
            assert refusal(f"--{name}", "1", kind=kind).startswith(f"unknown option {name}: ")


def test_options_have_the_types_that_they_say() -> None:
    """A default of another type than annotated would pass the library unseen."""
    for kind in CONFIGS.values():
        hints = typing.get_type_hints(kind)
        assert from_dict(kind, to_dict(kind())) == kind()
        assert all(f.name in hints for f in dataclasses.fields(kind))


def test_there_are_few_options() -> None:
    assert len([name for name in option_names(TrainConfig) if "." in name]) <= 87


def test_a_device_may_have_any_number() -> None:
    assert [KnnConfig(device=name).device for name in ("cuda:0", "cuda:12")] == ["cuda:0", "cuda:12"]
