"""The page of a run: made from real files, with nothing loaded from elsewhere and nothing filled in."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dino_simpool import checkpoint
from dino_simpool.config import MasksConfig, ModelConfig, ReportConfig, TrainConfig, dump, from_dict, to_dict
from dino_simpool.data import EvalTransform
from dino_simpool.data.augment import MultiCrop
from dino_simpool.eval import masks
from dino_simpool.features.maps import attention_of, mass_mask
from dino_simpool.logs import RunLog
from dino_simpool.models import encoder as encoder_module
from dino_simpool.models.encoder import build_encoder
from dino_simpool.models.pooling.simpool import as_tokens
from dino_simpool.report import _duration, build_report, main
from dino_simpool.report.chart import MAX_POINTS, line_chart, nice_ticks, short, shorten
from dino_simpool.report.panels import attention_cards, crop_cards, heat_layer, outline

CPU = torch.device("cpu")


def write_images(root: Path) -> None:
    """A class folder tree of 20 px images with a bright square, and masks of it."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 4)):
        for name in ("a&b", "<i>"):
            for i in range(count):
                pixels = rng.integers(0, 100, (20, 20, 3), dtype=np.uint8)
                mask = np.zeros((20, 20), np.uint8)
                pixels[4:10, 6:12], mask[4:10, 6:12] = 255, 255
                for folder, array in ((root / split, pixels), (root / "masks" / split, mask)):
                    (folder / name).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run with every part: `data` and `out`."""
    root = tmp_path_factory.mktemp("report")
    write_images(root / "data")
    cfg = from_dict(TrainConfig, {
        "model": {"arch": "vit_tiny", "patch_size": 4, "width": 16, "heads": 2, "depth": 1, "image_size": 16, "gamma": 1.25},
        "crops": {"global_size": 16, "local_size": 8, "num_local": 3}, "head": {"out_dim": 64},
        "data": {"root": str(root / "data/train")}, "run": {"out": str(root / "run"), "batch_size": 4, "epochs": 3},
    })  # fmt: skip
    out = root / "run"
    log = RunLog(out, tensorboard=False)
    for step in range(1, 301):
        loss = None if step == 7 else 1 - step / 1000
        log.write({
            "kind": "step", "step": step, "loss_over_lnK": loss, "entropy_over_lnK": 0.5, "lr": 1e-3 * math.sin(step / 100),
            "feature_spread": 0.9, "grad_norm": 2.0, "seconds": 0.5, "data_wait_percent": 10.0,
        })  # fmt: skip
        if step % 100 == 0:
            log.write({"kind": "epoch", "step": step, "epoch": step // 100 - 1, "k-NN": {"10": {"top1": 30.0 + step / 10}}})
    log.close()
    (out / "config.yaml").write_text(dump(cfg))
    torch.manual_seed(5)
    parts = {f"encoder.{key}": tensor for key, tensor in build_encoder(cfg.model).state_dict().items()}
    parts["encoder.pool.q.weight"] *= 100  # attention that is far from uniform
    run_facts = {"config": to_dict(cfg), "num_images": 6, "versions": {"torch": "9.8.7"}}
    checkpoint.save_state(out, {**run_facts, "step": 300, "student": parts, "teacher": parts})
    for which in ("teacher", "untrained"):
        options = {"checkpoint": str(out / "last.pth"), "data": str(root / "data"), "which": which}
        masks.main(MasksConfig(**options, device="cpu", workers=0))
    for ending, top1 in (("", 81.26), ("_untrained", 41.0), ("_pixels", 35.5)):
        metrics = {"top1_k10": top1, "top5_k10": 99.0, "top1_k20": 77.7}
        (out / f"results/knn{ending}.json").write_text(json.dumps({"evaluator": "knn", "metrics": metrics}))
    return root


class _Page(HTMLParser):
    """Tags with their attributes, visible text, and whether every tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += " " + data


