"""`extract`: one file whatever batches, workers, processes and kills; every level; what it refuses. Home of `exported`."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_distributed import group, run_processes, values
from test_model import tiny
from torch.nn import functional as F

from dino_simpool import cli
from dino_simpool.checkpoint import export_encoder
from dino_simpool.config import MAX_PIXELS, ConfigError, ExtractConfig, parse
from dino_simpool.data import EvalTransform, find_images
from dino_simpool.data.decode import read_rgb
from dino_simpool.features import chunks
from dino_simpool.features import extract as module
from dino_simpool.features import rows as rows_module
from dino_simpool.features.extract import extract, level_of, main
from dino_simpool.features.folder import settings_hash
from dino_simpool.features.index import build_flat
from dino_simpool.features.rows import RowFile
from dino_simpool.files import file_sha256
from dino_simpool.models.encoder import Encoder, build_encoder
from dino_simpool.models.weights import weights_sha256

FAMILIES = {"vit": {"pool": "simpool gamma"}, "resnet": {}, "convnext": {"pool": "gap"}}
SIZES = [(40, 40), (33, 57), (64, 20), (20, 64), (1, 90), (90, 1), (32, 32)]
"""Width and height of the images, over and over."""


def exported(folder: Path, trunk: str = "resnet", pool: str = "simpool", *, seed: int = 3) -> str:
    """Path of the weights of a tiny encoder for 32 x 32 pixels, as a run exports them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    encoder = build_encoder(tiny(trunk, pool, image_size=32))
    for parameter in encoder.parameters():  # norms that are not 1 and 0, so that each part counts
        parameter.data += 0.1 * torch.randn_like(parameter)
    export_encoder(folder, encoder)
    return str(folder / "backbone.safetensors")


