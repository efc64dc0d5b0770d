"""Files of others through `load_encoder`: the published numbers from files on disk, and damage is named."""

from __future__ import annotations

import argparse
import os
import pathlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from golden.load import GOLDEN_POSITIONS, assert_close, load, load_json, meta, sub, synth_array, synth_state
from safetensors.torch import save_file
from test_model_golden import EXACT, FULL_SIZE, PRECISIONS, check_gradients, close, tensors
from torch import Tensor, nn

from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import ModelConfig
from dino_simpool.dino.model import DinoHead
from dino_simpool.models.encoder import Encoder, build_encoder
from dino_simpool.models.weights import to_official

CLASSIFIER = ("fc.", "head.")


def published(state: dict[str, Tensor], *, prefix: str = "", width: int = 0, **args: Any) -> dict[str, Any]:
    """What main_dino.py saves. prefix: `module.` of the teacher, which it has with BatchNorm. width: of the features
    that the head takes; 0 for no head."""
    backbone = {f"backbone.{name}": value for name, value in state.items()}
    head = DinoHead(width, 9, hidden_dim=6, bottleneck_dim=4, batch_norm=bool(prefix)).state_dict() if width else {}
    head = to_official({f"head.{name}": value for name, value in head.items()})
    options = argparse.Namespace(gamma=2.0, epochs=100, patch_size=16, output_dir=pathlib.PosixPath("out"))
    vars(options).update(args)
    return {
        "student": {f"module.{name}": value * 0 for name, value in (backbone | head).items()},
        "teacher": {prefix + name: value for name, value in (backbone | head).items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-3), "weight_decay": np.float64(0.04), "params": [0]}]},
        "epoch": 99,
        "args": options,
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


def golden_vit(mode: str) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    golden = sub(load(f"open_vit_{mode}"), "vit")
    return golden, tensors(sub(golden, "param"), torch.float32)


def golden_cnn(name: str, mode: str) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    arrays = load(f"open_{name}_tiny")
    state = tensors(sub(arrays, "simpool/param"), torch.float32)
    return arrays, {key: value for key, value in state.items() if mode == "simpool" or not key.startswith("simpool.")}


