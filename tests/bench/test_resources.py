"""Parameters and multiply-adds against Table 8, torch's counter, and counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dino_simpool import cli
from dino_simpool.bench.resources import count_multiply_adds, encoder_of, resources
from dino_simpool.checkpoint import export_encoder
from dino_simpool.config import ModelConfig, ResourcesConfig
from dino_simpool.files import file_sha256
from dino_simpool.models.encoder import Encoder, build_encoder

BASELINE, SIMPOOL = "baseline", "simpool"
TABLE = {  # exact parameters; the paper's millions and billions; billions as counted for the specification
    ("resnet18", BASELINE): (11_689_512, 11.7, 1.82, 1.824),
    ("resnet18", SIMPOOL): (12_214_824, 12.2, 1.84, 1.837),
    ("resnet50", BASELINE): (25_557_032, 25.6, 4.13, 4.134),
    ("resnet50", SIMPOOL): (33_949_736, 33.9, 4.34, 4.344),
    ("convnext_small", BASELINE): (50_223_688, 50.2, 8.68, 8.684),
    ("convnext_small", SIMPOOL): (51_404_872, 51.4, 8.71, 8.713),
    ("vit_small", BASELINE): (22_050_664, 22.1, 4.24, 4.249),
    ("vit_small", SIMPOOL): (22_345_576, 22.3, 4.26, 4.257),
}


def model(arch: str, method: str) -> ModelConfig:
    if method == BASELINE:
        return ModelConfig(arch, pool="cls" if arch.startswith("vit") else "gap")
    return ModelConfig(arch, gamma=1.25 if arch.startswith("vit") else 2.0)


def on_meta(cfg: ModelConfig) -> Encoder:
    with torch.device("meta"):
        return build_encoder(cfg)


@pytest.mark.parametrize(("arch", "method"), TABLE)
def test_table_8(arch: str, method: str) -> None:
    params, millions, billions, counted = TABLE[arch, method]
    found = resources(on_meta(model(arch, method)))
    assert found["params"] == params and abs(found["params"] / 1e6 - millions) < 0.0501
    assert abs(found["macs_thop"] / 1e9 - counted) < 0.0006
    assert abs(found["macs_thop"] / 1e9 - billions) < 0.02


def test_attention_of_the_paper() -> None:
    """The specification's 4.599 billion for a ViT-S with attention has no norms."""
    parts = count_multiply_adds(model("vit_small", BASELINE), 224)
    assert parts["attention"] == 12 * 2 * 197**2 * 384
    assert round((parts["layers"] + parts["attention"] + 384_000) / 1e9, 3) == 4.599


