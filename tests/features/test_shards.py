"""`extract --shard` and `--merge`: bit for bit what `extract` writes alone; what is missing is named. And `--parquet`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from test_distributed import group, run_processes, values
from test_extract import config, contents, dies_at, exported, fill, load

from dino_simpool import cli
from dino_simpool.config import ConfigError, ExtractConfig, parse
from dino_simpool.features import parquet as parquet_module
from dino_simpool.features.extract import main
from dino_simpool.features.folder import Shard
from dino_simpool.features.rows import StoredRows
from dino_simpool.features.search import open_index


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fill(tmp_path_factory.mktemp("images"))
    shutil.copy(folder / "a" / "000.png", folder / "a" / "with\nbreak.png")
    shutil.copy(folder / "a" / "000.png", folder / "a" / os.fsdecode(b"caf\xe9.png"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def sharded(images: Path, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all/, of 15 images in batches of 2, and the same in parts/, three shards; with labels."""
    folder = tmp_path_factory.mktemp("sharded")
    main(config(checkpoint, images, folder / "all", batch_size=2, labels=True))
    for number in (2, 3, 1):
        main(config(checkpoint, images, folder / "parts", batch_size=2, labels=True, shard=f"{number}/3"))
    return folder


def merging(parts: Any, out: Path, **options: Any) -> ExtractConfig:
    return ExtractConfig(merge=str(parts) if isinstance(parts, Path) else parts, out=str(out), device="cpu", **options)