@pytest.mark.parametrize("mode", ["simpool", "official"])
def test_vit(mode: str, tmp_path: Path) -> None:
    golden, state = golden_vit(mode)
    torch.save(published(state, width=48), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"does not say heads .*48 is no multiple of 64\): give heads=3"):
        load_encoder(tmp_path / "checkpoint.pth")
    for precision, dtype in PRECISIONS.items():
        tolerance = {"rtol": 1e-4, "atol": 5e-5}
        options: dict[str, Any] = {"heads": 3, "pos_interp": GOLDEN_POSITIONS[mode]}
        encoder = load_encoder(tmp_path / "checkpoint.pth", **options, min_over="batch").to(dtype)
        per_image = load_encoder(tmp_path / "checkpoint.pth", **options).to(dtype)
        assert encoder.config.min_over == "batch" and per_image.config.min_over == "image"
        assert encoder.config.gamma == (1.25 if mode == "simpool" else None)  # and not 2.0, as its arguments say
        assert encoder.epochs == 99 and encoder.total_epochs == 100 and not encoder.training
        for size in ("224x224", "96x96", "96x160"):
            x = torch.from_numpy(golden[f"in/x_{size}"]).to(dtype)
            close(encoder(x), golden, f"y_{size}", precision, **tolerance)
            if mode == "simpool":
                close(encoder.attention(x).flatten(1), golden, f"attn_{size}", precision, **tolerance)
                close(per_image(x), golden, f"y_per_image_{size}", precision, **tolerance)
        x = torch.from_numpy(golden["in/x_96x96"]).to(dtype).requires_grad_()
        encoder(x).backward(torch.from_numpy(golden["in/g"]).to(dtype))
        assert x.grad is not None
        assert_close(x.grad.abs().sum((1, 2, 3)), golden["grad/x_abs_sum"], rtol=1e-3)
        gradients = sum(key.startswith("grad/") for key in golden) - 1
        assert check_gradients(encoder, golden, precision, rtol=1e-3, noise=1e-5) == gradients
    plain = load_encoder(tmp_path / "checkpoint.pth", heads=3)
    assert plain.config.pos_interp == "dino" and plain.config.norm_order == "pool_then_norm"
    native = plain.trunk.patch_embed.grid_size
    assert torch.equal(plain._positions(plain.trunk.pos_embed[0, -196:], native), plain.trunk.pos_embed[0, -196:])


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("mode", ["simpool", "official"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext"])
def test_cnn(name: str, mode: str, prefix: str, tmp_path: Path) -> None:
    arrays, state = golden_cnn(name, mode)
    golden, settings, inputs = sub(arrays, mode), meta(arrays, mode), sub(arrays, "simpool/in")
    weight, bias = (value for key, value in state.items() if key.startswith(CLASSIFIER))
    encoder_only = {key: value for key, value in state.items() if not key.startswith(CLASSIFIER)}
    torch.save(published(encoder_only, prefix=prefix, width=weight.shape[1]), tmp_path / "checkpoint.pth")
    for precision, dtype in PRECISIONS.items():
        tolerance = {"rtol": 1e-4, "atol": 2e-5 if name == "convnext" else 1e-4}
        encoder = load_encoder(tmp_path / "checkpoint.pth", min_over="batch").to(dtype)
        per_image = load_encoder(tmp_path / "checkpoint.pth").to(dtype)
        assert encoder.config.gamma == (2.0 if mode == "simpool" else None)

        def logits(x: Tensor) -> Tensor:
            return nn.functional.linear(encoder(x), weight.to(dtype), bias.to(dtype))  # noqa: B023

        for size in (f"{height}x{width}" for height, width in settings["sizes"]):
            x = torch.from_numpy(inputs[f"x_{size}"]).to(dtype)
            close(encoder(x), golden, f"feat_{size}", precision, **tolerance)
            if mode == "simpool":
                close(encoder.attention(x).flatten(1), golden, f"attn_{size}", precision, **tolerance)
                close(per_image(x), golden, f"feat_per_image_{size}", precision, **tolerance)
        x = torch.from_numpy(inputs[f"x_{'x'.join(map(str, settings['sizes'][0]))}"]).to(dtype)
        logits(x).backward(torch.from_numpy(inputs["g"]).to(dtype))
        assert check_gradients(encoder, golden, precision, rtol=1e-3) > 20


USUAL = ("vit_small_simpool", "resnet50_simpool")
CASES = [key.split("/")[0] for key in FULL_SIZE if key.endswith("/meta")]


@pytest.mark.parametrize("case", [case if case in USUAL else pytest.param(case, marks=pytest.mark.long) for case in CASES])
def test_full_size(case: str, tmp_path: Path) -> None:
    """The published sizes, of which a file says all."""
    golden, settings = sub(FULL_SIZE, case), meta(FULL_SIZE, case)
    arch, mode = settings["arch"], settings["mode"]
    spec = [
        row[:2] for row in load_json("open_model_keys")[f"{arch}/{mode}"]["state_dict"] if not row[0].startswith(CLASSIFIER)
    ]
    state = tensors(synth_state(spec, settings["seed"]), torch.float32)
    path = tmp_path / "checkpoint.pth"
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}, "args": published({})["args"]}, path)
    rule = {"pos_interp": GOLDEN_POSITIONS[mode]} if arch == "vit_small" else {}
    encoder = load_encoder(path, **rule)
    path.unlink()
    assert (encoder.config.arch, encoder.config.width, encoder.config.depth) == (arch, None, None)
    height, width = settings["sizes"][-1]
    x = torch.from_numpy(synth_array(f"input_{height}x{width}", (settings["B"], 3, height, width), settings["seed"]))
    for precision, dtype in PRECISIONS.items():
        tolerance = EXACT if precision else {"rtol": 1e-3, "atol": 2e-4}
        encoder = encoder.to(dtype)
        with torch.no_grad():
            features = f"feat_per_image_{height}x{width}" if mode == "simpool" else f"feat_{height}x{width}"
            assert_close(encoder(x.to(dtype)), golden[f"out{precision}/{features}"], **tolerance)
            if mode == "simpool":
                attention = encoder.attention(x.to(dtype)).flatten(1)
                assert_close(attention, golden[f"out{precision}/attn_{height}x{width}"], **tolerance)


# -- what a file says, and what it does not


def tiny(arch: str = "vit_small", **options: Any) -> Encoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 64, "depth": 2, "image_size": 64} if arch == "vit_small" else {"width": 8}
    encoder = build_encoder(ModelConfig(arch, **{**sizes, **options}))
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.eval()


def backbone(encoder: Encoder, layout: Any = "dino") -> dict[str, Tensor]:
    return {name.removeprefix("backbone."): value for name, value in to_official(encoder.state_dict(), layout=layout).items()}


PICTURES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)