def test_the_whole_page(finished):
    path = build_report(finished / "run", data=str(finished / "data"), num_images=3, device=CPU)
    assert path == finished / "run/report.html"
    page = _Page(path.read_text(encoding="utf-8"))
    links = [attributes[name] for _, attributes in page.tags for name in ("href", "src") if name in attributes]
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)  # nothing from elsewhere
    names = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link[1:] for link in links if link.startswith("#")} == {"held-out-0", "held-out-1", "held-out-2"} <= names
    assert "nan" not in path.read_text().lower()
    pictures = [Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) for link in links if link.startswith("data:")]
    # 3 held-out images with two heat maps each, and 4 training images with 2 + 3 views
    assert len(pictures) == 3 * 3 + 4 * (1 + 5)
    assert {picture.size for picture in pictures} == {(16, 16), (24, 24), (20, 20), (8, 8)}
    expected = {
        "81.3 %", "41.0 %", "35.5 %", "a&b", "<i>", "SimPool, gamma 1.25", "6 images", "300 steps, 8 images/s", "2 min 30 s",
        "10 % of the time", "9.8.7", "num_local: 3", "No linear probe was run", "log.jsonl has no effective_rank",
    }  # fmt: skip
    assert {said for said in expected if said in page.text} == expected
    words = " ".join(page.text.split())
    assert "trained untrained raw pixels k-NN: top-1, k = 10 81.3 % 41.0 % 35.5 %" in words
    assert "81.3 % untrained 41.0, raw pixels 35.5" in words
    assert "No k-NN" not in page.text and "No attention on objects" not in page.text
    assert "77.7 %" not in page.text and "77.7000" in page.text  # other k: in the folded list only


def test_every_number_of_a_step_has_a_curve(finished, tmp_path):
    """Also the metrics of a learner that the page does not know, folded; without those of timing and what is no number."""
    (tmp_path / "config.yaml").write_text((finished / "run/config.yaml").read_text())
    log = RunLog(tmp_path, tensorboard=False)
    for step in range(1, 6):
        log.write({
            "kind": "step", "step": step, "epoch": 0, "loss": 2.0, "accuracy<5>": math.nan if step == 1 else 7.5 * step,
            "feature_spread": 0.9, "phase": "warm-up", "frozen": True, "never": math.nan, "seconds": 0.5,
            "images_per_second": 3.0, "data_wait_percent": 10.0, "max_memory_mb": 9.0,
        })  # fmt: skip
    log.write({"kind": "epoch", "step": 5, "epoch": 0, "train_accuracy": 1.0})
    log.close()
    text = build_report(tmp_path, data="", num_images=1, device=CPU).read_text()
    page = _Page(text)
    assert "Loss / ln K" not in page.text and "5 steps" in page.text
    known, more = re.fullmatch(r"(.*)<summary>More curves</summary>(.*?)</details>.*", text, re.DOTALL).groups()
    assert re.findall("<h3>(.*?)</h3>", more) == ["loss", "accuracy&lt;5&gt;"]
    assert [len(points_of(svg)[0]) for svg in re.findall("<svg.*?</svg>", more)] == [5, 4]
    assert "value, step 5: 37.5" in more and "<svg" in known and "Feature spread" in known


def test_ratios_under_the_pictures_are_those_of_the_evaluator(finished):
    page = _Page(build_report(finished / "run", data=str(finished / "data"), num_images=100, device=CPU).read_text())
    for label, name in (("before", "masks_untrained"), ("after", "masks")):
        ratios = [float(number) for number in re.findall(label + r" (\d+\.\d\d)×", page.text)]
        assert len(ratios) == 8
        expected = json.loads((finished / f"run/results/{name}.json").read_text())["metrics"][
            "ratio"
        ]  # all areas are equal here
        assert np.mean(ratios) == pytest.approx(expected, abs=0.006)
        assert f"{expected:.2f}×" in page.text


def test_held_out_images_may_lie_in_an_archive(finished, tmp_path):
    (tmp_path / "masks").symlink_to(finished / "data/masks")
    shutil.make_archive(str(tmp_path / "val"), "tar", finished / "data/val")
    pages = [
        build_report(finished / "run", data=str(root), num_images=4, device=CPU).read_text()
        for root in (finished / "data", tmp_path)
    ]
    cards = [re.findall(r'<div class="card panels">.*?</div>', page, re.DOTALL) for page in pages]
    assert len(cards[0]) == 4 and cards[0] == cards[1]


