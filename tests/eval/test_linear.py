"""Linear probes against a plain torch loop: nn.Linear, autograd, torch.optim.SGD."""

from __future__ import annotations

import io
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from test_features import CONFIG, CPU, TinyEncoder, extract, one_by_one, write_images
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dino_simpool.checkpoint import export_encoder
from dino_simpool.config import LinearConfig, ModelConfig
from dino_simpool.data import class_folder, epoch_order, file_key
from dino_simpool.data.decode import EncodedImage
from dino_simpool.eval import linear, run
from dino_simpool.eval.linear import Heads, evaluate, probe_view, split_held_out
from dino_simpool.models.encoder import build_encoder

COUNTS = {"a": 4, "b": 3, "c": 1, "d": 2, "e": 3}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_images(tmp_path / "train", COUNTS, seed=1)
    write_images(tmp_path / "val", {"a": 2, "c": 3, "e": 2}, seed=2)
    return tmp_path


def config(data: Path, **options: Any) -> LinearConfig:
    plain = {"epochs": 6, "probe_batch_size": 4, "batch_size": 3, "workers": 0, "lr": 2.0, "seed": 5}
    return LinearConfig(data=str(data), **(plain | options))


def fit_heads(features: Tensor, labels: Tensor, *, learning_rates: list[float], num_classes: int, device: Any, **options: Any):
    heads = Heads(learning_rates, num_classes, features.shape[1], seed=options["seed"], device=device)
    return heads.fit(features, labels, **options)


def plain_head(num_classes: int, width: int, seed: int) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    head.weight.data = 0.01 * torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head