@pytest.mark.parametrize("count", [1, 2, 13, 64])
@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_shards_are_disjoint_and_complete(count: int, batch_size: int) -> None:
    batches = -(-count // batch_size)
    for of in range(1, batches + 1):
        parts = [Shard(number, of).rows(count, batch_size) for number in range(1, of + 1)]
        assert [row for part in parts for row in part] == list(range(count))
        assert all(len(part) and part.start % batch_size == 0 for part in parts)
    with pytest.raises(
        ValueError, match=f"are {batches} batches, too few for {batches + 1} shards: give at most {batches} shards"
    ):
        Shard(1, batches + 1).rows(count, batch_size)


def test_merged_shards_are_the_same_bit_for_bit(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In any order, from one folder or several, and into the folder of the shards."""
    expected = contents(sharded / "all")
    assert set(contents(sharded / "parts" / "shard_2_of_3")) - set(expected) == {"sizes.npy"}
    assert load(sharded / "parts" / "shard_2_of_3").shape == (6, 32)
    main(merging(sharded / "parts", tmp_path / "one"))
    assert "15 x 32" in capsys.readouterr().out
    several = tuple(str(sharded / "parts" / f"shard_{number}_of_3") for number in (3, 1, 2))
    main(merging(several, tmp_path / "several"))
    parts = shutil.copytree(sharded / "parts", tmp_path / "parts")
    for _ in range(2):  # again: it is already complete
        main(merging(parts, parts))
    assert "already complete" in capsys.readouterr().out
    for out in (tmp_path / "one", tmp_path / "several", parts):
        assert {name: (out / name).read_bytes() for name in expected} == expected


def test_levels_processes_and_one_shard(images: Path, checkpoint: str, tmp_path: Path) -> None:
    for level in ("tokens", "attention"):
        main(config(checkpoint, images, tmp_path / level, level=level))
        for number in (1, 2):
            cfg = config(checkpoint, images, tmp_path / f"{level}_parts", level=level, shard=f"{number}/2")
            values(run_processes(main, cfg, environments=group())) if level == "tokens" else main(cfg)
        main(merging(tmp_path / f"{level}_parts", tmp_path / f"{level}_merged"))
        assert contents(tmp_path / f"{level}_merged") == contents(tmp_path / level)
    main(config(checkpoint, images, tmp_path / "single", level="attention", shard="1/1"))
    main(merging(tmp_path / "single", tmp_path / "single_merged"))
    assert contents(tmp_path / "single_merged") == contents(tmp_path / "attention")


def test_killed_shard_goes_on(sharded: Path, images: Path, checkpoint: str, tmp_path: Path) -> None:
    cfg = config(checkpoint, images, tmp_path, batch_size=2, labels=True, shard="3/3")
    (outcome,) = run_processes(dies_at, cfg, "pwrite", 2, environments=[{}])
    assert outcome.status == -signal.SIGKILL, outcome.stderr
    with pytest.raises(ValueError, match=r"3 of 3 shards are not finished: 1/3, 2/3, 3/3 \(begun\); run `extract --shard`"):
        main(merging(tmp_path, tmp_path / "merged"))
    main(cfg)
    assert contents(tmp_path / "shard_3_of_3") == contents(sharded / "parts" / "shard_3_of_3")


def test_killed_merge_goes_on(sharded: Path, tmp_path: Path) -> None:
    (outcome,) = run_processes(dies_at, merging(sharded / "parts", tmp_path / "out"), "pwrite", 3, environments=[{}])
    assert outcome.status == -signal.SIGKILL, outcome.stderr
    assert not (tmp_path / "out" / "features.npy").exists()
    main(merging(sharded / "parts", tmp_path / "out"))
    found = {name: content for name, content in contents(tmp_path / "out").items() if not name.startswith(".")}
    assert found == contents(sharded / "all")


def test_repaired_image_costs_its_own_shard_only(images: Path, checkpoint: str, tmp_path: Path) -> None:
    copy = shutil.copytree(images, tmp_path / "images")
    broken = copy / "b" / "009.png"
    good = broken.read_bytes()
    broken.write_bytes(good[:40])
    main(config(checkpoint, copy, tmp_path / "parts", shard="1/2"))
    with pytest.raises(ValueError, match=r"009\.png cannot be read as an image"):
        main(config(checkpoint, copy, tmp_path / "parts", shard="2/2"))
    broken.write_bytes(good)
    for number in (1, 2):
        main(config(checkpoint, copy, tmp_path / "parts", shard=f"{number}/2"))
    main(merging(tmp_path / "parts", tmp_path / "merged"))
    main(config(checkpoint, copy, tmp_path / "all"))
    assert contents(tmp_path / "merged") == contents(tmp_path / "all")


def test_shards_that_do_not_fit_are_named(sharded: Path, images: Path, checkpoint: str, tmp_path: Path) -> None:
    parts, out = shutil.copytree(sharded / "parts", tmp_path / "parts"), tmp_path / "out"
    shutil.copytree(parts / "shard_2_of_3", tmp_path / "again")
    with pytest.raises(ValueError, match=r"shard 2/3 is there twice, .*again and .*shard_2_of_3: give one of them"):
        main(merging((str(parts), str(tmp_path / "again")), out))
    os.rename(parts / "shard_2_of_3", tmp_path / "two")
    with pytest.raises(ValueError, match=r"1 of 3 shards are not finished: 2/3; run `extract --shard` for these"):
        main(merging(parts, out))
    main(config(checkpoint, images, parts, batch_size=2, precision="bf16", shard="2/3"))
    with pytest.raises(ValueError, match=r"shard_1_of_3 and .*shard_2_of_3 are not shards .*\(precision fp32 -> bf16\)"):
        main(merging(parts, out))
    shutil.rmtree(parts / "shard_2_of_3")
    main(config(checkpoint, images, parts, batch_size=2, shard="2/4"))
    with pytest.raises(ValueError, match=r"not shards of the same set \(shards 3 -> 4\)"):
        main(merging(parts, out))
    shutil.rmtree(parts / "shard_2_of_4")
    main(config(checkpoint, images, parts, batch_size=2, shard="2/3"))
    with pytest.raises(ValueError, match=r"shard_1_of_3 has labels and .*shard_2_of_3 has none"):
        main(merging(parts, out))
    for given in (tmp_path, sharded / "all"):
        with pytest.raises(ValueError, match=r"holds no shards: give folders that `extract --shard` wrote"):
            main(merging(given, out))
    with pytest.raises(ValueError, match=r"shard_1_of_3 holds shard 1/3, not all images: give another --out"):
        main(config(checkpoint, images, parts / "shard_1_of_3", batch_size=2))


@pytest.mark.parametrize("name", ["features.npy", "ids.txt", "sizes.npy"])
def test_damaged_shards_are_named_and_can_be_replaced(sharded: Path, tmp_path: Path, name: str) -> None:
    parts = shutil.copytree(sharded / "parts", tmp_path / "parts")
    path = parts / "shard_2_of_3" / name
    good = bytearray(path.read_bytes())
    path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    with pytest.raises(ValueError, match=rf"shard_2_of_3/{name} is .*remove this folder and extract that shard again"):
        main(merging(parts, tmp_path / "out"))
    path.write_bytes(good)
    main(merging(parts, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(sharded / "all")


def test_merge_needs_no_model_and_no_images(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line, with an index; weights and images are elsewhere."""
    parts = shutil.copytree(sharded / "parts", tmp_path / "parts")
    for path in parts.glob("*/meta.json"):
        meta = json.loads(path.read_text())
        meta["source"] |= {"checkpoint": "/gone/backbone.safetensors", "data": ["/gone/images"]}
        path.write_text(json.dumps(meta))
    assert cli.main(["extract", "--merge", str(parts), "--out", str(parts), "--index", "--device", "cpu"]) == 0
    assert "teacher of /gone/backbone.safetensors" in capsys.readouterr().out and (parts / "index.faiss").exists()
    assert load(parts).tobytes() == load(sharded / "all").tobytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "0/16"], "shard is 0/16: give the number of the part, from 1, and how many there are, as in 3/16"),
        (["--shard", "17/16"], "shard is 17/16: give"),
        (["--shard", "3"], "shard is 3: give"),
        (["--shard", "1/2", "--index"], "index is of all images, not of a shard: .* give it with --merge"),
        (["--merge", "A", "--shard", "1/2"], "merge takes all settings from the shards: leave out shard"),
        (["--merge", "A", "--level", "tokens", "--data", "B"], "leave out data, level"),
        (["--parquet", "--level", "tokens"], "parquet is for level global, given level tokens"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(ExtractConfig, options)


# -- Parquet


def test_parquet_has_ids_rows_and_features(
    sharded: Path, images: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same after merging, and of a shard, with several row groups; names are the lines of ids.txt."""
    monkeypatch.setattr(parquet_module, "GROUP_BYTES", 4 * 32 * 4)
    main(config(checkpoint, images, tmp_path / "all", batch_size=2, parquet=True))
    main(merging(sharded / "parts", tmp_path / "merged", parquet=True))
    main(config(checkpoint, images, tmp_path / "parts", batch_size=2, shard="2/3", parquet=True))
    for folder, first in ((tmp_path / "all", 0), (tmp_path / "merged", 0), (tmp_path / "parts" / "shard_2_of_3", 4)):
        file = pyarrow.parquet.ParquetFile(folder / "features.parquet")
        table = file.read()
        assert file.num_row_groups == -(-len(table) // 4) and table.schema.names == ["id", "row", "feature"]
        assert table["id"].to_pylist() == (folder / "ids.txt").read_text().split("\n")[:-1]
        assert table["row"].to_pylist() == list(range(first, first + len(table)))
        found = np.array(table["feature"].to_pylist(), np.float32)
        np.testing.assert_array_equal(found, load(folder))
        assert "features.parquet" in json.loads((folder / "meta.json").read_text())["files"]


def test_parquet_and_index_are_those_of_the_features(
    images: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept while they are, also by later commands that ask for less; made again with the features of other images."""
    copy, out = shutil.copytree(images, tmp_path / "images"), tmp_path / "out"
    cfg = config(checkpoint, copy, out, batch_size=2, parquet=True, index=True)
    main(cfg)
    main(config(checkpoint, copy, out, batch_size=2))
    before = contents(out)
    with monkeypatch.context() as patch:
        for name in ("write_parquet", "build_flat"):
            patch.setattr(f"dino_simpool.features.extract.{name}", lambda *_, **__: pytest.fail("made again"))
        main(cfg)
    assert contents(out) == before
    shutil.copy(copy / "b" / "001.png", copy / "a" / "000.png")
    (out / "features.npy").unlink()
    main(config(checkpoint, copy, out, batch_size=2))  # the others are of the features before
    with pytest.raises(ValueError, match=r"index\.faiss was not made of the features\.npy beside it: write it again"):
        open_index(str(out))
    main(cfg)
    open_index(str(out))
    after = contents(out)
    assert all(after[name] != before[name] for name in ("features.npy", "features.parquet", "index.faiss"))
    stored = pyarrow.parquet.read_table(out / "features.parquet")["feature"].to_pylist()
    np.testing.assert_array_equal(np.array(stored), load(out))


def test_without_pyarrow_it_is_said_before_anything_else(
    images: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"parquet needs pyarrow.*: pip install 'dino-simpool\[parquet\]', or leave it out"):
        main(config(checkpoint, images, tmp_path / "out", parquet=True))
    assert not (tmp_path / "out").exists()


# -- rows from the disk


def test_stored_rows_are_those_of_the_file(tmp_path: Path) -> None:
    expected = np.random.default_rng(0).normal(size=(7, 3, 2)).astype(np.float32)
    np.save(tmp_path / "x.npy", expected)
    rows = StoredRows(tmp_path / "x.npy")
    assert rows.shape == (7, 3, 2) and len(rows) == 7
    for part in (slice(0, 7), slice(2, 5), slice(6, 99), slice(3, 3), np.array([5, 0, 0, 6]), np.array([], int)):
        np.testing.assert_array_equal(rows[part], expected[part])
    np.save(tmp_path / "y.npy", expected.astype(np.float64))
    with pytest.raises(ValueError, match=r"y\.npy holds float64 and not float32 rows"):
        StoredRows(tmp_path / "y.npy")
