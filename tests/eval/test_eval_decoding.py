"""Every evaluator reads its images as `exif_orientation` and `max_pixels` say, and computes in its `precision`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniatures import write_cub200, write_image, write_inshop, write_roxford5k
from PIL import Image
from test_extract import config, exported, load

from dino_simpool import cli
from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import (
    AttentionConfig,
    DecodingSettings,
    KnnConfig,
    LinearConfig,
    MasksConfig,
    RecallConfig,
    RetrievalConfig,
    SearchConfig,
)
from dino_simpool.eval import attention, class_folders, knn, linear, masks, recall, retrieval
from dino_simpool.features import extract, search

LIMIT = 40 * 30
"""Pixels of an image of the miniatures."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported(tmp_path_factory.mktemp("encoder"))


def turned(folder: Path, *, tagged: bool) -> Path:
    """Three images, upright, or as a camera held sideways stores them, with the tag that says so; without loss in both."""
    folder.mkdir(parents=True)
    for number in range(3):
        coarse = Image.fromarray(np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8))
        image = coarse.resize((40, 60), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = image.transpose(Image.Transpose.ROTATE_90) if tagged else image
        stored.save(folder / f"{number}.png", **({"exif": exif} if tagged else {}))
    return folder


@pytest.mark.parametrize("command", ["retrieval", "recall cub200", "recall inshop", "attention", "extract"])
def test_images_above_the_limit_end_the_work(
    command: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for write in (write_roxford5k, write_cub200, write_inshop):
        write(tmp_path / "data")
    name, _, layout = command.partition(" ")
    data = tmp_path / "data" / ("roxford5k/jpg" if name in ("attention", "extract") else "")
    options = [name, "--checkpoint", checkpoint, "--data", str(data), "--device", "cpu", "--workers", "0"]
    options += ["--layout", layout] if layout else []
    assert cli.main([*options, "--out", str(tmp_path / "small"), "--max_pixels", "100"]) == 1
    assert "it has more than max_pixels 100; raise max_pixels" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*options, "--out", str(tmp_path / "out"), "--max_pixels", str(10 * LIMIT)]) == 0


