"""Published checkpoints and encoders of timm, through the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_official_files import backbone, published, tiny

from dino_simpool import cli
from dino_simpool.checkpoint import load_encoder
from dino_simpool.data import EvalTransform
from dino_simpool.files import file_sha256


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: data/train and data/val with two classes of three images, and a published checkpoint."""
    random = np.random.default_rng(0)
    for folder in (tmp_path / "data" / split / name for split in ("train", "val") for name in ("a", "b")):
        folder.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(random.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    torch.save(published(backbone(tiny("resnet18", gamma=2.0))), tmp_path / "checkpoint0100.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> int:
    return cli.main([*command.split(), "--workers", "0", "--device", "cpu"])


def record(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_text())
    return found


def images(encoder: Any) -> torch.Tensor:
    config = encoder.config
    resize = config.resize or config.image_size * 256 // 224
    transform = EvalTransform(image_size=config.image_size, resize=resize, mean=config.mean, std=config.std)
    paths = sorted(Path("data/val").rglob("*.png"))
    return torch.stack([torch.as_tensor(transform(Image.open(path).convert("RGB"))) for path in paths])


def test_knn_of_a_published_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("knn --checkpoint checkpoint0100.pth --data data --k [1] --image_size 64") == 0
    said = capsys.readouterr()
    assert "checkpoint0100.pth: official SimPool checkpoint, teacher weights: arch resnet18" in said.err
    found = record("results/knn_checkpoint0100.json")
    assert found["model"]["gamma"] == 2.0 and found["model"]["min_over"] == "image" and found["model"]["epochs"] == 99
    assert found["model"]["sha256"] == file_sha256("checkpoint0100.pth")
    assert run("knn --checkpoint checkpoint0100.pth --data data --k [1] --image_size 64 --model.gamma 3.0 --out other") == 0
    assert record("other/knn.json")["model"]["gamma"] == 3.0 and record("other/knn.json")["config"]["model"] == {"gamma": 3.0}
    assert "gamma 3.0 (given)" in capsys.readouterr().err


def test_features_and_search_with_a_published_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("extract --checkpoint checkpoint0100.pth --data data/val --out index --index --image_size 64") == 0
    assert run("search --index index --query data/val/a/0.png --out found") == 0
    assert record("found/results.json")["queries"][0]["neighbors"][0]["name"] == "a/0.png"
    assert "(given)" not in capsys.readouterr().err  # what the index repeats is what the file says


def test_commands_with_an_encoder_of_timm(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(model.state_dict(), "vit.pth")
    encoder = "--checkpoint timm:test_vit --weights vit.pth"
    assert run(f"knn {encoder} --data data --k [1] --out results") == 0
    found = record("results/knn.json")["model"]
    assert (found["arch"], found["source"], found["pool"], found["image_size"]) == ("timm:test_vit", "vit.pth", "cls", 160)
    assert found["sha256"] == file_sha256("vit.pth") and found["mean"] == [0.5, 0.5, 0.5]
    assert "timm:test_vit: weights: vit.pth; pool cls; images of 160 pixels, mean 0.5 0.5 0.5" in capsys.readouterr().err

    assert run(f"extract {encoder} --data data/val --out index --index") == 0
    with torch.no_grad():
        expected = model(images(load_encoder("timm:test_vit", weights="vit.pth")))
    np.testing.assert_allclose(np.load("index/features.npy"), expected, rtol=1e-4, atol=1e-5)
    assert run("search --index index --query data/val/b/2.png --out found") == 0
    assert record("found/results.json")["queries"][0]["neighbors"][0]["name"] == "b/2.png"
    torch.save({name: value + 1 for name, value in model.state_dict().items()}, "vit.pth")
    capsys.readouterr()
    assert run("search --index index --query data/val/b/2.png --out found") == 1
    assert "the weights of timm:test_vit are not those of the index" in capsys.readouterr().err

    assert run("attention --checkpoint timm:test_vit --weights random --data data/val --max_images 1 --out maps") == 0
    assert run("attention --checkpoint timm:test_convnext --weights random --data data/val --max_images 1 --out none") == 1
    assert "timm:test_convnext has no class token, and so no attention maps" in capsys.readouterr().err
    assert run("extract --checkpoint timm:test_vit --weights random --data data/val --level keys --out keys") == 1
    assert "level keys needs SimPool, and this model has pool cls" in capsys.readouterr().err