def test_gamma_of_a_vit_is_that_of_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoint.pth"
    encoder = tiny(gamma=1.25, beta=True)
    for gamma in (1.25, 2.0, None, "None"):
        torch.save(published(backbone(encoder), gamma=gamma), path)
        assert load_encoder(path).config.gamma == 1.25
        assert load_encoder(path, gamma=3.0).config.gamma == 3.0
    torch.save(published(backbone(encoder), gamma=2.0), path)
    assert load_encoder(path, which="student").config.gamma == 2.0  # the student's was what was asked for
    assert torch.equal(load_encoder(path)(PICTURES), encoder(PICTURES))
    torch.save(backbone(encoder), path)  # and without arguments
    capsys.readouterr()
    assert load_encoder(path).config.gamma == 1.25
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: official SimPool backbone, teacher weights: arch vit_small (from its shapes); ")
    for part in (
        "width 64 (from its shapes)",
        "heads 1 (width / 64, as in all published sizes)",
        "gamma 1.25 (that of the published teacher of a ViT with beta)",
        "pos_interp dino (the published rule)",
        "norm_order pool_then_norm (as published)",
        "mean 0.485 0.456 0.406 (as published)",
        "min_over image (min_over=batch repeats the published code)",
    ):
        assert part in said
    assert said.count("\n") == 1

    without = tiny()
    torch.save(published(backbone(without), gamma=None), path)
    assert load_encoder(path).config.gamma is None
    torch.save(backbone(without), path)
    assert load_encoder(path).config.gamma is None
    assert torch.equal(load_encoder(path)(PICTURES), without(PICTURES))
    torch.save(published(backbone(without), gamma=1.25), path)
    with pytest.raises(ValueError, match=r"no simpool\.beta, but its arguments say gamma 1\.25"):
        load_encoder(path)
    assert load_encoder(path, gamma=None).config.gamma is None


def test_gamma_of_a_cnn_is_in_its_arguments_or_asked_for(tmp_path: Path) -> None:
    path, encoder = tmp_path / "checkpoint.pth", tiny("resnet18", gamma=2.0)
    torch.save(backbone(encoder), path)
    with pytest.raises(ValueError, match=r"does not say gamma .*: give gamma=2\.0, in a command --model\.gamma 2\.0$"):
        load_encoder(path)
    assert torch.equal(load_encoder(path, gamma=2.0)(PICTURES), encoder(PICTURES))
    assert load_encoder(path, answers={"gamma": 2.0}).config == load_encoder(path, gamma=2.0).config
    torch.save(published(backbone(encoder), gamma=None), path)
    assert load_encoder(path).config.gamma is None
    assert load_encoder(path, answers={"gamma": 2.0}).config.gamma is None  # the file says it


def test_positions_of_early_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, path = tiny(gamma=1.25, beta=True, pos_interp="dino_legacy"), tmp_path / "checkpoint.pth"
    state = backbone(encoder)
    state["pos_embed"] = torch.cat([torch.randn(1, 1, 64), state["pos_embed"]], 1)
    torch.save(published(state), path)
    loaded = load_encoder(path)
    assert loaded.config.pos_interp == "dino_legacy" and "17 rows without a class token" in capsys.readouterr().err
    for x in (PICTURES, PICTURES[..., :48, :32]):
        assert torch.equal(loaded(x), encoder(x))
    assert load_encoder(path, pos_interp="dino").config.pos_interp == "dino"


def test_official_dino_backbone(tmp_path: Path) -> None:
    encoder, path = tiny(pool="cls", pos_interp="dino"), tmp_path / "dino_deitsmall16_pretrain.pth"
    for content in (backbone(encoder), published(backbone(encoder)), published(backbone(encoder), prefix="module.")):
        torch.save(content, path)
        loaded = load_encoder(path)
        assert loaded.config.pool == "cls" and torch.equal(loaded(PICTURES[..., :48]), encoder(PICTURES[..., :48]))
    save_file(backbone(encoder), path.with_suffix(".safetensors"))
    assert torch.equal(load_encoder(path.with_suffix(".safetensors"))(PICTURES), encoder(PICTURES))


