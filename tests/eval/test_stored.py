"""k-NN, linear and recall on features that are there: the numbers are those of the images, and a wrong folder is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniatures import BUILDERS
from safetensors.torch import load_file
from test_extract import exported
from test_features import write_images
from test_knn import plain_rank

from dino_simpool import cli
from dino_simpool.config import ConfigError, KnnConfig, LinearConfig, RecallConfig, parse
from dino_simpool.data import class_folder
from dino_simpool.eval.knn import knn_rank
from dino_simpool.features.folder import settings_hash
from dino_simpool.features.neighbors import neighbors
from dino_simpool.features.stored import StoredFeatures
from dino_simpool.files import file_sha256

TRAIN, VAL = {"a": 6, "a b": 5, "b": 7, "c": 5, "d": 4, "e": 3}, {"a": 3, "a b": 2, "c": 4, "e": 1}
COMMON = ["--device", "cpu", "--workers", "0"]


def run(*words: Any) -> int:
    return cli.main([*map(str, words), *COMMON])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with train and val; its features: one/ of all of it, two/train and two/val; the encoder, and another one."""
    home = tmp_path_factory.mktemp("made")
    write_images(home / "data/train", TRAIN, seed=1, size=32)
    write_images(home / "data/val", VAL, seed=2, size=32)
    (home / "data/train/b/deep").mkdir()
    shutil.move(home / "data/train/b/003.png", home / "data/train/b/deep/x.png")
    weights, other = exported(home / "encoder"), exported(home / "other", seed=4)
    for name, source, checkpoint in (
        ("one", "data", weights), ("two/train", "data/train", weights), ("two/val", "data/val", weights),
        ("mixed/val", "data/val", other), ("mixed/train", "data/train", weights),
    ):  # fmt: skip
        assert run("extract", "--checkpoint", checkpoint, "--data", home / source, "--out", home / name, "--batch_size", 5) == 0
    return home


def results(out: Path) -> dict[str, Any]:
    [file] = out.glob("*.json")
    return json.loads(file.read_text()) | {"file": file.name}


LINEAR = ["--protocol", "grid", "--epochs", "4", "--probe_batch_size", "8", "--grid", "[0.1, 3]"]
EVALUATORS = {"knn": ["--k", "[1, 7, 100]"], "linear": LINEAR}
SAME = ("metrics", "per_class", "counts", "image_digests", "split", "decoding", "dtype")


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("with_data", [True, False])
def test_numbers_are_those_of_the_images(evaluator: str, with_data: bool, made: Path, tmp_path: Path) -> None:
    """Bit for bit where the batches are the same, as in two folders; the weights of the head too."""
    own, weights = EVALUATORS[evaluator], made / "encoder/backbone.safetensors"
    data = ["--data", made / "data"]
    assert run(evaluator, *own, *data, "--checkpoint", weights, "--batch_size", 5, "--out", tmp_path / "images") == 0
    expected = results(tmp_path / "images")
    for name in ("two", "one"):
        out = tmp_path / name
        assert run(evaluator, *own, *(data if with_data else []), "--features", made / name, "--out", out) == 0
        record = results(out)
        assert record["file"] == ("knn_features.json" if evaluator == "knn" else "linear_grid_features.json")
        assert {key: record[key] for key in SAME} == {key: expected[key] for key in SAME}
        assert record["overlap"] == {"same_folder": False, "equal_files": None, "val": 10}
        if evaluator == "linear":
            found, heads = (load_file(folder / file) for folder, file in (
                (out, "linear_grid_features.safetensors"), (tmp_path / "images", "linear_grid.safetensors")))  # fmt: skip
            close = {"rtol": 0, "atol": 0} if name == "two" else {}
            torch.testing.assert_close(found, heads, **close)
            assert record["grid"] == expected["grid"] and record["classes"] == list(TRAIN)
        folders = [made / name] if name == "one" else [made / name / part for part in ("train", "val")]
        for each, folder in zip(record["features"], folders, strict=True):
            meta = json.loads((folder / "meta.json").read_text())
            assert each == {
                "folder": str(folder), "sha256": file_sha256(folder / "features.npy"), "count": meta["shape"][0],
                "settings": meta["settings"], "source": meta["source"],
            }  # fmt: skip
        assert record["model"]["sha256"] == file_sha256(weights) and record["model"]["checkpoint"] == str(weights)
        same = set(expected["model"]) - {"decoding"}
        assert {key: record["model"][key] for key in same} == {key: expected["model"][key] for key in same}


