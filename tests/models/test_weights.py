"""Published files to ours and back, in every published layout, and files that are refused."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_simpool.config import ModelConfig
from dino_simpool.dino.model import DinoHead, DinoModel
from dino_simpool.models.encoder import build_encoder
from dino_simpool.models.weights import from_official, load_official, load_strict, to_official

TINY: dict[str, dict[str, Any]] = {
    "vit": {"arch": "vit_tiny", "width": 32, "heads": 1, "depth": 2, "image_size": 64},
    "resnet": {"arch": "resnet18", "width": 8},
    "convnext": {"arch": "convnext_tiny", "width": 8, "depth": (1, 1, 2, 1)},
}
POOLS: dict[str, dict[str, Any]] = {"simpool": {"gamma": 1.25, "beta": True}, "cls": {"pool": "cls"}, "gap": {"pool": "gap"}}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch norm": {"batch_norm": True},
    "one layer": {"layers": 1},
    "trained norm": {"layers": 4, "norm_last_layer": False},
}
COMBINATIONS = [(trunk, pool) for trunk in TINY for pool in POOLS if pool != "cls" or trunk == "vit"]


def model(trunk: str = "vit", pool: str = "simpool", head: str = "plain") -> DinoModel:
    encoder = build_encoder(ModelConfig(**TINY[trunk], **POOLS[pool]))
    return DinoModel(encoder, DinoHead(encoder.embed_dim, 20, hidden_dim=24, bottleneck_dim=8, **HEADS[head]))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize(("trunk", "pool"), COMBINATIONS)
def test_self_supervised_round_trip(trunk: str, pool: str, prefix: str) -> None:
    """Student and teacher, wrapped for several GPUs, compiled, or neither."""
    student, teacher = model(trunk, pool).state_dict(), model(trunk, pool).state_dict()
    checkpoint = {
        "student": {f"module.{name}": value for name, value in to_official(student).items()},
        "teacher": {f"{prefix}{name}": value for name, value in to_official(teacher).items()},
        "epoch": 3,
    }
    assert equal(from_official(checkpoint), teacher)
    assert equal(from_official(checkpoint, which="student"), student)
    load_strict(model(trunk, pool), from_official(checkpoint), source="file")


@pytest.mark.parametrize("head", HEADS)
def test_heads_round_trip(head: str) -> None:
    state = model(head=head).state_dict()
    official = to_official(state)
    assert equal(from_official(official), state)
    assert {"head.last_layer.weight_g", "head.last_layer.weight_v"} < official.keys()
    assert ("head.mlp.weight" in official) == (head == "one layer")


@pytest.mark.parametrize(("trunk", "pool"), COMBINATIONS)
def test_supervised_round_trip(trunk: str, pool: str) -> None:
    """The timm fork: other names, a moving average, BatchNorm split over augmentations."""
    encoder = build_encoder(ModelConfig(**TINY[trunk], **POOLS[pool]))
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {"classifier.weight": torch.randn(5, encoder.embed_dim), "classifier.bias": torch.randn(5)}
    official = to_official(state, layout="supervised")
    names = {
        "vit": ("gp.pool.wq.weight", "norm.weight", "head.weight"),
        "resnet": ("global_pool.pool.wq.weight", "layer4.1.bn2.weight", "fc.weight"),
        "convnext": ("head.global_pool.pool.wq.weight", "head.norm.weight", "head.fc.weight"),
    }[trunk]
    assert set(names if pool == "simpool" else names[1:]) <= official.keys()
    split = official | {"layer1.0.bn1.aux_bn.0.weight": torch.randn(8)}
    average = {name: value + 1 for name, value in official.items()}
    checkpoint = {"state_dict": split, "arch": "x", "version": 2}
    assert equal(from_official(checkpoint), state)
    assert equal(from_official(checkpoint | {"state_dict_ema": average}), {name: value + 1 for name, value in state.items()})
    assert equal(from_official(checkpoint | {"state_dict_ema": average}, which="student"), state)


@pytest.mark.parametrize(("trunk", "pool"), COMBINATIONS)
def test_bare_encoders_and_our_own_names(trunk: str, pool: str) -> None:
    """A backbone alone, as in pre-trained files of DINO, and our own files."""
    state = model(trunk, pool).state_dict()
    encoder = {name: value for name, value in state.items() if name.startswith("encoder.")}
    backbone = {name.removeprefix("backbone."): value for name, value in to_official(encoder).items()}
    assert equal(from_official(backbone), encoder)
    assert equal(from_official(state), state)
    assert equal(from_official({"teacher": state}), state)
    assert equal(from_official({name.removeprefix("encoder."): value for name, value in encoder.items()}), encoder)
    assert to_official({name.removeprefix("encoder."): value for name, value in encoder.items()}).keys() == {
        f"backbone.{name}" for name in backbone
    }


def test_published_names() -> None:
    """Some names of the published files, written by hand."""
    convnext = to_official(model("convnext").state_dict())
    assert {
        "backbone.downsample_layers.0.1.weight",
        "backbone.downsample_layers.3.1.bias",
        "backbone.stages.2.1.dwconv.weight",
        "backbone.stages.0.0.pwconv2.bias",
        "backbone.stages.0.0.gamma",
        "backbone.norm.weight",
        "backbone.simpool.norm_patches.bias",
        "backbone.simpool.beta",
        "head.mlp.4.weight",
    } <= convnext.keys()
    normed = to_official(model("resnet", head="batch norm").state_dict())
    assert {
        "backbone.layer2.0.downsample.1.running_mean",
        "backbone.simpool.wk.weight",
        "head.mlp.4.running_var",
        "head.mlp.6.bias",
    } <= normed.keys()
    assert normed["head.mlp.3.weight"].shape == (24, 24)
    assert normed["head.mlp.4.weight"].shape == (24,)


def test_weight_norm_files_of_torch_load_into_the_head() -> None:
    head = DinoHead(8, 20, hidden_dim=24, bottleneck_dim=8, norm_last_layer=False)
    scale, direction = torch.rand(20, 1) + 1, torch.randn(20, 8)
    state = to_official({f"head.{name}": value for name, value in head.state_dict().items()})
    state |= {"head.last_layer.weight_g": scale, "head.last_layer.weight_v": direction}
    ours = {name.removeprefix("head."): value for name, value in from_official(state).items() if name.startswith("head.")}
    load_strict(head, ours, source="file")
    torch.testing.assert_close(head.last_layer.weight, direction / direction.norm(dim=1, keepdim=True) * scale)


def test_early_files_lose_the_position_of_the_class_token() -> None:
    state = model().state_dict()
    official = to_official(state)
    official["backbone.pos_embed"] = torch.cat([torch.randn(1, 1, 32), official["backbone.pos_embed"]], 1)
    with pytest.warns(UserWarning, match="dino_legacy"):
        assert equal(from_official(official), state)


def test_class_token_models_keep_their_positions(recwarn: pytest.WarningsRecorder) -> None:
    state = model(pool="cls").state_dict()
    assert equal(from_official(to_official(state)), state)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone.rope.freqs": torch.zeros(1)}, r"backbone|rope\.freqs"),
        ({"stray": torch.zeros(1)}, "stray"),
        ({"head.predictor.weight": torch.zeros(1)}, "predictor"),
    ],
)
def test_unknown_names_are_refused(change: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_official(to_official(model().state_dict()) | change)


def test_wrong_content_is_refused() -> None:
    with pytest.raises(ValueError, match="no teacher"):
        from_official({"epoch": 3, "optimizer": {}})
    with pytest.raises(ValueError, match="no ViT"):
        from_official({"features.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no place"):
        to_official(model().state_dict(), layout="supervised")


def test_loading_is_strict_and_names_what_differs() -> None:
    target, state = model().encoder, model().encoder.state_dict()
    wrong = {name: value for name, value in state.items() if "blocks.1." not in name} | {"extra": torch.zeros(1)}
    wrong["norm.weight"] = torch.zeros(7)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_strict(target, wrong, source="x.pth")
    message = str(error.value)
    assert "x.pth" in message and "12 missing" in message and "1 unexpected: extra" in message
    assert "norm.weight (7,) for (32,)" in message
    assert message.count("trunk.blocks.1.") == 5 and "\n" not in message
    assert equal(before, dict(target.state_dict()))


def published_file() -> dict[str, Any]:
    """What main_dino.py of DINO saves, with options and the rate of a NumPy schedule."""
    state = to_official(model().state_dict())
    return {
        "student": state,
        "teacher": state,
        "epoch": 4,
        "dino_loss": {"center": torch.zeros(1, 20)},
        "args": argparse.Namespace(arch="vit_small", output_dir=pathlib.PosixPath("out")),
        "optimizer": {"param_groups": [{"lr": np.float64(1e-3), "weight_decay": np.float64(0.04)}], "state": {}},
    }


@pytest.mark.parametrize("new_format", [True, False])
def test_published_files_are_read(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(published_file(), path, _use_new_zipfile_serialization=new_format)
    content = load_official(path)
    assert content["args"].arch == "vit_small"
    assert content["optimizer"]["param_groups"][0]["lr"] == 1e-3
    load_strict(model(), from_official(content), source=str(path))


def test_files_of_old_numpy_are_read(tmp_path: Path) -> None:
    """They name the scalar's function numpy.core, which is numpy._core today."""
    path, old = tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save(published_file(), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(item, data)
    assert load_official(old)["optimizer"]["param_groups"][0]["weight_decay"] == 0.04


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_file_is_not_run(tmp_path: Path, write: Any) -> None:
    path, trace = tmp_path / "bad.pth", tmp_path / "trace"
    write({"teacher": Malicious(trace)}, path)
    with pytest.raises(ValueError, match=r"bad\.pth") as error:
        load_official(path)
    assert not trace.exists()
    assert "\n" not in str(error.value)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    torch.save(published_file(), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"half\.pth"):
            load_official(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="list"):
        load_official(path)
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "absent.pth")
