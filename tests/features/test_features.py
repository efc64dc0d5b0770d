"""Feature extraction: a row for each image, whatever batches, workers and processes. Home of the tiny images and encoder."""

from __future__ import annotations

import dataclasses
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from test_distributed import group, run_processes, values
from torch import Tensor, nn

from dino_simpool import distributed
from dino_simpool.config import DEFAULT_DECODING, LinearConfig, ModelConfig
from dino_simpool.data import EvalTransform, ImageSet, class_folder, find_images
from dino_simpool.data.decode import read_rgb
from dino_simpool.eval import linear
from dino_simpool.eval.knn import knn_accuracy
from dino_simpool.features.encode import Forward, extract_features, preprocessing, try_sizes
from dino_simpool.models.encoder import build_encoder

CPU = torch.device("cpu")
CONFIG = ModelConfig(arch="resnet18", pool="gap", image_size=8)
TRANSFORM = EvalTransform(8, resize=9, mean=CONFIG.mean, std=CONFIG.std)


class TinyEncoder(nn.Module):
    """Six features of 8 x 8 images, with a BatchNorm and a dropout that must be in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.decoding, self.embed_dim, self.num_seen = CONFIG, DEFAULT_DECODING, 6, 0
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Dropout(0.5)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        self.num_seen += len(images)
        return self.drop(self.norm(self.conv(images))).relu().mean((2, 3))


def write_images(root: Path, counts: dict[str, int], *, seed: int = 0, size: int = 10) -> Path:
    """counts[c] images in each class folder c: noise around a color of the class, wider than high."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        color = np.random.default_rng(list(name.encode())).integers(60, 196, 3)
        for i in range(count):
            noise = rng.integers(-60, 60, (size, size + 3, 3))
            Image.fromarray((color + noise).clip(0, 255).astype(np.uint8)).save(root / name / f"{i:03d}.png")
    return root


def one_by_one(encoder: nn.Module, images: ImageSet) -> Tensor:
    """The features of an independent loop."""
    encoder.eval()
    with torch.no_grad():
        return torch.cat([encoder(TRANSFORM(read_rgb(images.path(i)))[None]) for i in range(len(images))])


def extract(
    images: ImageSet, *, encoder: nn.Module | None = None, batch_size: int = 4, workers: int = 0, precision: str = "fp32"
):
    encoder = encoder or TinyEncoder()
    return extract_features(encoder, images, Forward(TRANSFORM, batch_size, workers, precision))


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return find_images(str(write_images(tmp_path / "images", {"a": 4, "b": 3})))


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (6, 0), (7, 0), (100, 0), (3, 2)])
def test_equal_to_a_loop(images: ImageSet, batch_size: int, workers: int):
    features = extract(images, batch_size=batch_size, workers=workers)
    assert features.dtype == torch.float32 and features.shape == (7, 6) and features.device == CPU
    torch.testing.assert_close(features, one_by_one(TinyEncoder(), images), rtol=1e-6, atol=1e-6)


def test_modes_are_kept(images: ImageSet):
    encoder = TinyEncoder().train()
    encoder.norm.eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    extract(images, encoder=encoder)
    assert [m.training for m in (encoder, encoder.conv, encoder.norm, encoder.drop)] == [True, True, False, True]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_modes_are_kept_after_an_error(images: ImageSet):
    class Broken(TinyEncoder):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("broken")

    encoder = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        extract(images, encoder=encoder)
    assert encoder.training and encoder.drop.training


def test_features_can_be_trained_on(images: ImageSet):
    layer = nn.Linear(6, 2)
    layer(extract(images)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_bf16_rounds_the_products_only(images: ImageSet):
    exact, rounded = extract(images), extract(images, precision="bf16")
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        (ModelConfig("resnet18", width=8), [64, 33], ""),
        (
            ModelConfig("resnet18", width=8),
            [64, 32],
            r"^resnet18 turns images of 32 x 32 pixels into a 1 x 1 map, 2 x 2 is the",
        ),
        (ModelConfig("convnext_atto", depth=1), [64], ""),
        (
            ModelConfig("convnext_atto", depth=1),
            [63],
            "into a 1 x 1 map.*: set model.stem small, fewer stages in model.depth, or",
        ),
        (ModelConfig("vit_tiny", depth=1), [16], ""),  # of a ViT one patch is enough
        (ModelConfig("vit_tiny", depth=1), [16, 15], "15 x 15 pixels are smaller than a patch"),
    ],
)
def test_sizes_are_tried(model: ModelConfig, sizes: list[int], message: str):
    encoder = build_encoder(model)
    if message:
        with pytest.raises(ValueError, match=message):
            try_sizes(encoder, sizes)
    else:
        try_sizes(encoder, sizes)
    assert all(module.training for module in encoder.modules())