@pytest.mark.parametrize("part", ["database", "queries", "whitening"])
def test_retrieval_reads_each_of_its_sets_so(part: str, checkpoint: str, tmp_path: Path) -> None:
    """One image of the set is larger than the others."""
    write_roxford5k(tmp_path)
    for number in range(6):
        write_image(tmp_path / "others" / f"{number}.png", "other", seed=number)
    cfg = RetrievalConfig(
        data=str(tmp_path), whitening_data=str(tmp_path / "others"), whitening_dim=2, workers=0, device="cpu",
        max_pixels=4 * LIMIT,
    )  # fmt: skip
    encoder = load_encoder(checkpoint)
    retrieval.evaluate(encoder, cfg)
    database, queries, _ = retrieval.landmarks("roxford5k", str(tmp_path))
    large = {"database": database.path(0), "queries": queries.path(0), "whitening": str(tmp_path / "others" / "3.png")}[part]
    write_image(Path(large), "other", size=(120, 90))
    with pytest.raises(ValueError, match="more than max_pixels") as refused:
        retrieval.evaluate(encoder, cfg)
    assert large in str(refused.value)
    retrieval.evaluate(encoder, dataclasses.replace(cfg, max_pixels=9 * LIMIT))


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (retrieval, RetrievalConfig(workers=0, device="cpu", exif_orientation=True)),
        (recall, RecallConfig(workers=0, device="cpu", exif_orientation=True)),
    ],
)
def test_evaluators_turn_images_on_request(
    module: Any, options: Any, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features that recall and retrieval compare are those of the upright images."""
    kept: list[torch.Tensor] = []
    real = module.extract_features

    def watched(*arguments: Any, **more: Any) -> torch.Tensor:
        kept.append(real(*arguments, **more))
        return kept[-1]

    monkeypatch.setattr(module, "extract_features", watched)
    for tagged in (False, True):
        root = tmp_path / str(tagged)
        sources = [turned(root / "a", tagged=tagged), turned(root / "b", tagged=tagged)]
        if module is retrieval:
            write_roxford5k(root)
            for number, path in enumerate(sorted((root / "roxford5k" / "jpg").iterdir())):
                path.write_bytes((sources[0] / f"{number % 3}.png").read_bytes())  # an ending is not believed
        module.evaluate(load_encoder(checkpoint), dataclasses.replace(options, data=str(root)))
    half = len(kept) // 2
    assert half >= 1 and all(torch.equal(one, other) for one, other in zip(kept[:half], kept[half:], strict=True))
    module.evaluate(load_encoder(checkpoint), dataclasses.replace(options, data=str(root), exif_orientation=False))
    assert not torch.equal(kept[0], kept[2 * half])


def test_query_boxes_are_of_images_as_they_are_stored() -> None:
    cfg = RetrievalConfig(preset="strict", exif_orientation=True)
    with pytest.raises(ValueError, match="exif_orientation must be false with query_crop"):
        retrieval.resolve(cfg)
    assert not retrieval.resolve(dataclasses.replace(cfg, query_crop=False))["query_crop"]


def test_attention_turns_images_on_request(checkpoint: str, tmp_path: Path) -> None:
    maps = []
    for tagged, turn in ((False, False), (True, True), (True, False)):
        out = tmp_path / f"out_{tagged}_{turn}"
        data = tmp_path / str(tagged)
        data = data if data.exists() else turned(data, tagged=tagged)
        cfg = AttentionConfig(
            checkpoint=checkpoint, data=str(data), out=str(out), workers=0, device="cpu", exif_orientation=turn, image_size=64
        )
        record = attention.evaluate(load_encoder(checkpoint), cfg)
        assert record["images"][0]["image"] == ({"height": 40, "width": 60} if tagged > turn else {"height": 60, "width": 40})
        maps.append(np.load(out / "attention" / "1_1.npy"))
    assert np.array_equal(maps[0], maps[1]) and not np.array_equal(maps[0], maps[2])


def test_extract_records_it_and_search_does_the_same(checkpoint: str, tmp_path: Path) -> None:
    upright, tagged = turned(tmp_path / "upright", tagged=False), turned(tmp_path / "tagged", tagged=True)
    out = tmp_path / "features"
    extract.main(config(checkpoint, upright, tmp_path / "expected"))
    extract.main(config(checkpoint, tagged, out, exif_orientation=True, index=True))
    np.testing.assert_array_equal(load(out), load(tmp_path / "expected"))
    with pytest.raises(ValueError, match=r"\(images\.exif_orientation True -> False\)"):
        extract.main(config(checkpoint, tagged, out))
    query = SearchConfig(index=str(out), query=str(tagged / "1.png"), out=str(tmp_path / "found"), k=1, workers=0, device="cpu")
    search.main(query)
    found = json.loads((tmp_path / "found" / "results.json").read_text())["queries"][0]["neighbors"][0]
    assert (found["name"], found["similarity"]) == ("1.png", 1.0)
    search.main(dataclasses.replace(query, query=str(upright / "1.png"), out=str(tmp_path / "same")))
    sheets = [Image.open(tmp_path / name / "contact_sheet.png").size for name in ("found", "same")]
    assert sheets[0] == sheets[1]
    middle = [np.asarray(Image.open(tmp_path / name / "contact_sheet.png"))[20:160, 20:160] for name in ("found", "same")]
    np.testing.assert_array_equal(*middle)  # the query is shown upright too


def test_a_limit_that_was_too_low_can_be_raised_half_way(checkpoint: str, tmp_path: Path) -> None:
    """The limit decides whether there are numbers, and which ones never: what is done is kept, and search takes the new one."""
    images = turned(tmp_path / "images", tagged=False)
    with Image.open(images / "2.png") as image:
        image.resize((80, 120)).save(images / "2.png")
    out = tmp_path / "out"
    options: dict[str, Any] = {"batch_size": 1, "index": True}
    with pytest.raises(ValueError, match=r"2\.png cannot be read as an image \(it has more than max_pixels 3,000"):
        extract.main(config(checkpoint, images, out, max_pixels=3_000, **options))
    assert (out / "features.partial.npy").exists()
    extract.main(config(checkpoint, images, out, max_pixels=10_000, **options))
    extract.main(config(checkpoint, images, tmp_path / "other", **options))
    np.testing.assert_array_equal(load(out), load(tmp_path / "other"))
    assert json.loads((out / "meta.json").read_text())["source"]["max_pixels"] == 10_000
    query = SearchConfig(index=str(out), query=str(images / "2.png"), out=str(tmp_path / "found"), k=1, workers=0, device="cpu")
    search.main(query)
    with Image.open(images / "2.png") as image:
        image.resize((160, 240)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"large\.png cannot be read as an image \(it has more than max_pixels 10,000"):
        search.main(dataclasses.replace(query, query=str(tmp_path / "large.png")))


def test_impossible_limits() -> None:
    with pytest.raises(ValueError, match="max_pixels is 0: allowed is 1 to"):
        config("x", Path("x"), Path("x"), max_pixels=0)
    with pytest.raises(ValueError, match="max_pixels is 0: allowed is 1 to"):
        KnnConfig(max_pixels=0)


def labeled_with_masks(root: Path) -> Path:
    """train/, val/ and masks/val/ with two images of each of two classes; the masks are full."""
    for name in ("a/0", "a/1", "b/0", "b/1"):
        for split in ("train", "val"):
            write_image(root / split / f"{name}.png", name[0], seed=int(name[-1]))
        mask = root / "masks" / "val" / f"{name}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 30), 255).save(mask)
    return root


def test_class_folders_are_decoded_so(tmp_path: Path) -> None:
    """Both the images to learn from and those to measure on."""
    cfg = KnnConfig(data=str(labeled_with_masks(tmp_path)), max_pixels=LIMIT, exif_orientation=True)
    expected = DecodingSettings(max_pixels=LIMIT, exif_orientation=True)
    assert [images.decoding for images in class_folders(cfg, None)] == [expected] * 2


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (knn, KnnConfig(workers=0)),
        (linear, LinearConfig(workers=0, epochs=1)),
        (linear, LinearConfig(workers=0, epochs=1, protocol="grid")),
        (recall, RecallConfig(workers=0)),
        (masks, MasksConfig(workers=0)),
        (attention, AttentionConfig(workers=0, val="val", image_size=32)),
        (retrieval, RetrievalConfig(workers=0)),
    ],
)
def test_every_forward_pass_has_the_precision_of_the_options(
    module: Any, options: Any, checkpoint: str, tmp_path: Path
) -> None:
    labeled_with_masks(tmp_path)
    write_roxford5k(tmp_path)
    data = tmp_path / "val" if module is recall else tmp_path
    encoder, seen = load_encoder(checkpoint), set[bool]()
    for part in encoder.modules():
        part.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    for precision in ("fp32", "bf16"):
        seen.clear()
        changed = {"data": str(data), "out": str(tmp_path / precision), "precision": precision}
        module.evaluate(encoder, dataclasses.replace(options, **changed))
        assert seen == {precision == "bf16"}