def test_parts_that_are_missing_are_named(finished, tmp_path):
    cfg = from_dict(
        TrainConfig, {"run": {"out": str(tmp_path)}, "data": {"root": str(tmp_path / "gone")}, "model": {"pool": "gap"}}
    )
    (tmp_path / "config.yaml").write_text(dump(cfg))
    page = _Page(main(ReportConfig(out=str(tmp_path), data=str(finished / "data"), device="cpu")).read_text())
    expected = {
        "No k-NN was run", "No linear probe was run", "No attention on objects was run", "No step is in log.jsonl",
        "There is no", "training images are not here",
    }  # fmt: skip
    assert {said for said in expected if said in page.text} == expected
    assert not [tag for tag, _ in page.tags if tag in ("svg", "table")][1:]  # the table of versions alone

    log = RunLog(tmp_path, tensorboard=False)
    log.write({"kind": "step", "step": 1, "loss_over_lnK": math.nan, "lr": 0.0})
    log.close()
    text = _Page(build_report(tmp_path, data="", num_images=1, device=CPU).read_text()).text
    assert "not finite" in text and "No k-NN was run during training" in text and "log.jsonl has no loss_over_lnK" in text

    (tmp_path / "results").mkdir()
    shared = {"metrics": {"top1_k10": 90.0}, "overlap": {"same_folder": False, "equal_files": 3, "val": 6}}
    (tmp_path / "results/knn.json").write_text(json.dumps(shared))
    text = _Page(build_report(tmp_path, data="", num_images=1, device=CPU).read_text()).text
    assert "knn: 3 of 6 val images are also in train (same bytes)" in text


def test_images_without_masks_or_val_folder(finished, tmp_path):
    write_images(tmp_path)
    text = _Page(build_report(finished / "run", data=str(tmp_path / "train"), num_images=2, device=CPU).read_text()).text
    assert "before" in text and not re.search(r"before \d", text)
    (tmp_path / "val").rename(tmp_path / "test")  # those of train would not be held out
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}/val does not exist, but there is test: give --data {tmp_path}/test$"
    ):
        build_report(finished / "run", data=str(tmp_path), num_images=2, device=CPU)