def flops(encoder: nn.Module, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(image)
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(
    "options",
    [
        {"arch": "vit_tiny", "width": 32, "heads": 2, "depth": 2, "patch_size": 8, "image_size": 32, "pool": "cls"},
        {"arch": "vit_tiny", "width": 32, "heads": 2, "depth": 2, "patch_size": 8, "image_size": 32, "gamma": 1.25},
        {"arch": "vit_tiny", "width": 32, "heads": 2, "depth": 2, "patch_size": 8, "image_size": 32, "num_heads": 4},
        {"arch": "resnet18", "width": 8, "depth": (1, 1), "stem": "small", "pool": "gap"},
        {"arch": "resnet50", "width": 8, "depth": (1, 1, 1), "stem": "small", "gamma": 2.0},
        {"arch": "convnext_tiny", "width": 8, "depth": (1, 2), "stem": "small"},
    ],
)
def test_as_executed_is_what_torch_counts(options: dict[str, Any], size: int) -> None:
    """torch counts 2 per multiply-add, no norms, and the product for resampled positions."""
    encoder = build_encoder(ModelConfig(**options)).eval()
    for module in encoder.modules():
        if isinstance(module, Attention):
            module.fused_attn = False  # torch does not count its fused kernel of the CPU
    norms = count_multiply_adds(encoder.config, size)["norms"]
    ours = resources(encoder, image_size=size, num_classes=0)["macs_executed"] - norms
    resized = encoder.config.is_vit and size != 32
    positions = (size // 8) ** 2 * 16 * 32 if resized else 0
    assert 2 * (ours + positions) == flops(encoder, torch.randn(1, 3, size, size))


def test_a_vit_counted_by_hand() -> None:
    """Width 8, one block of 2 heads, patches of 4 pixels on 8 x 8: four tokens."""
    cfg = ModelConfig("vit_tiny", width=8, heads=2, depth=1, patch_size=4, image_size=8, gamma=1.25, beta=True)
    found = resources(build_encoder(cfg), num_classes=3)
    patches, block, pool = 4 * 48 * 8, 4 * 12 * 64, 5 * 64
    norms = 4 * (2 * 4 * 8 + 4 * 8 + 8)  # two of the block, SimPool's, and the final one of the pooled vector
    assert found["macs_thop"] == patches + block + pool + norms + 8 * 3
    assert found["macs_full"] == found["macs_thop"] + 2 * 16 * 8 + 2 * 4 * 8
    assert found["macs_executed"] == found["macs_full"] - 5 * 64 + 2 * 64
    weights = 48 * 8 + 8 + 4 * 8 + (2 * 16 + 8 * 24 + 24 + 64 + 8 + 2 * 8 * 32 + 32 + 8) + (2 * 64 + 16 + 1) + 16
    assert found["params"] == weights + 8 * 3 + 3


def test_a_resnet_counted_by_hand() -> None:
    """Width 4, stages of one block, 8 x 8 pixels; the second halves the map."""
    cfg = ModelConfig("resnet18", width=4, depth=(1, 1), stem="small", pool="gap", image_size=8)
    found = resources(build_encoder(cfg), num_classes=0)
    stem, first, second = 64 * 27 * 4, 64 * 2 * 9 * 16, 16 * (9 * 32 + 9 * 64 + 32)
    norms = 4 * (64 * 4 * 3 + 16 * 8 * 3)
    assert found["macs_thop"] == found["macs_full"] == found["macs_executed"] == stem + first + second + norms


def test_norms_of_convnext_are_a_class_of_their_own() -> None:
    parts = count_multiply_adds(ModelConfig("convnext_tiny", width=8, depth=(1, 1), stem="small"), 16)
    assert parts["norms"] == 4 * 8 * 8 * 16, "SimPool's only"


def test_unknown_attention_and_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match="ParallelScalingBlock, whose attention is not counted: use a standard ViT"):
        resources(on_meta(ModelConfig("vit_base_patch16_xp_224", pool="gap")))
    with pytest.raises(ValueError, match="larger images"):
        resources(on_meta(model("resnet18", BASELINE)), image_size=32)


def test_the_encoder_comes_from_one_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = ModelConfig("resnet18", width=8, depth=(1, 1), stem="small", pool="gap", image_size=16)
    export_encoder(tmp_path, build_encoder(tiny))
    encoder, record = encoder_of(ResourcesConfig(checkpoint=str(tmp_path / "backbone.safetensors")))
    assert encoder.config == tiny and record["sha256"] == file_sha256(tmp_path / "backbone.safetensors")
    assert encoder_of(ResourcesConfig(recipe="vit_small_simpool"))[0].config.gamma == 1.25
    assert encoder_of(ResourcesConfig(model=tiny))[0].config == tiny
    with pytest.raises(ValueError, match="recipe and model are given: an encoder comes from one of"):
        encoder_of(ResourcesConfig(recipe="vit_small_simpool", model=tiny))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resources", "--model.arch", "vit_small", "--model.pool", "cls"]) == 0
    printed = capsys.readouterr().out
    assert "22,050,664" in printed and "not written" in printed
    assert cli.main(["resources", "--recipe", "resnet50_simpool", "--num_classes", "0", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "resources.json").read_text())
    assert record["metrics"]["params"] == 31_900_736 and record["model"]["arch"] == "resnet50"
    assert record["config"]["recipe"] == "resnet50_simpool" and record["num_classes"] == 0 and record["image_size"] == 224
    assert cli.main(["resources", "--recipe", "no_such"]) == 1
    assert "no recipe no_such" in capsys.readouterr().err