def test_broken_features_name_the_image(images: ImageSet):
    class Damaged(TinyEncoder):
        def forward(self, images: Tensor) -> Tensor:
            features = super().forward(images)
            features[-1, 2] = float("nan")
            return features

    with pytest.raises(ValueError, match=r"2 of 7 features are not finite, the first of .*a/003.png"):
        extract(images, encoder=Damaged(), batch_size=4)


def in_two_processes(rank: int, root: str) -> None:
    """What every process computes; see test_two_processes_equal_one."""
    torch.set_num_threads(1)
    if rank >= 0:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{root}/store", rank=rank, world_size=2, timeout=timedelta(minutes=2)
        )
    train, val, single = (class_folder(f"{root}/{name}") for name in ("train", "val", "single"))
    accuracy = knn_accuracy(TinyEncoder(), train, val, Forward(TRANSFORM, 2, 0), ks=(1, 5))
    config = {"data": root, "epochs": 3, "probe_batch_size": 3, "batch_size": 2, "workers": 0, "lr": 20.0}
    probes = [linear.evaluate(TinyEncoder(), LinearConfig(protocol=protocol, **config)) for protocol in ("paper", "grid")]
    encoder = TinyEncoder()
    results = {
        "features": extract(train, encoder=encoder),
        "num_seen": encoder.num_seen,
        "single": extract(single),
        "knn": dataclasses.asdict(accuracy),
        "probes": probes,
    }
    torch.save(results, f"{root}/results{rank}.pth")
    distributed.cleanup()


def test_two_processes_equal_one(tmp_path: Path):
    write_images(tmp_path / "train", {"a": 4, "b": 3, "c": 3, "d": 2, "e": 1}, seed=1)
    write_images(tmp_path / "val", {"a": 3, "b": 2, "c": 2}, seed=2)
    write_images(tmp_path / "single", {"a": 1}, seed=3)
    for name in ("a/000.png", "c/002.png"):
        shutil.copy(tmp_path / "train" / name, tmp_path / "val" / name.replace("/", "/copy_"))
    in_two_processes(-1, str(tmp_path))
    # This process is the first of the two: starting one takes seconds.
    second = mp.get_context("spawn").Process(target=in_two_processes, args=(1, str(tmp_path)), daemon=True)
    second.start()
    in_two_processes(0, str(tmp_path))
    second.join(60)
    assert second.exitcode == 0
    one, *two = (torch.load(tmp_path / f"results{rank}.pth", weights_only=True) for rank in (-1, 0, 1))
    assert (one["num_seen"], two[0]["num_seen"], two[1]["num_seen"]) == (13, 7, 6)
    for results in two:
        torch.testing.assert_close(results["features"], one["features"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(results["single"], one["single"], rtol=1e-6, atol=1e-6)
        assert results["knn"] == one["knn"] and one["knn"]["overlap"]["equal_files"] == 2
        for probe, expected in zip(results["probes"], one["probes"], strict=True):
            torch.testing.assert_close(probe["weight"], expected["weight"], rtol=1e-4, atol=1e-6)
            for name in probe.keys() - {"weight", "bias", "curve"}:
                assert probe[name] == expected[name], name
        losses = [[line["train_loss"] for line in probes[0]["curve"]] for probes in (results["probes"], one["probes"])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_preprocessing_is_that_of_the_model_unless_another_size_is_asked_for():
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    model = ModelConfig(image_size=224, resize=230, mean=(0.5, 0.4, 0.3), std=(0.2, 0.1, 0.3))
    own = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.1, 0.3)}
    assert preprocessing(ModelConfig()) == {"image_size": 224, "resize": 256, **imagenet}
    assert preprocessing(model) == {"image_size": 224, "resize": 230, **own}
    assert preprocessing(model, resize=240) == {"image_size": 224, "resize": 240, **own}
    assert preprocessing(model, image_size=96) == {"image_size": 96, "resize": 109, **own}  # 109.7
    assert preprocessing(model, image_size=96, resize=96) == {"image_size": 96, "resize": 96, **own}
    assert preprocessing(None, image_size=8) == {"image_size": 8, "resize": 9, **imagenet}
    with pytest.raises(ValueError, match="give --image_size"):
        preprocessing(None, resize=9)


def broken_numbers(root: str) -> set[int]:
    distributed.setup("cpu")
    broken: set[int] = set()
    extract_features(TinyEncoder(), find_images(root), Forward(TRANSFORM, 2, 0), broken=broken)
    return broken


def test_broken_images_are_known_to_every_process(tmp_path: Path):
    """Images 1 and 4 of 5, the shares of different processes."""
    write_images(tmp_path / "images", {"a": 5})
    for number in (1, 4):
        (tmp_path / f"images/a/{number:03d}.png").write_bytes(b"no image")
    assert values(run_processes(broken_numbers, str(tmp_path / "images"), environments=group())) == [{1, 4}, {1, 4}]
