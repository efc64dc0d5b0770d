"""bench data on a few small images: what is compared, and what is written. No time is asserted but that it is one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_augment import SMALL, picture, recipe, stored

from dino_simpool import cli
from dino_simpool.bench import data as bench_data
from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, CropsConfig
from dino_simpool.data.decode import EncodedImage

WAYS = ["published", "cpu", "device_share", "decode"]


def test_the_published_recipe_makes_eight_normalized_views():
    views = bench_data.published_recipe(CropsConfig())(picture(120, 160))
    assert [tuple(view.shape) for view in views] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 6
    assert all(view.dtype == torch.float32 for view in views)


def test_the_published_recipe_without_chance_is_its_crop():
    """Every probability 0 and the whole image: torchvision's resize and normalization are left; then one operation each."""
    plain = {"flip": 0.0, "jitter_probability": 0.0, "grayscale": 0.0, "blur": (0.0,) * 3, "solarize": (0.0,) * 3}
    sizes = {"global_size": 24, "local_size": 12, "num_local": 1, "global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0)}
    image = picture(48, 48)

    def views(**changes) -> list[np.ndarray]:
        crops = CropsConfig(**sizes | plain | changes)
        std, mean = (np.array(values)[:, None, None] for values in (IMAGENET_STD, IMAGENET_MEAN))
        torch.manual_seed(0)
        return [255 * (view.numpy() * std + mean) for view in bench_data.published_recipe(crops)(image)]

    # A box of the whole area is the whole square only for the ratio 1; the fallback of all other draws is it, too.
    unchanged = views()
    for view, side in zip(unchanged, (24, 24, 12), strict=True):
        expected = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        np.testing.assert_allclose(view, expected, rtol=0, atol=1e-3)
    for number, view in enumerate(views(flip=1.0)):
        np.testing.assert_allclose(view, unchanged[number][:, :, ::-1], rtol=0, atol=1e-3)
    for number, view in enumerate(views(solarize=(0.0, 1.0, 0.0))):
        old = unchanged[number].round()
        expected = np.where(old >= 128, 255 - old, old) if number == 1 else old
        np.testing.assert_allclose(view, expected, rtol=0, atol=1e-3)
    for number, view in enumerate(views(blur=(1.0, 0.0, 0.0), blur_sigma=(2.0, 2.0))):
        assert (np.abs(view - unchanged[number]).max() > 3) == (number == 0)
    assert all(np.ptp(view, axis=0).max() < 1e-3 for view in views(grayscale=1.0))


def test_each_way_does_its_work_on_every_file(monkeypatch: pytest.MonkeyPatch):
    """Two files through each way: what is decoded, and which operations run."""
    files = [stored(picture(40, 50, seed=seed), "JPEG") for seed in (0, 1)]
    decoded: list[str] = []
    pixels, opened = EncodedImage.pixels, Image.open
    monkeypatch.setattr(EncodedImage, "pixels", lambda file, **options: decoded.append("ours") or pixels(file, **options))
    monkeypatch.setattr(Image, "open", lambda file, formats: decoded.append("pillow") or opened(file, formats=formats))
    finished: list[int] = []
    finish = bench_data.MultiCrop.finish

    def counted(crop, parts, **options):
        finished.append(len(parts))
        return finish(crop, parts, **options)

    monkeypatch.setattr(bench_data.MultiCrop, "finish", counted)
    ways = bench_data.ways_of(SMALL, recipe(SMALL), seed=0)
    assert list(ways) == WAYS
    for name, way in ways.items():
        decoded.clear(), finished.clear()
        way(files)
        assert decoded == ["pillow" if name == "published" else "ours"] * 2
        assert finished == ([2 + SMALL.num_local] if name == "cpu" else [])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(5):
        image = picture(40 + number, 50, seed=number)
        image.save(tmp_path / f"{number}.{'png' if number == 4 else 'jpg'}")
    options = {"images": 5, "batch_size": 2, "repetitions": 1, "loader_seconds": 0.05, "workers": 1, "device_batch": 3,
               "device": "cpu", "crops.global_size": 16, "crops.local_size": 8, "crops.num_local": 2}  # fmt: skip
    line = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", "data", str(tmp_path), "--out", str(tmp_path / "out"), *line]) == 0
    finally:
        torch.set_num_threads(threads)
    record, printed = json.loads((tmp_path / "out" / "data.json").read_text()), capsys.readouterr().out
    assert record["benchmark"] == "data" and record["images"] == 5 and record["config"]["crops"]["local_size"] == 8
    spent = record["ms_per_image_and_core"]
    assert list(spent) == WAYS and min(spent.values()) > 0
    for name in WAYS:
        assert record["images_per_second_and_core"][name] == pytest.approx(1000 / spent[name])
        assert record["times_published"][name] == pytest.approx(spent["published"] / spent[name])
        assert record["share_of_decode_limit"][name] == pytest.approx(spent["decode"] / spent[name])
        assert f"{spent[name]:.2f}" in printed
    assert list(record["parts_ms"]) == [
        "header", "decode", "draw", "crop and resize", "pack (device path)", "flip, colours, blur (cpu path)",
        "normalise (cpu path)",
    ]  # fmt: skip
    assert min(record["parts_ms"].values()) > 0 and all(name in printed for name in record["parts_ms"])
    device = record["device"]
    assert device["images_per_second"] > 0 and device["batch"] == 3 and device["dtype"] == "torch.float32"
    loader = record["loader"]
    assert loader["workers"] == 1 and loader["cpu"] > 0 and loader["device_share"] > 0
    assert "loader with 1 processes" in printed


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken = io.BytesIO()
    picture(20, 20).save(broken, "PNG")
    (tmp_path / "x.png").write_bytes(broken.getvalue()[:50])
    for source, message in ((tmp_path, "x.png cannot be read as an image"), (tmp_path / "none", "does not exist")):
        assert cli.main(["bench", "data", str(source), "--out", str(tmp_path / "out"), "--device", "cpu"]) != 0
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1] and "Traceback" not in "".join(said)