@pytest.mark.parametrize("arch", ["vit_small", "resnet18", "convnext_tiny"])
def test_supervised_simpool_files(arch: str, tmp_path: Path) -> None:
    vit = arch == "vit_small"
    order = {"norm_order": "norm_then_pool"} if vit else {}
    encoder, path = tiny(arch, gamma=2.0, **order), tmp_path / "model_best.pth.tar"
    classifier = {"classifier.weight": torch.randn(5, encoder.embed_dim), "classifier.bias": torch.randn(5)}
    state = to_official({**encoder.state_dict(), **classifier}, layout="supervised")
    split = {"layer1.0.bn1.aux_bn.0.weight": torch.ones(8)} if arch == "resnet18" else {}
    content = {
        "epoch": 3,
        "arch": {"vit_small": "vit_small_patch16_224"}.get(arch, arch),
        "state_dict": {f"module.{name}": value * 0 for name, value in (state | split).items()},
        "state_dict_ema": {f"module.{name}": value for name, value in (state | split).items()},
        "version": 2,
        "args": argparse.Namespace(model=arch, gamma=2.0, mean=None, std=None, crop_pct=None),
    }
    torch.save(content, path)
    loaded = load_encoder(path)
    assert torch.equal(loaded(PICTURES), encoder(PICTURES))
    config = loaded.config
    assert config.mean == ((0.5, 0.5, 0.5) if vit else (0.485, 0.456, 0.406)) and config.gamma == 2.0 and not config.beta
    assert config.resize == (71 if vit else 256) and config.norm_order == order.get("norm_order", "pool_then_norm")
    assert not load_encoder(path, which="student")(PICTURES).equal(loaded(PICTURES))
    for key in (f"module.{name}" for name in state if name.endswith(("fc.bias", "head.bias", "wq.weight"))):
        damaged = {name: value for name, value in content["state_dict_ema"].items() if name != key}
        torch.save({**content, "state_dict_ema": damaged}, path)
        with pytest.raises(ValueError, match=f"1 missing: {key.removeprefix('module.')}"):
            load_encoder(path)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "resnet18", "convnext_tiny"])
def test_state_dicts_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = name.endswith("patch16_224")
    sizes: dict[str, Any] = {"depth": 2} if vit else {"dims": (8, 16, 32, 64)} if name == "convnext_tiny" else {}
    model = timm.create_model(name, num_classes=7, **sizes).eval()
    state, x, path = model.state_dict(), torch.randn(2, 3, 224, 224), tmp_path / "model.pth"
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    mean = timm.get_pretrained_cfg(name).mean
    if vit:
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"does not say mean \(ImageNet's for DeiT .* give mean=\[0\.5,0\.5,0\.5\]"):
            load_encoder(path)
    torch.save({"arch": name, "state_dict": state, "epoch": 3}, path)
    loaded = load_encoder(path)
    torch.testing.assert_close(loaded(x), expected)
    assert loaded.config.mean == mean