def fill(folder: Path, count: int = 13, *, seed: int = 0) -> Path:
    """`count` images of several shapes in two class folders: smooth noise, so that resizing matters little."""
    noise = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray(noise.integers(0, 256, (5, 5, 3), np.uint8))
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize(SIZES[i % len(SIZES)], Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported(tmp_path_factory.mktemp("encoder"))


def config(checkpoint: str, images: Path, out: Path, **options: Any) -> ExtractConfig:
    return ExtractConfig(
        **{"checkpoint": checkpoint, "data": str(images), "out": str(out), "workers": 0, "device": "cpu", "batch_size": 4}
        | options
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def load(folder: Path) -> np.ndarray:
    return np.load(folder / "features.npy")


def one_by_one(encoder: Encoder, folder: Path, function: Callable[[torch.Tensor], torch.Tensor], size: int = 32) -> np.ndarray:
    """Another loop over the images in the order of the set, one image at a time, in float64."""
    transform = EvalTransform(size, resize=size * 256 // 224, mean=encoder.config.mean, std=encoder.config.std)
    paths = sorted(folder.rglob("*.png"))
    with torch.no_grad():
        return np.concatenate([function(transform(read_rgb(str(path)))[None].double()).numpy() for path in paths])


# -- the same numbers


def test_the_minimum_is_over_each_image_whatever_the_training_did(tmp_path: Path, images: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(dataclasses.replace(tiny("resnet", "simpool gamma", image_size=32), min_over="batch"))
    export_encoder(tmp_path, encoder)
    checkpoint = str(tmp_path / "backbone.safetensors")
    for batch_size in (1, 7):
        for over in ("image", "batch"):
            out = tmp_path / f"{over}{batch_size}"
            main(config(checkpoint, images, out, batch_size=batch_size, **({} if over == "image" else {"min_over": over})))
            assert json.loads((out / "meta.json").read_text())["settings"]["model"]["min_over"] == over
    np.testing.assert_allclose(load(tmp_path / "image1"), load(tmp_path / "image7"), rtol=0, atol=1e-5)
    assert np.abs(load(tmp_path / "batch1") - load(tmp_path / "batch7")).max() > 1e-3


def extract_each(checkpoint: str, images: Path, out: Path, cases: list[tuple[int, int]]) -> None:
    """With every batch size and number of workers."""
    # Loader processes as in a command: a process of run_processes would start a server, which imports everything, for them.
    multiprocessing.set_start_method("fork", force=True)
    for batch_size, workers in cases:
        main(config(checkpoint, images, out / f"{batch_size}_{workers}", batch_size=batch_size, workers=workers))


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_workers_and_processes_change_nothing(tmp_path: Path, images: Path, family: str) -> None:
    checkpoint = exported(tmp_path / "encoder", family, **FAMILIES[family])
    every = [(batch_size, workers) for batch_size in (1, 7, 64) for workers in (0, 2)]
    cases = every if family == "vit" else [(1, 0), (7, 2), (64, 0)]
    values(run_processes(extract_each, checkpoint, images, tmp_path / "two", cases, environments=group()))
    extract_each(checkpoint, images, tmp_path / "one", every if family == "vit" else [(1, 2), (7, 0), (64, 0)])
    encoder = module.load_encoder(checkpoint).double()
    expected = one_by_one(encoder, images, encoder)
    assert expected.shape == (13, encoder.embed_dim) and np.abs(expected).max() > 0.1
    for batch_size in (1, 7, 64):
        folders = sorted(tmp_path.glob(f"*/{batch_size}_*"))
        assert len(folders) == (4 if family == "vit" else 2)
        first = contents(folders[0])
        assert set(first) == {"features.npy", "ids.txt", "meta.json"}
        for folder in folders:
            assert contents(folder) == first, f"{folder}: not the same bytes"
        np.testing.assert_allclose(load(folders[0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", ["global", "tokens", "keys", "attention"])
def test_levels(tmp_path: Path, images: Path, family: str, level: str) -> None:
    """Against the formula of each, in float64; at another size than the model's."""
    pool = "simpool gamma" if level == "keys" else FAMILIES[family].get("pool", "simpool")
    checkpoint = exported(tmp_path / "encoder", family, pool)
    main(config(checkpoint, images, tmp_path / "out", level=level, image_size=40))
    encoder = module.load_encoder(checkpoint).double()

    def keys(x: torch.Tensor) -> torch.Tensor:  # eq. 14
        normalized = F.layer_norm(encoder.tokens(x), (encoder.embed_dim,), eps=1e-6)
        return (normalized * encoder.pool.norm.weight + encoder.pool.norm.bias) @ encoder.pool.k.weight.T

    function = {"global": encoder, "tokens": encoder.tokens, "keys": keys, "attention": encoder.attention}[level]
    expected, found = one_by_one(encoder, images, function, 40), load(tmp_path / "out")
    rest = {"global": (encoder.embed_dim,), "attention": (10, 10)}.get(level, (100, encoder.embed_dim))
    assert found.shape == expected.shape == (13, *rest) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if level == "attention":
        np.testing.assert_allclose(found.sum((1, 2)), 1, atol=1e-5)


def test_keys_are_of_simpool_only(tmp_path: Path, images: Path) -> None:
    checkpoint = exported(tmp_path / "encoder", "vit", "cls")
    with pytest.raises(ValueError, match="level keys needs SimPool, and this model has pool cls: use level tokens"):
        main(config(checkpoint, images, tmp_path / "out", level="keys"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="there is no level patches: use global, tokens, keys or attention"):
        level_of(module.load_encoder(checkpoint), "patches")


def test_from_python(tmp_path: Path, images: Path, checkpoint: str) -> None:
    """Three lines: an encoder, images, and their features, the same as the command's. Modes are kept."""
    encoder = module.load_encoder(checkpoint).train()
    features = extract(encoder, find_images(str(images)), tmp_path / "out", batch_size=4)
    assert isinstance(features, np.memmap) and not features.flags.writeable
    assert all(part.training for part in encoder.modules())
    main(config(checkpoint, images, tmp_path / "command"))
    np.testing.assert_array_equal(features, load(tmp_path / "command"))


def test_whole_view_squeezes_and_crop_cuts(tmp_path: Path, checkpoint: str) -> None:
    """The left half of a wide image is seen by the one and not by the other."""
    pixels = np.zeros((30, 120, 3), np.uint8)
    pixels[:, 60:] = 255
    (tmp_path / "images").mkdir()
    for i in range(2):  # the other one differs at its left end only
        pixels[:, :20] = 100 * i
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    for view in ("crop", "whole"):
        main(config(checkpoint, tmp_path / "images", tmp_path / view, view=view))
    crop, whole = load(tmp_path / "crop"), load(tmp_path / "whole")
    np.testing.assert_array_equal(crop[0], crop[1])
    assert np.abs(whole[0] - whole[1]).max() > 1e-3
    encoder = module.load_encoder(checkpoint)
    squeezed = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    normalized = (squeezed - encoder.config.mean) / encoder.config.std
    with torch.no_grad():
        expected = encoder.double()(torch.from_numpy(normalized).permute(2, 0, 1)[None])
    np.testing.assert_allclose(whole[1:], expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "whole" / "meta.json").read_text())["settings"]["preprocessing"] == {
        "view": "whole", "image_size": 32, "mean": list(encoder.config.mean), "std": list(encoder.config.std)
    }  # fmt: skip


def test_bf16_is_near(tmp_path: Path, images: Path, checkpoint: str) -> None:
    for precision in ("fp32", "bf16"):
        main(config(checkpoint, images, tmp_path / precision, precision=precision))
    exact, rounded = load(tmp_path / "fp32"), load(tmp_path / "bf16")
    assert rounded.dtype == np.float32 and not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=0.1, atol=0.1)


# -- what is written


def test_what_is_beside_the_features(tmp_path: Path, images: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(checkpoint, images, tmp_path / "out", labels=True, index=True))
    assert capsys.readouterr().out == (
        f"extract: global, 13 x 32, teacher of {checkpoint}\n  written to {tmp_path}/out/features.npy\n"
    )
    names = (tmp_path / "out" / "ids.txt").read_text().splitlines()
    assert names == [f"a/{i:03d}.png" for i in range(0, 13, 2)] + [f"b/{i:03d}.png" for i in range(1, 13, 2)]
    labels = np.load(tmp_path / "out" / "labels.npy")
    assert labels.dtype == np.int64 and labels.tolist() == [0] * 7 + [1] * 6
    assert (tmp_path / "out" / "classes.txt").read_text() == "a\nb\n"
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    settings, encoder = meta["settings"], module.load_encoder(checkpoint)
    assert meta["hash"] == settings_hash(settings) and meta["shape"] == [13, 32]
    assert meta["source"] == {
        "checkpoint": checkpoint, "sha256": file_sha256(checkpoint), "which": "teacher", "data": [str(images)],
        "exclude": [], "max_pixels": MAX_PIXELS,
        "training": dict.fromkeys(("epochs", "total_epochs", "num_images", "images", "init")),  # not told by this export
    }  # fmt: skip
    assert settings["model"] == json.loads(json.dumps(dataclasses.asdict(encoder.config)))
    assert settings["weights"] == weights_sha256(encoder)
    decoding = {"exif_orientation": False, "extra_band": "refuse", "transparency": "white", "value_range": "full"}
    assert settings["images"] == {"count": 13, "names": find_images(str(images)).digest(), **decoding}
    assert (settings["level"], settings["batch_size"], settings["precision"], settings["device"]) == (
        "global",
        4,
        "fp32",
        "cpu",
    )
    assert settings["preprocessing"]["resize"] == 36 and settings["versions"]["torch"] == torch.__version__


def test_index_is_brute_force(tmp_path: Path, images: Path, checkpoint: str) -> None:
    main(config(checkpoint, images, tmp_path / "out", index=True))
    index, features = module.faiss.read_index(str(tmp_path / "out" / "index.faiss")), load(tmp_path / "out").astype(np.float64)
    unit = features / np.sqrt((features**2).sum(1, keepdims=True))
    np.testing.assert_allclose(index.reconstruct_n(0, 13), unit, atol=1e-6)
    similarity, found = index.search(unit[:5].astype(np.float32), 13)
    expected = unit[:5] @ unit.T
    np.testing.assert_allclose(similarity, -np.sort(-expected, axis=1), atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(expected, found, 1), similarity, atol=1e-6)


def test_index_of_many_parts_and_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    features[2] = 0
    monkeypatch.setattr("dino_simpool.features.index.chunks", functools.partial(chunks, max_bytes=72))
    index = build_flat(features)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(index.reconstruct_n(0, 7), features / np.where(length, length, 1), atol=1e-7)


def test_one_image(tmp_path: Path, checkpoint: str) -> None:
    fill(tmp_path / "images", 1)
    main(config(checkpoint, tmp_path / "images", tmp_path / "out", index=True))
    assert load(tmp_path / "out").shape == (1, 32) and (tmp_path / "out" / "ids.txt").read_text() == "a/000.png\n"
    values(run_processes(main, config(checkpoint, tmp_path / "images", tmp_path / "two"), environments=group()))
    np.testing.assert_array_equal(load(tmp_path / "two"), load(tmp_path / "out"))


def test_several_sources_and_strange_names(tmp_path: Path, images: Path, checkpoint: str) -> None:
    """A folder and a list; names that a line cannot show are JSON strings, and ids.txt is a list of the same images."""
    odd = os.fsdecode(b"caf\xe9.png")
    shutil.copy(images / "a" / "000.png", tmp_path / odd)
    (tmp_path / "list.txt").write_text(f"{images}/b/001.png\n")
    (tmp_path / "more").mkdir()
    shutil.move(tmp_path / odd, tmp_path / "more" / odd)
    main(config(checkpoint, images, tmp_path / "out", data=(str(tmp_path / "more"), str(tmp_path / "list.txt"))))
    lines = (tmp_path / "out" / "ids.txt").read_bytes().splitlines()
    assert lines == [json.dumps(str(tmp_path / "more" / odd)).encode(), os.fsencode(images / "b" / "001.png")]
    main(config(checkpoint, images, tmp_path / "again", data=str(tmp_path / "out" / "ids.txt")))
    np.testing.assert_array_equal(load(tmp_path / "again"), load(tmp_path / "out"))
    main(config(checkpoint, images, tmp_path / "all"))
    np.testing.assert_allclose(load(tmp_path / "out"), load(tmp_path / "all")[[0, 7]], rtol=1e-5, atol=1e-6)


# -- killed and continued


def dies_at(cfg: ExtractConfig, call: str, number: int, rank: str = "0") -> None:
    """Extract, saving after every batch, and be killed by the `number`-th call of os.<call>, half-way in it if it writes."""
    real, count = getattr(os, call), 0

    def last_words(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == number and os.environ.get("RANK", "0") == rank:
            if call == "pwrite":
                file, data, place = arguments
                real(file, data[: len(data) // 2 + 1], place)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(os, call, last_words)
    rows_module.SAVE_SECONDS = 0
    main(cfg)


PLACES = [
    *[("replace", number) for number in (1, 2, 3)],  # before ids.txt, the empty file, meta.json are there
    ("pwrite", 1),  # in the first rows
    ("fsync", 1),  # before the first rows are on the disk
    ("replace", 1),  # before they are recorded
    ("pwrite", 2),  # in the second rows, the first are recorded
    ("replace", 2),
    ("pwrite", 2),
    ("fsync", 3),
    ("replace", 2),  # all is recorded; before the file gets its name
    ("unlink", 2),  # it has its name, the records are still there (1: of the file beside the last record)
]


@pytest.mark.parametrize("level", ["global", "tokens"])
def test_killed_anywhere_and_continued(tmp_path: Path, images: Path, checkpoint: str, level: str) -> None:
    """kill -9 at one place after another, in the same folder."""
    main(config(checkpoint, images, tmp_path / "whole", level=level))
    expected, cfg = contents(tmp_path / "whole"), config(checkpoint, images, tmp_path / "out", level=level)
    for place in PLACES:
        (outcome,) = run_processes(dies_at, cfg, *place, environments=[{}])
        assert outcome.status == -signal.SIGKILL, f"not killed at {place}: {outcome.stderr}"
        finished = (tmp_path / "out" / "features.npy").exists()
        assert finished == (place[0] == "unlink"), "an incomplete file never has the final name"
    main(cfg)
    found = contents(tmp_path / "out")
    assert {name: content for name, content in found.items() if not name.startswith(".")} == expected
    assert not [name for name in found if name.startswith(".features")], "what was half written goes too"


def test_killed_in_two_processes_and_continued_in_one(tmp_path: Path, images: Path, checkpoint: str) -> None:
    main(config(checkpoint, images, tmp_path / "whole"))
    cfg = config(checkpoint, images, tmp_path / "out")
    outcomes = run_processes(dies_at, cfg, "pwrite", 2, "1", environments=group())
    assert outcomes[1].status == -signal.SIGKILL and outcomes[0].status != 0
    done = RowFile(tmp_path / "out" / "features.npy", (13, 32), block=4).remaining().tolist()
    assert done == [3], "both have recorded what they wrote before"
    encoder, seen = count_images(checkpoint)
    extract(encoder, find_images(str(images)), tmp_path / "out", batch_size=4)
    assert seen == [1, 1], "one blank image, and the only one of the last batch"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def count_images(checkpoint: str) -> tuple[Encoder, list[int]]:
    """The encoder, and a list that grows by the images of each of its forward passes."""
    seen: list[int] = []
    encoder = module.load_encoder(checkpoint)
    encoder.register_forward_pre_hook(lambda _, images: seen.append(len(images[0])))
    return encoder, seen


def test_what_is_finished_is_not_computed_again(tmp_path: Path, images: Path, checkpoint: str) -> None:
    main(config(checkpoint, images, tmp_path / "out"))
    before = contents(tmp_path / "out")
    encoder, seen = count_images(checkpoint)
    extract(encoder, find_images(str(images)), tmp_path / "out", batch_size=4)
    assert seen == [1] and contents(tmp_path / "out") == before
    main(config(checkpoint, images, tmp_path / "out", index=True, labels=True))  # these are added to it
    assert set(contents(tmp_path / "out")) - set(before) == {"index.faiss", "labels.npy", "classes.txt"}
    (tmp_path / "out" / "features.npy").unlink()
    main(config(checkpoint, images, tmp_path / "out"))
    assert contents(tmp_path / "out")["features.npy"] == before["features.npy"]


def test_broken_image_stops_and_keeps_what_is_done(
    tmp_path: Path, images: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line; repaired, the same command goes on behind what was done."""
    copy = shutil.copytree(images, tmp_path / "images")
    broken = copy / "b" / "005.png"
    good = broken.read_bytes()
    broken.write_bytes(good[:40])
    command = ["extract", "--checkpoint", checkpoint, "--data", str(copy), "--out", str(tmp_path / "out")]
    command += ["--batch_size", "4", "--workers", "0", "--device", "cpu"]
    assert cli.main(command) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"dino-simpool extract: error: {broken} cannot be read as an image")
    assert RowFile(tmp_path / "out" / "features.npy", (13, 32), block=4).remaining().tolist() == [2, 3]
    broken.write_bytes(good)
    assert cli.main(command) == 0
    main(config(checkpoint, images, tmp_path / "whole"))
    assert contents(tmp_path / "out")["features.npy"] == contents(tmp_path / "whole")["features.npy"]


def test_command_as_a_process(tmp_path: Path, images: Path, checkpoint: str) -> None:
    """The script of the same name, from another folder, with paths relative to it."""
    script = Path(cli.__file__).parents[1] / "eval" / "extract_features.py"
    shutil.copytree(images, tmp_path / "IMAGES")
    command = [sys.executable, str(script), "--checkpoint", checkpoint, "--data", "IMAGES", "--out", "OUT", "--index"]
    command += ["--batch_size", "4", "--workers", "1", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "written to OUT/features.npy" in done.stdout, done.stderr
    assert set(contents(tmp_path / "OUT")) == {"features.npy", "ids.txt", "meta.json", "index.faiss"}
    main(config(checkpoint, images, tmp_path / "here"))
    np.testing.assert_array_equal(load(tmp_path / "OUT"), load(tmp_path / "here"))


# -- refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "tokens"}, "level global -> tokens"),
        ({"batch_size": 5}, "batch_size 4 -> 5"),
        ({"view": "whole"}, "preprocessing.view crop -> whole, preprocessing.resize 36 -> None"),
        ({"image_size": 40}, "preprocessing.image_size 32 -> 40, preprocessing.resize 36 -> 45"),
        ({"precision": "bf16"}, "precision fp32 -> bf16"),
        ({"which": "untrained"}, "weights "),
    ],
)
@pytest.mark.parametrize("state", ["finished", "begun"])
def test_other_settings_are_refused_and_named(
    tmp_path: Path, images: Path, checkpoint: str, options: dict[str, Any], words: str, state: str
) -> None:
    main(config(checkpoint, images, tmp_path / "out"))
    if state == "begun":
        os.rename(tmp_path / "out" / "features.npy", tmp_path / "out" / "features.partial.npy")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="was made with other settings") as refused:
        main(config(checkpoint, images, tmp_path / "out", **options))
    said = str(refused.value)
    assert f"({words}" in said and said.endswith("): give another --out, or those settings") and "\n" not in said
    assert contents(tmp_path / "out") == before


def test_another_checkpoint_or_other_images_are_refused(tmp_path: Path, images: Path, checkpoint: str) -> None:
    main(config(checkpoint, images, tmp_path / "out"))
    other = exported(tmp_path / "other", pool="simpool gamma")
    with pytest.raises(ValueError, match=r"\(model\.gamma None -> 1\.25\): give another --out"):
        main(config(other, images, tmp_path / "out"))
    copy = shutil.copytree(images, tmp_path / "images")
    shutil.copytree(Path(checkpoint).parent, tmp_path / "moved")
    main(config(str(tmp_path / "moved" / "backbone.safetensors"), copy, tmp_path / "out"))  # moved is not changed
    (copy / "a" / "000.png").unlink()
    with pytest.raises(ValueError, match=r"\(images\.count 13 -> 12, images\.names \w{24} -> \w{24}\)"):
        main(config(checkpoint, copy, tmp_path / "out"))


def test_other_files_under_the_same_names_are_refused(tmp_path: Path, images: Path, checkpoint: str, capsys: Any) -> None:
    copy = shutil.copytree(images, tmp_path / "images")
    main(config(checkpoint, copy, tmp_path / "out"))
    main(config(checkpoint, copy, tmp_path / "out"))
    first, second = (text.splitlines()[-1].strip() for text in capsys.readouterr().out.split("extract:")[1:])
    assert first.startswith("written to") and second.startswith("already complete, with these settings and files, in")
    shutil.copyfile(copy / "b/001.png", copy / "a/000.png")
    with pytest.raises(ValueError, match="out was made from other files with the same names: give another --out"):
        main(config(checkpoint, copy, tmp_path / "out"))


def test_other_versions_are_refused(tmp_path: Path, images: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main(config(checkpoint, images, tmp_path / "out"))
    now = module.versions()
    monkeypatch.setattr(module, "versions", lambda: now | {"torch": "9.0", "faiss": "9.0"})
    with pytest.raises(ValueError, match=rf"\(versions\.torch {torch.__version__[:24]} -> 9\.0\)".replace("+", r"\+")):
        main(config(checkpoint, images, tmp_path / "out"))


def test_folders_of_unknown_content_are_refused(tmp_path: Path, images: Path, checkpoint: str) -> None:
    out = tmp_path / "out"
    main(config(checkpoint, images, out))
    meta = (out / "meta.json").read_text()
    (out / "meta.json").write_text(meta.replace('"batch_size": 4', '"batch_size": 5'))
    with pytest.raises(ValueError, match=r"is not the meta.json of features \(its hash does not match its settings"):
        main(config(checkpoint, images, out))
    (out / "meta.json").write_text(meta[:50])
    with pytest.raises(ValueError, match=r"meta\.json is not JSON"):
        main(config(checkpoint, images, out))
    (out / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"has features\.npy, but no meta\.json says what they are: give another --out"):
        main(config(checkpoint, images, out))
    (out / "meta.json").write_text(meta)
    (out / "features.npy").rename(out / "features.partial.npy")
    (out / "features.partial.npy").write_bytes((out / "features.partial.npy").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"features\.partial\.npy is broken"):
        main(config(checkpoint, images, out))


def test_disk_that_is_too_small(tmp_path: Path, images: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is written. What is there already needs no room."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=13 * 32 * 4 - 1))
    with pytest.raises(ValueError, match=r"the features need 0\.00 GB, but .*/deep/out has 0\.00 GB left: free some"):
        main(config(checkpoint, images, tmp_path / "deep" / "out"))
    assert not (tmp_path / "deep").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=13 * 32 * 4))
    main(config(checkpoint, images, tmp_path / "deep" / "out"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    main(config(checkpoint, images, tmp_path / "deep" / "out"))


def test_full_disk_while_writing(tmp_path: Path, images: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError, and what is done stays."""
    real, count = os.pwrite, 0

    def full(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"cannot write .*/out/features\.partial\.npy: the disk is full \([\d,]+ bytes"):
        main(config(checkpoint, images, tmp_path / "out"))
    assert RowFile(tmp_path / "out" / "features.npy", (13, 32), block=4).remaining().tolist() == [2, 3]
    main(config(checkpoint, images, tmp_path / "out"))
    main(config(checkpoint, images, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_rows_that_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, expected = os.pwrite, np.arange(15, dtype=np.float32).reshape(5, 3)
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: real(file, data[:7], place))
    rows = RowFile(tmp_path / "x.npy", (5, 3), block=2)
    rows.create()
    with rows:
        for block in (2, 0, 1):
            rows.write(block, expected[rows.rows_of(np.array([block]))])
    rows.finish()
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected) and list(tmp_path.iterdir()) == [tmp_path / "x.npy"]


def test_features_that_are_not_finite_name_their_image(tmp_path: Path, images: Path, checkpoint: str) -> None:
    encoder = module.load_encoder(checkpoint)

    def spoil(_: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[2 % len(out)] = np.inf if len(given[0]) > 1 else 0.0  # not the blank image
        return out

    encoder.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"the features of a/004\.png are not finite: check the weights and that image"):
        extract(encoder, find_images(str(images)), tmp_path / "out", batch_size=4, workers=0)


def test_sources_and_sizes_that_cannot_be(tmp_path: Path, images: Path, checkpoint: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*/empty: give a folder"):
        main(config(checkpoint, tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(config(checkpoint, tmp_path / "nowhere", tmp_path / "out"))
    with pytest.raises(ValueError, match="labels need one folder of class folders, given 2 sources"):
        main(config(checkpoint, images, tmp_path / "out", data=(str(images), str(images)), labels=True))
    with pytest.raises(ValueError, match="2 x 2 is the least"):
        main(config(checkpoint, images, tmp_path / "out", image_size=4))
    for name in ("checkpoint", "data", "out"):
        with pytest.raises(ValueError, match=f"no {name} is given: give --checkpoint"):
            main(dataclasses.replace(config(checkpoint, images, tmp_path / "out"), **{name: ""}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--index", "--level", "tokens"], "index is for level global, given level tokens"),
        (["--view", "whole", "--resize", "256"], "resize is for view crop"),
        (["--batch_size", "0"], "allowed is 1 to"),
        (["--workers", "-1"], "workers is -1: allowed is 0 to"),
        (["--view", "full"], "view is full: allowed is one of crop, whole"),
        (["--device", "gpu"], "device"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(ExtractConfig, options)


def test_a_flag_alone_means_true() -> None:
    assert parse(ExtractConfig, ["--index", "--labels", "--out", "x"]).index
    assert parse(ExtractConfig, ["--labels", "--index"]) == parse(ExtractConfig, ["--index", "true", "--labels=true"])
    assert not parse(ExtractConfig, ["--index", "false"]).index
    with pytest.raises(ConfigError, match="index is 2: allowed is true or false"):
        parse(ExtractConfig, ["--index", "2"])