class MeanPool(nn.Module):
    """A pooling without attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, x, return_attention=False):
        pooled = as_tokens(x).mean(1)
        return (pooled, None) if return_attention else pooled


def test_a_page_without_attention(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module, "build_pool", lambda cfg, dim: MeanPool(dim))
    state = checkpoint.read_state(finished / "run/last.pth")
    state["config"]["model"] |= {"pool": "gap", "gamma": None}
    encoder = build_encoder(from_dict(ModelConfig, state["config"]["model"]))
    parts = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    checkpoint.save_state(tmp_path, state | {"student": parts, "teacher": parts})
    (tmp_path / "config.yaml").write_text(dump(from_dict(TrainConfig, state["config"])))
    text = _Page(build_report(tmp_path, data=str(finished / "data"), num_images=3, device=CPU).read_text()).text
    assert "There is no attention to show: model.pool gap has no attention maps: use one that has" in text
    assert "Views of training images" in text and "0× " not in text


def test_bad_input_writes_nothing(finished, tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        build_report(tmp_path, data="", num_images=1, device=CPU)
    (tmp_path / "config.yaml").write_text((finished / "run/config.yaml").read_text())
    with pytest.raises(ValueError, match="num_images is 0"):
        build_report(tmp_path, data="", num_images=0, device=CPU)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/knn.json").write_text("{")
    with pytest.raises(ValueError, match=r"knn\.json is not JSON"):
        build_report(tmp_path, data="", num_images=1, device=CPU)
    (tmp_path / "results/knn.json").unlink()
    (tmp_path / "last.pth").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"last\.pth cannot be read"):
        build_report(tmp_path, data="", num_images=1, device=CPU)
    with pytest.raises(FileNotFoundError, match="gone"):
        build_report(finished / "run", data=str(tmp_path / "gone"), num_images=1, device=CPU)
    assert not (tmp_path / "report.html").exists()


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline class="line s\d" points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_chart_places_points_by_their_values():
    svg = line_chart({"a": [(0, 0), (50, 10), (100, 5)], "b": [(100, 2.5)], "none": []}, references={"level": 7.5})
    a, b = points_of(svg)
    assert a[1][0] - a[0][0] == pytest.approx(a[2][0] - a[1][0])  # equal steps
    assert a[1][1] - a[0][1] == pytest.approx(2 * (a[2][1] - a[0][1])) and a[1][1] < a[0][1]  # up is more
    assert b[0][1] == pytest.approx((a[0][1] + a[2][1]) / 2) and b[0][0] == a[2][0]
    level = float(re.search(r'class="reference"[^>]* y1="([^"]*)"', svg)[1])
    assert level == pytest.approx((a[1][1] + a[2][1]) / 2)
    assert ">level<" in svg and ">none<" not in svg and "a, step 50: 10" in svg


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-1.0, -1.0], [1e-30, 2e-30], [5e9, 5e9 + 1]])
def test_chart_of_extreme_values_is_finite(values):
    svg = line_chart({"<x>": [(step, value) for step, value in enumerate(values)]})
    _Page(svg)
    assert "nan" not in svg and "inf" not in svg and "<x>" not in svg
    assert all(math.isfinite(number) and -1 <= number <= 361 for line in points_of(svg) for point in line for number in point)


@pytest.mark.parametrize("count", [1, 2, MAX_POINTS, MAX_POINTS + 1, 1000, 12_345])
def test_shortened_series_keep_mean_and_last_point(count):
    rng = np.random.default_rng(count)
    points = [(float(step), value) for step, value in enumerate(rng.random(count))]
    short_points = shorten(points)
    assert len(short_points) <= MAX_POINTS and short_points[-1] == points[-1]
    assert [x for x, _ in short_points] == sorted({x for x, _ in short_points})
    if count <= MAX_POINTS:
        assert short_points == points
    else:  # every point but the last is in exactly one mean
        run = math.ceil((count - 1) / (MAX_POINTS - 1))
        assert short_points[0] == pytest.approx((np.arange(run).mean(), np.mean([y for _, y in points[:run]])))
        rest = points[:-1][(len(short_points) - 2) * run :]
        assert short_points[-2] == pytest.approx(tuple(np.mean(rest, axis=0)))


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0.4, 1.04, [0.4, 0.6, 0.8, 1.0, 1.2]), (0, 0.00125, [0, 5e-4, 1e-3, 1.5e-3]),
    (20, 20, [18, 19, 20, 21, 22]),
])  # fmt: skip
def test_nice_ticks(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "expected"), [
    (0, "0"), (1, "1"), (0.98351, "0.984"), (123.4, "123"), (9999, "9999"), (12_000, "12k"), (2_500_000, "2.5M"),
    (5e-5, "5e-5"), (0.00126, "1.3e-3"), (-0.5, "-0.5"), (10, "10"),
])  # fmt: skip
def test_short_numbers(value, expected):
    assert short(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (11_520, "3 h 12 min")]
)
def test_durations(seconds, expected):
    assert _duration(seconds) == expected


def test_outline_is_the_border_of_the_mask():
    drawn = outline(np.array([[True, False], [False, False]]), 8)
    first = re.search(r' d="([^"]*)"', drawn)[1]
    assert sorted(re.findall("M[^M]+", first)) == sorted(["M0 0h4", "M0 4h4", "M0 0v4", "M4 0v4"])


def test_heat_is_transparent_without_attention_and_full_at_the_top():
    link = re.search('href="data:image/png;base64,([^"]*)"', heat_layer(torch.tensor([[0.0, 5.0], [0.0, 5.0]]), 8))[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(link))))
    assert pixels.shape == (12, 12, 4) and (pixels[:, 0, 3] == 0).all() and (pixels[:, -1] == (140, 12, 74, 240)).all()


def test_crops_are_those_that_the_run_saw(tmp_path):
    """Boxes drawn with its seed, in images that are turned if the run turned them."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    for name in ("upright", "tagged"):
        (tmp_path / name).mkdir()
    image.save(tmp_path / "upright" / "0.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tagged" / "0.png", exif=exif)
    crops = {"global_size": 16, "local_size": 8, "num_local": 1}
    model = {"arch": "vit_tiny", "patch_size": 4, "image_size": 16}
    options = {"model": model, "crops": crops, "data": {"exif_orientation": True}, "run": {"seed": 7}}
    cfg = from_dict(TrainConfig, options)
    shown = crop_cards(cfg, [str(tmp_path / "tagged")], num_images=1)
    assert shown == crop_cards(cfg, [str(tmp_path / "upright")], num_images=1)
    augment = MultiCrop(**dataclasses.asdict(cfg.crops), mean=cfg.model.mean, std=cfg.model.std)
    for top, left, height, width in augment.draw(30, 20, seed=7, epoch=0, index=0).box.tolist():
        assert f'<rect x="{left}" y="{top}" width="{width}" height="{height}"' in shown


def test_without_masks_the_outline_covers_the_cells_of_most_attention(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    model = {"arch": "vit_tiny", "patch_size": 4, "width": 16, "heads": 2, "depth": 1, "image_size": 16}
    encoder = build_encoder(ModelConfig(**model, resize=16))
    image = EvalTransform(16, resize=16, mean=encoder.config.mean, std=encoder.config.std)(Image.fromarray(pixels))
    attention = attention_of(encoder, image[None], names=["0.png"])[0].double().numpy()
    assert outline(mass_mask(attention), 16) in attention_cards({"after": encoder}, str(tmp_path), num_images=1)