@pytest.mark.parametrize("name", ["vit_b_16", "convnext_tiny", "resnet18"])
def test_state_dicts_of_torchvision(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if name == "vit_b_16":
        sizes = {"num_layers": 2, "num_heads": 1, "hidden_dim": 64, "mlp_dim": 256}
        model: Any = torchvision.models.VisionTransformer(image_size=64, patch_size=16, **sizes)
    else:
        model = getattr(torchvision.models, name)()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    loaded = load_encoder(tmp_path / "model.pth")
    for head in ("heads", "fc"):
        setattr(model, head, nn.Identity())
    if name == "convnext_tiny":
        model.classifier[2] = nn.Identity()
    torch.testing.assert_close(loaded(PICTURES), model.eval()(PICTURES))
    assert loaded.config.mean == (0.485, 0.456, 0.406)


def test_untrained_weights_of_a_file_of_others_are_those_of_seed_0(tmp_path: Path) -> None:
    encoder, path = tiny("resnet18", gamma=2.0), tmp_path / "checkpoint.pth"
    torch.save(published(backbone(encoder)), path)
    untrained = load_encoder(path, which="untrained")
    torch.manual_seed(0)
    fresh = build_encoder(untrained.config)
    assert all(torch.equal(value, untrained.state_dict()[name]) for name, value in fresh.state_dict().items())
    assert untrained.epochs == 0 and load_encoder(path).epochs == 99


# -- damage


def damaged(state: dict[str, Tensor], key: str, how: str) -> dict[str, Tensor]:
    others = {name: value for name, value in state.items() if name != key}
    value = state[key]
    return {
        "deleted": others,
        "renamed": others | {f"{key}_x": value},
        "one more dimension": others | {key: value[None]},
        "shorter": others | {key: value[..., :-1] if value.ndim else value[None]},
    }[how]


FILES = [("vit", mode) for mode in ("simpool", "official")] + [
    (name, mode) for name in ("resnet18", "resnet50", "convnext") for mode in ("simpool", "official")
]


def check_damage(name: str, mode: str, path: Path, *, every: int) -> None:
    state = golden_vit(mode)[1] if name == "vit" else golden_cnn(name, mode)[1]
    options = {"heads": 3} if name == "vit" else {}
    number = 0
    for key in state:
        for how in ("deleted", "renamed", "one more dimension", "shorter"):
            number += 1
            if number % every:
                continue
            torch.save(published(damaged(state, key, how)), path)
            with pytest.raises(ValueError) as error:
                load_encoder(path, **options)
            assert key in str(error.value) and "\n" not in str(error.value), (key, how, str(error.value))


@pytest.mark.parametrize(("name", "mode"), FILES)
def test_one_damaged_key_is_named(name: str, mode: str, tmp_path: Path) -> None:
    check_damage(name, mode, tmp_path / "checkpoint.pth", every=97)


@pytest.mark.long
@pytest.mark.parametrize(("name", "mode"), FILES)
def test_each_damaged_key_is_named(name: str, mode: str, tmp_path: Path) -> None:
    check_damage(name, mode, tmp_path / "checkpoint.pth", every=1)


@pytest.mark.parametrize(
    "key",
    ["pos_embed", "cls_token", "patch_embed.proj.weight", "norm.weight", "blocks.1.attn.qkv.weight", "blocks.0.norm1.bias"],
)
@pytest.mark.parametrize("how", ["deleted", "renamed", "one more dimension", "shorter"])
def test_keys_from_which_a_size_is_read(key: str, how: str, tmp_path: Path) -> None:
    state = backbone(tiny(pool="cls"))
    torch.save(damaged(state, key, how), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=re.escape(key)):
        load_encoder(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize(
    ("how", "prefix"), [("deleted", "module."), ("renamed", ""), ("one more dimension", ""), ("shorter", "module.")]
)
def test_a_damaged_head_is_named(how: str, prefix: str, tmp_path: Path) -> None:
    content = published(backbone(tiny("resnet18", gamma=2.0)), prefix=prefix, width=64)
    keys = [key for key in content["teacher"] if "head." in key]
    assert len(keys) == (18 if prefix else 8)
    for key in keys[:: 1 if prefix == "" else 2]:
        torch.save({**content, "teacher": damaged(content["teacher"], key, how)}, tmp_path / "checkpoint.pth")
        with pytest.raises(ValueError, match=re.escape(key.removeprefix("module."))):
            load_encoder(tmp_path / "checkpoint.pth")


class Malicious:
    """Unpickled by torch.load without weights_only, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["args", "optimizer", "teacher", "epoch", "format"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_planted_object_is_named_and_does_not_run(place: str, zipped: bool, tmp_path: Path) -> None:
    proof, path = tmp_path / "was_here", tmp_path / "checkpoint.pth"
    torch.save(published(backbone(tiny())) | {place: Malicious(proof)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"^{path} cannot be read \(it holds \w+\.mkdir, and loading it could run code"):
        load_encoder(path)
    assert not proof.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.touch(), r"cannot be read \(it is empty, 0 bytes\): copy it again"),
        (lambda path: path.mkdir(), "no checkpoint .*: it is a folder, give a file in it, such as last.pth"),
        (lambda path: path.write_text("weights\n" * 99), r"cannot be read \(it is no checkpoint\): give a file of weights"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "cannot be read"),
        (lambda path: torch.save([1, 2], path), "holds a list: give a dictionary of weights"),
        (lambda path: torch.save({}, path), "holds no encoder of others: it has no weights, give a checkpoint"),
        (lambda path: torch.save({"epoch": 3}, path), "the checkpoint has no teacher: it has epoch"),
        (lambda path: torch.save({"last_layer.weight_g": torch.ones(2, 1)}, path), "there is a head but no encoder"),
        (lambda path: torch.save(tiny().state_dict(), path), "bare weights of this tool, without the options of their model"),
        (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), "it is TorchScript, which is code"),
    ],
)
def test_other_files_are_one_clear_line(make: Any, said: str, tmp_path: Path) -> None:
    make(tmp_path / "weights.pth")
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        load_encoder(tmp_path / "weights.pth")
    assert "\n" not in str(error.value) and str(tmp_path / "weights.pth") in str(error.value)


@pytest.mark.parametrize("text", ["", "no safetensors"])
def test_a_broken_safetensors_file_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read") as error:
        load_encoder(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value)


def test_encoders_of_other_kinds_are_sent_to_timm(tmp_path: Path) -> None:
    for name in ("vit_small_patch14_reg4_dinov2", "convnextv2_atto", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050"):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        torch.save({key: torch.zeros(value.shape) for key, value in model.state_dict().items()}, tmp_path / "model.pth")
        with pytest.raises(
            ValueError, match="for any encoder of timm, give the checkpoint timm:NAME and the file with --weights"
        ):
            load_encoder(tmp_path / "model.pth")