def test_results_lie_beside_the_features_or_the_checkpoint(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "one", tmp_path / "one")
    shutil.copytree(made / "encoder", tmp_path / "encoder")
    weights = tmp_path / "encoder/backbone.safetensors"
    assert run("knn", "--features", tmp_path / "one") == 0
    assert f"knn_features: teacher of {made / 'encoder/backbone.safetensors'}" in capsys.readouterr().out
    assert run("knn", "--features", tmp_path / "one", "--checkpoint", weights) == 0
    one, two = results(tmp_path / "one/results"), results(tmp_path / "encoder/results")
    assert one["metrics"] == two["metrics"] and two["model"]["checkpoint"] == str(weights)


def test_a_part_of_the_data(made: Path, tmp_path: Path) -> None:
    """The first images of each class, or without some, as from the images."""
    weights, data = made / "encoder/backbone.safetensors", made / "data"
    for number, options in enumerate((["--subset_per_class", "2"], ["--exclude", "[deep, 001.png]"])):
        given = ["knn", "--k", "[1, 4]", "--data", data, *options]
        assert run(*given, "--checkpoint", weights, "--out", tmp_path / f"images{number}") == 0
        assert run(*given, "--features", made / "one", "--out", tmp_path / f"features{number}") == 0
        expected, found = results(tmp_path / f"images{number}"), results(tmp_path / f"features{number}")
        assert {key: found[key] for key in SAME[:4]} == {key: expected[key] for key in SAME[:4]}


def test_val_that_is_train(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data in ([], ["--data", made / "data"]):
        out = tmp_path / f"out{len(data)}"
        assert run("knn", "--features", made / "one", "--val", "train/", "--k", "[1]", "--out", out, *data) == 0
        record = results(out)
        assert record["metrics"]["top1_k1"] == 100 and record["overlap"]["same_folder"]
        assert "warning: train and val are the same folder\n" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["cub200", "inshop", "folder"])
def test_recall(layout: str, made: Path, tmp_path: Path) -> None:
    """The same ranks, whether the folder of the data set was extracted or the one that holds it."""
    data, weights = BUILDERS[layout](tmp_path / "data"), made / "encoder/backbone.safetensors"
    common = ["recall", "--layout", layout]
    assert run(*common, "--data", data, "--checkpoint", weights, "--batch_size", 3, "--out", tmp_path / "images") == 0
    expected, folders = results(tmp_path / "images"), [data, next(path for path in data.iterdir() if path.is_dir())]
    for number, source in enumerate(folders[: 1 if layout == "folder" else 2]):
        features, out = tmp_path / f"features{number}", tmp_path / f"out{number}"
        assert run("extract", "--checkpoint", weights, "--data", source, "--out", features, "--batch_size", 3) == 0
        given = [] if layout == "folder" else ["--data", data]
        assert run(*common, "--features", features, "--out", out, *given) == 0
        record = results(out)
        assert record["file"] == f"recall_{layout}_dino_eval_features.json"
        for key in ("metrics", "counts", "ties", "k"):
            assert record[key] == expected[key], key
        assert record["preprocessing"] == expected["preprocessing"] | {"view": "crop"}
        ranks = [load_file(next(each.glob("*.safetensors")))["first_positive"] for each in (out, tmp_path / "images")]
        assert torch.equal(*ranks)
    if layout != "folder":
        assert run(*common, "--features", features, "--out", out) == 1


def change(folder: Path, what: str) -> None:
    """Break the features in a folder in one way."""
    meta = json.loads((folder / "meta.json").read_text())
    match what:
        case "flipped":
            content = bytearray((folder / "features.npy").read_bytes())
            content[-1] ^= 1
            (folder / "features.npy").write_bytes(content)
        case "swapped ids":
            first, second, *rest = (folder / "ids.txt").read_text().splitlines()
            (folder / "ids.txt").write_text("\n".join([second, first, *rest]) + "\n")
        case "unfinished":
            (folder / "features.npy").unlink()
        case "no meta":
            (folder / "meta.json").unlink()
        case "shape":
            np.save(folder / "features.npy", np.load(folder / "features.npy")[1:])
            del meta["files"]
        case "float64":
            np.save(folder / "features.npy", np.load(folder / "features.npy").astype(np.float64))
            del meta["files"]
        case "no array":
            (folder / "features.npy").write_bytes(b"")
            del meta["files"]
        case "level":
            meta["settings"]["level"] = "tokens"
            meta["hash"] = settings_hash(meta["settings"])
        case "shard":
            meta["shard"] = {"number": 1, "of": 2}
    if what != "no meta":
        (folder / "meta.json").write_text(json.dumps(meta))