def plain_training(head: nn.Linear, features_of, labels: Tensor, *, lr: float, epochs: int, batch_size: int, seed: int):
    """After each epoch of plain SGD: (learning rate, mean loss). features_of(epoch, indices) gives (b, D)."""
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
    for epoch in range(epochs):
        total = 0.0
        for indices in torch.from_numpy(epoch_order(len(labels), seed=seed, epoch=epoch)).split(batch_size):
            loss = F.cross_entropy(head(features_of(epoch, indices)), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(indices)
        yield schedule.get_last_lr()[0], total / len(labels)
        schedule.step()


@pytest.mark.parametrize("batch", [1, 4, 6, 13])  # 13 images: with a last batch of 1, of 1, and none smaller
def test_paper_equals_a_plain_loop(data: Path, batch: int):
    cfg = config(data, probe_batch_size=batch)
    encoder = TinyEncoder().train()
    result = evaluate(encoder, cfg)
    assert encoder.training

    train, val = class_folder(str(data / "train")), class_folder(str(data / "val"))
    augment = partial(probe_view, image_size=8, mean=CONFIG.mean, std=CONFIG.std)
    encoder = TinyEncoder().eval()
    labels, val_x, val_y = torch.from_numpy(train.labels), one_by_one(encoder, val), torch.tensor([0, 0, 2, 2, 2, 4, 4])

    @torch.no_grad()
    def features_of(epoch: int, indices: Tensor) -> Tensor:
        images = [augment(train.encoded(i), seed=5, epoch=epoch, index=i)[0] for i in indices.tolist()]
        return encoder(torch.stack(images))

    head = plain_head(5, 6, seed=5)
    curve = []
    for lr, loss in plain_training(head, features_of, labels, lr=2.0 * batch / 256, epochs=6, batch_size=batch, seed=5):
        logits = head(val_x)
        curve.append((lr, loss, 100 * (logits.argmax(1) == val_y).double().mean().item()))
    assert [line["top1"] for line in result["curve"]] == pytest.approx([line[2] for line in curve])
    np.testing.assert_allclose(
        [(line["lr"], line["train_loss"]) for line in result["curve"]], [line[:2] for line in curve], rtol=2e-4
    )
    torch.testing.assert_close(result["weight"], head.weight.data, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result["bias"], head.bias.data, rtol=1e-3, atol=1e-5)
    assert result["best_top1"] == pytest.approx(max(line[2] for line in curve))
    assert result["last_top1"] == pytest.approx(curve[-1][2])
    assert result["curve"][result["probe"]["best_epoch"]]["top1"] == result["best_top1"]
    assert result["last_top5"] == 100.0 and result["selected_on"] == "val_epochs"
    assert result["counts"] == {"train": 13, "val": 7, "classes": 5}


@pytest.mark.parametrize("protocol", ["paper", "grid"])
def test_classes_and_copies_are_told(data: Path, protocol: str, monkeypatch: pytest.MonkeyPatch):
    """The classes by the head that is reported; each file is hashed once, in however many epochs it is read."""
    hashed = []
    for module in ("dino_simpool.data.loaders", "dino_simpool.eval.linear"):
        monkeypatch.setattr(f"{module}.file_key", lambda content: hashed.append(content) or file_key(content))
    shutil.copy(data / "train" / "d" / "001.png", data / "val" / "a" / "copy.png")
    result = evaluate(TinyEncoder(), config(data, protocol=protocol, epochs=3, lr=100.0, grid=(20.0,), seed=8))
    assert len(hashed) == 13 + 8 and result["overlap"] == {"same_folder": False, "equal_files": 1, "val": 8}
    val_x, labels = extract(class_folder(str(data / "val"))), torch.tensor([0, 0, 0, 2, 2, 2, 4, 4])
    right = (val_x @ result["weight"].T + result["bias"]).argmax(1) == labels  # of the last epoch
    shares = {name: 100 * right[labels == number].double().mean().item() for name, number in (("a", 0), ("c", 2), ("e", 4))}
    reported = {name: each["top1"] for name, each in result["per_class"].items()}
    assert list(reported) == list("abcde") and reported["b"] is reported["d"] is None
    assert result["last_balanced" if protocol == "paper" else "balanced"] == pytest.approx(sum(shares.values()) / 3)
    if protocol == "grid":
        assert {name: reported[name] for name in shares} == pytest.approx(shares)
    else:  # the reported epoch is not the one that the head is of
        assert result["probe"]["best_epoch"] == 0 and result["best_top1"] > result["last_top1"]
    best = result["best_top1" if protocol == "paper" else "top1"]
    assert sum(each["correct"] for each in result["per_class"].values()) == pytest.approx(best * 8 / 100)
    balanced = result["best_balanced" if protocol == "paper" else "balanced"]
    assert balanced == pytest.approx(sum(reported[name] for name in shares) / 3)


def test_learns(data: Path):
    """The colors of the classes are there to be learned: far above the 20 % of chance."""
    assert evaluate(TinyEncoder(), config(data, epochs=20))["last_top1"] > 60
    assert evaluate(TinyEncoder(), config(data, epochs=12, protocol="grid", grid=(1e-9, 2.0), held_out=0.4))["top1"] > 60


def test_published_settings():
    cfg = LinearConfig()
    assert (cfg.epochs, cfg.probe_batch_size, cfg.lr * cfg.probe_batch_size / 256) == (100, 1024, 0.004)
    assert linear.cosine(0, 100) == 1 and linear.cosine(50, 100) == pytest.approx(0.5) and 0 < linear.cosine(99, 100) < 3e-4
    heads = Heads([1.0], 300, 200, seed=0, device=CPU)
    assert heads.weight.std().item() == pytest.approx(0.01, rel=0.01) and heads.weight.mean().abs() < 1e-4
    assert not heads.bias.any()


def test_workers_change_nothing(data: Path):
    results = [evaluate(TinyEncoder(), config(data, workers=workers, epochs=3)) for workers in (0, 2)]
    assert torch.equal(results[0]["weight"], results[1]["weight"])
    assert results[0]["curve"] == results[1]["curve"]


def test_forward_passes_and_seeds(data: Path):
    first = evaluate(TinyEncoder(), config(data, batch_size=3))
    torch.testing.assert_close(
        evaluate(TinyEncoder(), config(data, batch_size=1))["weight"], first["weight"], rtol=1e-3, atol=1e-5
    )
    assert not torch.allclose(evaluate(TinyEncoder(), config(data, seed=6))["weight"], first["weight"], rtol=1e-2)


def test_augmentation():
    """Crops and flips as torchvision's for the same box; boxes cover 8 to 100 % of the area; half of the images are flipped."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image, stored, mirrored = Image.fromarray(pixels), io.BytesIO(), 0
    image.save(stored, "PNG")
    file = EncodedImage(stored.getvalue())
    augment = partial(probe_view, image_size=12, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    areas = []
    for index in range(300):
        numbers = linear.uniforms(1, 2, index, rows=1, columns=23)[0].tolist()
        box = linear.crop_box(30, 40, scale=(0.08, 1.0), numbers=numbers[:22])
        crop = TF.resized_crop(image, *box, [12, 12], InterpolationMode.BILINEAR)
        (view,) = augment(file, seed=1, epoch=2, index=index)
        plain, flipped = TF.to_tensor(crop), TF.to_tensor(TF.hflip(crop))
        assert torch.allclose(view, plain, atol=1e-6) or torch.allclose(view, flipped, atol=1e-6)
        mirrored += torch.allclose(view, flipped, atol=1e-6)
        areas.append(box[2] * box[3] / 1200)
    assert 115 < mirrored < 185
    assert 0.07 < min(areas) < 0.12 and 0.9 < max(areas) <= 1
    assert not torch.equal(augment(file, seed=1, epoch=2, index=0)[0], augment(file, seed=1, epoch=3, index=0)[0])


def test_grid_equals_separate_runs():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(31, 7, generator=generator), torch.randint(0, 4, (31,), generator=generator)
    rates = [0.01, 0.3, 4.0]
    together = fit_heads(features, labels, learning_rates=rates, num_classes=4, epochs=5, batch_size=8, seed=3, device=CPU)
    for i, rate in enumerate(rates):
        alone = fit_heads(features, labels, learning_rates=[rate], num_classes=4, epochs=5, batch_size=8, seed=3, device=CPU)
        torch.testing.assert_close(together.weight[i], alone.weight[0], rtol=1e-4, atol=1e-6)
        head = plain_head(4, 7, seed=3)
        for _ in plain_training(head, lambda _, rows: features[rows], labels, lr=rate, epochs=5, batch_size=8, seed=3):
            pass
        torch.testing.assert_close(together.weight[i], head.weight.data, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(together.bias[i], head.bias.data, rtol=1e-3, atol=1e-5)


def test_a_rate_that_is_far_too_high_harms_no_other_head():
    features, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    settings = {"num_classes": 3, "epochs": 4, "batch_size": 5, "seed": 0, "device": CPU}
    heads = fit_heads(features, labels, learning_rates=[0.1, 1e12], **settings)
    assert heads.weight.isfinite().all()
    torch.testing.assert_close(heads.weight[:1], fit_heads(features, labels, learning_rates=[0.1], **settings).weight)


def test_grid_chooses_on_train_alone(data: Path):
    cfg = config(data, protocol="grid", grid=(10.0, 1e-3, 1.0, 1.0), held_out=0.3)
    result = evaluate(TinyEncoder(), cfg)
    train, val = class_folder(str(data / "train")), class_folder(str(data / "val"))
    train_x, val_x, labels = extract(train), extract(val), torch.from_numpy(train.labels)
    learn, held = split_held_out(labels, 0.3, seed=5)
    settings = {"num_classes": 5, "epochs": 6, "batch_size": 4, "seed": 5, "device": CPU}
    expected = []
    for lr in (1e-3, 1.0, 10.0):
        heads = fit_heads(train_x[learn], labels[learn], learning_rates=[lr * 4 / 256], **settings)
        predicted = (train_x[held] @ heads.weight[0].T + heads.bias[0]).argmax(1)
        expected.append({"lr": lr, "held_out_top1": 100 * (predicted == labels[held]).double().mean().item()})
    assert [line["lr"] for line in result["grid"]] == [1e-3, 1.0, 10.0]
    assert [line["held_out_top1"] for line in result["grid"]] == pytest.approx([line["held_out_top1"] for line in expected])
    best = max(expected, key=lambda line: line["held_out_top1"])["lr"]
    assert result["probe"] == {"lr": best, "learning_rate": best * 4 / 256, "batch_size": 4, "held_out": len(held)}
    final = fit_heads(train_x, labels, learning_rates=[best * 4 / 256], **settings)
    assert torch.equal(result["weight"], final.weight[0])
    predicted = (val_x @ result["weight"].T + result["bias"]).argmax(1)
    assert result["top1"] == pytest.approx(100 * (predicted == torch.tensor([0, 0, 2, 2, 2, 4, 4])).double().mean().item())
    assert result["selected_on"] == "train_heldout"


def test_of_equal_rates_the_lower_is_chosen(tmp_path: Path):
    write_images(tmp_path / "train", {"only": 5})
    write_images(tmp_path / "val", {"only": 2}, seed=1)
    result = evaluate(TinyEncoder(), config(tmp_path, protocol="grid", grid=(1.0, 0.1)))
    assert result["probe"]["lr"] == 0.1


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_split_held_out(share: float):
    labels = torch.tensor([2] * 30 + [0] * 9 + [3] * 2 + [5])[torch.randperm(42, generator=torch.Generator().manual_seed(1))]
    learn, held = split_held_out(labels, share, seed=1)
    assert sorted([*learn.tolist(), *held.tolist()]) == list(range(42))
    for label, count in ((2, 30), (0, 9), (3, 2)):
        assert (labels[held] == label).sum() == min(max(round(share * count), 1), count - 1)
    assert (labels[learn] == 5).sum() == 1
    assert torch.equal(split_held_out(labels, share, seed=1)[1], held)
    assert share == 0.01 or not torch.equal(split_held_out(labels, share, seed=2)[1], held)


@pytest.mark.parametrize("protocol", ["paper", "grid"])
@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_numbers_of_classes(tmp_path: Path, num_classes: int, protocol: str):
    write_images(tmp_path / "train", {str(c): 2 for c in range(num_classes)}, seed=1)
    write_images(tmp_path / "val", {"0": 1}, seed=2)
    result = evaluate(TinyEncoder(), config(tmp_path, protocol=protocol, epochs=2, probe_batch_size=1))
    accuracies = {name: value for name, value in result.items() if "top" in name}
    assert len(accuracies) == (2 if protocol == "paper" else 1) * (2 if num_classes == 5 else 1)
    assert set(accuracies.values()) <= {0.0, 100.0}
    assert num_classes > 1 or set(accuracies.values()) == {100.0}
    assert result["weight"].shape == (num_classes, 6)


def test_1001_classes():
    features, labels = torch.eye(1001), torch.arange(1001)
    heads = fit_heads(
        features, labels, learning_rates=[1001.0], num_classes=1001, epochs=2, batch_size=1001, seed=0, device=CPU
    )
    top1, top5 = heads.accuracy(features, labels)
    assert top1.tolist() == top5.tolist() == [100.0]


def test_accuracy_in_parts(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    heads = Heads([1.0, 1.0], 7, 3, seed=0, device=CPU)
    heads.weight.normal_(generator=generator)
    features, labels = torch.randn(50, 3, generator=generator), torch.randint(0, 7, (50,), generator=generator)
    order = (features @ heads.weight.transpose(1, 2)).argsort(2, descending=True)  # (H, M, C)
    hit = order == labels[:, None]
    for parts in ([slice(0, 50)], [slice(i, i + 7) for i in range(0, 50, 7)]):
        monkeypatch.setattr(linear, "chunks", lambda *_, parts=parts: parts)
        top1, top5 = heads.accuracy(features, labels)
        torch.testing.assert_close(top1, 100 * hit[..., 0].double().mean(1))
        torch.testing.assert_close(top5, 100 * hit[..., :5].any(2).double().mean(1))


def test_batch_larger_than_the_data(data: Path, capsys: pytest.CaptureFixture[str]):
    large = evaluate(TinyEncoder(), config(data, probe_batch_size=1024, epochs=2))
    assert "warning: probe_batch_size 1024 is cut to the 13 images" in capsys.readouterr().err
    assert large["probe"]["batch_size"] == 13 and large["probe"]["learning_rate"] == 2.0 * 13 / 256
    assert torch.equal(large["weight"], evaluate(TinyEncoder(), config(data, probe_batch_size=13, epochs=2))["weight"])


def test_impossible_settings(data: Path):
    for options, message in [
        ({"epochs": 0}, "epochs is 0: allowed is 1 to"),
        ({"lr": 0.0}, "lr is 0.0: allowed is above 0"),
        ({"protocol": "grid", "grid": ()}, "grid is empty: give"),
        ({"protocol": "grid", "grid": (0.1, math.inf)}, "grid is .*inf.*: allowed"),
        ({"held_out": 1.0}, "held_out is 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(TinyEncoder(), config(data, **options))
    write_images(data / "strange", {"zebra": 1})
    with pytest.raises(ValueError, match=r"class zebra of .*strange is not among the 5 classes of .*train"):
        evaluate(TinyEncoder(), config(data, val="strange"))
    write_images(data / "singles", {"a": 1, "c": 1, "e": 1})
    with pytest.raises(ValueError, match="one image only, so none can be held out"):
        evaluate(TinyEncoder(), config(data, train="singles", protocol="grid"))


@pytest.mark.parametrize("protocol", ["paper", "grid"])
def test_saved_head_repeats_the_accuracy(data: Path, protocol: str):
    model = ModelConfig(arch="vit_tiny", patch_size=4, width=16, heads=2, depth=1, image_size=8)
    (data / "run").mkdir()
    encoder = build_encoder(model)
    export_encoder(data / "run", encoder)
    run("linear", evaluate, config(data, checkpoint=str(data / "run/backbone.safetensors"), protocol=protocol, device="cpu"))
    name = "linear" if protocol == "paper" else "linear_grid"
    record = json.loads((data / f"run/results/{name}.json").read_text())
    head = load_file(data / f"run/results/{name}.safetensors")
    val = class_folder(str(data / "val"))
    predicted = (extract(val, encoder=encoder) @ head["weight"].T + head["bias"]).argmax(1)
    names = np.array(record["classes"])[predicted]
    accuracy = 100 * np.mean(names == np.array(val.classes)[val.labels])
    assert record["metrics"]["last_top1" if protocol == "paper" else "top1"] == pytest.approx(accuracy)
    assert record["evaluator"] == name and record["config"]["protocol"] == protocol
    assert record["selected_on"] == ("val_epochs" if protocol == "paper" else "train_heldout")


def test_the_seed_chooses_what_is_held_out(data: Path, monkeypatch: pytest.MonkeyPatch):
    seeds = []

    def watched(labels: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
        seeds.append(seed)
        return split_held_out(labels, share, seed=seed)

    monkeypatch.setattr(linear, "split_held_out", watched)
    evaluate(TinyEncoder(), config(data, protocol="grid", epochs=1, seed=7))
    assert seeds == [7]


@pytest.mark.parametrize("protocol", ["paper", "grid"])
def test_every_image_has_the_size_of_the_options(data: Path, protocol: str):
    """Augmented ones too."""
    encoder, sizes = TinyEncoder(), set()
    encoder.register_forward_pre_hook(lambda _, inputs: sizes.add(inputs[0].shape[2:]))
    evaluate(encoder, config(data, protocol=protocol, epochs=1, image_size=12))
    assert sizes == {(12, 12)}