BROKEN = {
    "flipped": "damaged or was changed",
    "swapped ids": "ids.txt is damaged or was changed",
    "unfinished": "run the same `extract` again",
    "no meta": "holds no features, nor do",
    "shape": "holds float32",
    "float64": "holds float64",
    "no array": "cannot be read",
    "level": "extract level global",
    "shard": "--merge",
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_features_are_named(what: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "one", tmp_path / "one")
    change(tmp_path / "one", what)
    assert run("knn", "--features", tmp_path / "one") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert BROKEN[what] in error and "error: " in error
    assert not list(tmp_path.glob("one/results/*"))


def test_features_of_something_else_are_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "data", tmp_path / "more")
    shutil.copy(tmp_path / "more/train/a/000.png", tmp_path / "more/train/a/new.png")
    shutil.copytree(made / "data", tmp_path / "less")
    (tmp_path / "less/train/a/000.png").unlink()
    shutil.copytree(made / "data", tmp_path / "changed")
    shutil.copy(tmp_path / "changed/train/a/000.png", tmp_path / "changed/train/b/000.png")
    write_images(tmp_path / "else/train", {"zebra": 2})
    write_images(tmp_path / "else/val", {"zebra": 2})
    loose = tmp_path / "loose"
    write_images(loose / "images", {"": 3})
    weights = made / "encoder/backbone.safetensors"
    assert run("extract", "--checkpoint", weights, "--data", loose / "images", "--out", loose / "features") == 0
    knn = ["knn", "--out", tmp_path / "out"]
    for options, message in (
        (["--features", made / "two", "--data", tmp_path / "more"], "has no features of 1 of 31 images of"),
        (["--features", made / "one", "--data", tmp_path / "more"], "has no features of 1 of 31 images of"),
        (["--features", made / "one", "--data", tmp_path / "less"], "has features of 30 images and"),
        (["--features", made / "two", "--data", tmp_path / "changed"], "has other files with the names in"),
        (["--features", made / "one", "--data", tmp_path / "else"], "has features of 30 images and"),
        (["--features", made / "one", "--data", tmp_path / "else", "--exclude", "[x]"], "has no features of"),
        (["--features", made / "mixed"], "were made in different ways (weights"),
        (["--features", made / "two", "--checkpoint", made / "other/backbone.safetensors"], "has no features of"),
        (["--features", made / "two", "--val", "test"], "holds no features (there is no meta.json)"),
        (["--features", made / "one", "--val", "test"], "has no images of test/, it has train/a/000.png"),
        (["--features", loose / "features", "--train", ""], "000.png in"),
        (["--features", made / "none"], "does not exist: give features encoder, or a folder"),
    ):
        assert run(*knn, *options) == 1, options
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error, error
    assert run("recall", "--features", loose / "features", "--out", tmp_path / "out") == 1
    assert "000.png in" in (said := capsys.readouterr().err) and "is in no class folder" in said
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (KnnConfig, ["--image_size", "64", "--precision", "bf16"], "leave out precision, image_size"),
        (KnnConfig, ["--which", "student"], "leave out which"),
        (KnnConfig, ["--transparency", "black"], "leave out transparency"),
        (KnnConfig, ["--subset_per_class", "3"], "give data too"),
        (LinearConfig, [], "give --protocol grid"),
        (RecallConfig, ["--preset", "dml_eval"], "leave preset out"),
    ],
)
def test_options_that_do_not_go_together(kind: type, options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(kind, ["--features", "FOLDER", *options])


def test_pixels_are_for_knn_only() -> None:
    assert parse(KnnConfig, ["--features", "pixels"]).stored == ""
    for kind in (LinearConfig, RecallConfig):
        with pytest.raises(ConfigError, match="that is for knn"):
            parse(kind, ["--features", "pixels"])


def test_ids_that_a_line_cannot_show(made: Path, tmp_path: Path) -> None:
    """Names of odd characters are read back, and found."""
    write_images(tmp_path / "images", dict.fromkeys((' "a', "x\ny", "#c", "träin"), 2), size=32)
    (tmp_path / "images/träin").rename(tmp_path / "images/tr\udcff")
    weights, out = made / "encoder/backbone.safetensors", tmp_path / "features"
    assert run("extract", "--checkpoint", weights, "--data", tmp_path / "images", "--out", out) == 0
    images, stored = class_folder(str(tmp_path / "images")), StoredFeatures.open(out)
    assert list(stored.names) == [images.name(i) for i in range(8)] and stored.labeled().classes == images.classes
    assert torch.equal(stored.of(images, files=True), torch.from_numpy(np.load(out / "features.npy")))


def test_features_of_version_0_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without checksums, which is said, and without what their weights were trained on."""
    old = tmp_path / "old"
    shutil.copytree(Path(__file__).parents[1] / "release_0_1/features", old)
    assert run("recall", "--features", old) == 0
    record = results(old / "results")
    assert "is of version 0.1 or of another tool and has no checksum" in capsys.readouterr().err
    assert record["counts"] == {"queries": 20, "classes": 10, "queries_without_positive": 0}
    rows, labels = np.load(old / "features.npy").astype(np.float64), np.arange(20) // 2
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    nearest = (unit @ unit.T - 2 * np.eye(20)).argmax(1)
    assert record["metrics"]["recall_1"] == pytest.approx(100 * (labels[nearest] == labels).mean())
    assert record["model"]["epochs"] is None and record["features"][0]["sha256"] == file_sha256(old / "features.npy")


# -- memory and precision


def test_the_bank_is_a_part_of_the_map(made: Path) -> None:
    """No copy for images that follow each other, and nothing can be written to it."""
    stored = StoredFeatures.open(made / "one")
    for part, count in (("train", 30), ("val", 10)):
        images = stored.labeled(part)
        rows = stored.of(images, files=False)
        inside = (rows.data_ptr() - stored.rows.data_ptr()) // (4 * rows.shape[1])
        assert len(rows) == count and inside == (0 if part == "train" else 30)


@pytest.mark.parametrize("width", [1, 24])
def test_half_precision_is_a_loop_over_its_rows(width: int) -> None:
    rng = np.random.default_rng(width)
    train, test = (rng.normal(size=(count, width)).astype(np.float16) for count in (400, 7))
    labels = rng.integers(0, 5, 400)
    ranks, nearest = plain_rank(train, labels, test, ks=(9,), num_classes=5)[9]
    given = torch.from_numpy(train), torch.from_numpy(test)
    assert np.array_equal(neighbors(*given, k=9)[1], nearest)
    assert np.array_equal(knn_rank(given[0], torch.from_numpy(labels), given[1], k=9, num_classes=5), ranks)


MEASURE = """
import sys, threading, time
import numpy as np, torch
from dino_simpool.eval.knn import vote_each_k
from dino_simpool.features import neighbors

def held():  # what the process holds of its own, without what it has mapped
    lines = open("/proc/self/status").read().split("\\n")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while not done:
        peak[0] = max(peak[0], held())
        time.sleep(0.002)

train, test = (torch.from_numpy(np.load(path, mmap_mode="r")) for path in sys.argv[1:3])
labels = torch.arange(len(train)) % 1000
vote_each_k(train[:100], labels[:100], test[:3], ks=(10,), temperature=0.07, num_classes=1000, top=5)
neighbors.MAX_BYTES, neighbors.neighbors.__kwdefaults__["max_bytes"] = (int(sys.argv[3]),) * 2
before, peak, done = held(), [0], False
thread = threading.Thread(target=watch)
thread.start()
started = time.monotonic()
voted = vote_each_k(train, labels, test, ks=(10, 20, 100, 200), temperature=0.07, num_classes=1000, top=5)
seconds, done = time.monotonic() - started, True
thread.join()
assert (voted[10][0][:, 0] == torch.arange(len(test)) * 7 % 1000).all()
print(peak[0] - before, seconds)
"""


def beyond_the_map(folder: Path, count: int, width: int, queries: int, dtype: type, max_bytes: int) -> tuple[float, float]:
    """Bytes that k-NN in a mapped bank takes beyond it at its peak, in a new process, and its seconds. Query q is row 7 q of
    the bank, hardly changed."""
    rng = np.random.default_rng(0)
    bank = np.lib.format.open_memmap(folder / "bank.npy", "w+", dtype, (count, width))
    for start in range(0, count, 20_000):
        part = bank[start : start + 20_000]
        part[:] = rng.standard_normal(part.shape, np.float32)
    bank.flush()
    near = bank[7 * np.arange(queries)] + rng.normal(0, 0.01, (queries, width))
    np.save(folder / "queries.npy", near.astype(dtype))
    del bank, part
    files = [str(folder / name) for name in ("bank.npy", "queries.npy")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, *files, str(max_bytes)], capture_output=True, text=True
    )
    (folder / "bank.npy").unlink()
    assert done.returncode == 0, done.stderr
    peak, seconds = map(float, done.stdout.split())
    return peak, seconds


linux = pytest.mark.skipif(sys.platform != "linux", reason="what a process holds of its own is told by Linux")


@linux
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_memory_is_that_of_the_blocks(dtype: type, tmp_path: Path) -> None:
    """A bank of 100 MB (float16: 50 MB) in blocks of 4 MB: never is even half of it held."""
    peak, _ = beyond_the_map(tmp_path, 50_000, 500, 60, dtype, 2**22)
    assert peak < 25e6, f"{peak / 1e6:.0f} MB"


@linux
@pytest.mark.long
@pytest.mark.parametrize(("count", "width"), [(1_280_000, 384), (1_280_000, 2048)])
def test_memory_of_imagenet(count: int, width: int, tmp_path: Path) -> None:
    """At most 1 GB beyond the mapped file: 2 and 10.5 GB of bank. Needs as much disk."""
    peak, seconds = beyond_the_map(tmp_path, count, width, 2_000, np.float32, 2**28)
    print(f"{count:,} x {width}: {peak / 1e9:.2f} GB beyond the bank, {seconds:.0f} s")
    assert peak < 1e9
