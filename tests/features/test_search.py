"""`search`: against brute force, with duplicates and ties; what it refuses; and its contact sheet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from PIL import Image
from test_distributed import group, run_processes, values
from test_extract import config, exported, fill

from dino_simpool import cli
from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import ConfigError, SearchConfig, parse
from dino_simpool.data import EvalTransform, find_images
from dino_simpool.data.decode import read_rgb
from dino_simpool.features import extract as extraction
from dino_simpool.features import search as module
from dino_simpool.features.extract import extract
from dino_simpool.features.index import build_flat, nearest
from dino_simpool.features.search import main
from dino_simpool.pictures import GAP


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with encoder/, images/ (a/010.png is the same as b/003.png), other/ images, and features/ with an index."""
    folder = tmp_path_factory.mktemp("extracted")
    fill(folder / "images")
    shutil.copy(folder / "images" / "b" / "003.png", folder / "images" / "a" / "010.png")
    fill(folder / "other", 4, seed=1)
    checkpoint = exported(folder / "encoder", pool="simpool gamma")
    extraction.main(config(checkpoint, folder / "images", folder / "features", index=True))
    return folder


def options(extracted: Path, out: Path, query: Any, **more: Any) -> SearchConfig:
    given = {"index": str(extracted / "features"), "query": query, "out": str(out), "workers": 0, "device": "cpu", "k": 5}
    return SearchConfig(**given | more)


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def brute_force(features: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All similarities in steps of 1e-6, descending, and their rows, by a loop in float64."""
    lengths = [max(1e-12, float(np.sqrt((row.astype(np.float64) ** 2).sum()))) for row in (*features, query)]
    cosine = [
        round(float((row.astype(np.float64) * query.astype(np.float64)).sum()) / length / lengths[-1], 6)
        for row, length in zip(features, lengths, strict=False)
    ]
    order = sorted(range(len(cosine)), key=lambda i: (-cosine[i], i))
    return np.array([cosine[i] for i in order]), np.array(order)


# -- the neighbors


@pytest.mark.parametrize("k", [1, 7, 300])
def test_nearest_is_brute_force(k: int) -> None:
    """Among rows of all lengths, with duplicates and one of zeros."""
    noise = np.random.default_rng(0)
    features = (noise.normal(size=(300, 6)) * noise.uniform(0.1, 9, (300, 1))).astype(np.float32)
    features[200:220] = 3 * features[7]
    features[20] = 0
    index = build_flat(features)
    for query in (*noise.normal(size=(9, 6)).astype(np.float32), 2 * features[7], features[20]):
        similarity, rows = nearest(features, index, query, k=k)
        expected = brute_force(features, query)
        np.testing.assert_array_equal(rows, expected[1][:k])
        np.testing.assert_allclose(similarity, expected[0][:k], atol=1e-12)


def test_many_near_ties_hide_no_neighbor() -> None:
    """More of them than candidates: the lower rows are found all the same. And k above all rows is all of them."""
    angle = 9e-4 * (1 - np.arange(200) / 200)  # cosines of 1 - 4e-7 to 1, which all are 1.000000; the last rows are nearest
    features, query = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32), np.array([5, 0], np.float32)
    similarity, rows = nearest(features, build_flat(features), query, k=3)
    assert rows.tolist() == [0, 1, 2] and similarity.tolist() == [1, 1, 1]
    similarity, rows = nearest(features[:2], build_flat(features[:2]), query, k=10)
    assert rows.tolist() == [0, 1]


def test_duplicate_is_first_and_lower_row_wins(extracted: Path, tmp_path: Path) -> None:
    """A copy outside of the set finds both copies in it, with similarity 1, and then what brute force finds."""
    shutil.copy(extracted / "images" / "b" / "003.png", tmp_path / "query.png")
    main(options(extracted, tmp_path / "out", str(tmp_path / "query.png")))
    ((found,),) = (results(tmp_path / "out")["queries"],)
    assert found["query"] == str(tmp_path / "query.png")
    assert [neighbor["name"] for neighbor in found["neighbors"][:2]] == ["a/010.png", "b/003.png"]
    assert [neighbor["similarity"] for neighbor in found["neighbors"][:2]] == [1, 1]
    assert not any(neighbor["query_itself"] for neighbor in found["neighbors"])
    encoder = load_encoder(str(extracted / "encoder" / "backbone.safetensors"))
    transform = EvalTransform(32, resize=36, mean=encoder.config.mean, std=encoder.config.std)
    vector = encoder(transform(read_rgb(str(tmp_path / "query.png")))[None]).detach().numpy()[0]
    similarity, rows = brute_force(np.load(extracted / "features" / "features.npy"), vector)
    assert [neighbor["row"] for neighbor in found["neighbors"]] == rows[:5].tolist()
    np.testing.assert_allclose([neighbor["similarity"] for neighbor in found["neighbors"]], similarity[:5], atol=2e-6)
    assert [neighbor["rank"] for neighbor in found["neighbors"]] == [1, 2, 3, 4, 5]


def test_query_of_the_set_is_marked_or_left_out(extracted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = str(extracted / "images" / "b" / "003.png")
    main(options(extracted, tmp_path / "kept", query, k=3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [query, "    1  1.0000  a/010.png", "    2  1.0000  b/003.png  (the query itself)"]
    assert lines[-1] == f"written to {tmp_path}/kept/results.json and {tmp_path}/kept/contact_sheet.png" and len(lines) == 5
    main(options(extracted, tmp_path / "excluded", query, k=3, exclude_self=True))
    kept, excluded = (results(tmp_path / name)["queries"][0]["neighbors"] for name in ("kept", "excluded"))
    assert [neighbor["query_itself"] for neighbor in kept] == [False, True, False]
    assert [neighbor["name"] for neighbor in excluded][:2] == ["a/010.png", kept[2]["name"]] and len(excluded) == 3
    assert [neighbor["rank"] for neighbor in excluded] == [1, 2, 3]


def test_folders_lists_and_several_images(extracted: Path, tmp_path: Path) -> None:
    """All say the same; the contact sheet holds the first rows only."""
    paths = [str(path) for path in sorted((extracted / "other").rglob("*.png"))]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    for name, query in (("folder", str(extracted / "other")), ("list", str(tmp_path / "list.txt")), ("images", tuple(paths))):
        main(options(extracted, tmp_path / name, query, sheet_rows=3))
    found = [[q["neighbors"] for q in results(tmp_path / name)["queries"]] for name in ("folder", "list", "images")]
    assert len(found[0]) == 4 and found[0] == found[1] == found[2]
    with Image.open(tmp_path / "folder" / "contact_sheet.png") as sheet:
        assert sheet.height == GAP + 3 * (160 + 2 * 17 + 4 + GAP)
    main(options(extracted, tmp_path / "two", paths[0], sheet_rows=3))
    values(run_processes(main, options(extracted, tmp_path / "pair", tuple(paths)), environments=group()))
    assert [q["neighbors"] for q in results(tmp_path / "pair")["queries"]] == found[0]
    assert results(tmp_path / "pair")["processes"] == 2


def test_settings_are_in_the_results(extracted: Path, tmp_path: Path) -> None:
    main(options(extracted, tmp_path, str(extracted / "other" / "a" / "000.png")))
    record, meta = results(tmp_path), json.loads((extracted / "features" / "meta.json").read_text())
    assert record["extraction"] == meta["hash"] and record["preprocessing"] == meta["settings"]["preprocessing"]
    assert record["model"]["gamma"] == 1.25 and record["model"]["sha256"] == meta["source"]["sha256"]
    assert record["config"]["k"] == 5 and record["counts"] == {"images": 13, "queries": 1}
    assert record["versions"]["faiss"] == faiss.__version__


def test_search_takes_the_view_and_the_model_of_the_index(extracted: Path, tmp_path: Path) -> None:
    """Extracted from Python with an option of the model changed and with whole images: each image finds itself, exactly."""
    checkpoint = str(extracted / "encoder" / "backbone.safetensors")
    encoder = load_encoder(checkpoint, gamma=3.0)
    images = find_images(str(extracted / "images"))
    view = {"view": "whole", "image_size": 40, "mean": encoder.config.mean, "std": encoder.config.std}
    meta = json.loads((extracted / "features" / "meta.json").read_text())
    features = extract(encoder, images, tmp_path / "features", view=view, batch_size=4, source=meta["source"])
    faiss.write_index(build_flat(features), str(tmp_path / "features" / "index.faiss"))
    query = str(extracted / "images" / "b" / "005.png")
    main(options(extracted, tmp_path / "out", query, index=str(tmp_path / "features")))
    first = results(tmp_path / "out")["queries"][0]["neighbors"][0]
    assert (first["name"], first["similarity"], first["query_itself"]) == ("b/005.png", 1, True)
    main(options(extracted, tmp_path / "crop", query))
    assert results(tmp_path / "out")["model"]["gamma"] == 3 and results(tmp_path / "crop")["model"]["gamma"] == 1.25


def test_command_as_a_process(extracted: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dino_simpool", "search", "--index", str(extracted / "features"), "--query", "QUERY.png"]
    command += ["--out", "OUT", "--k", "2", "--exclude_self", "--workers", "1", "--device", "cpu"]
    shutil.copy(extracted / "images" / "b" / "003.png", tmp_path / "QUERY.png")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "QUERY.png\n    1  1.0000  a/010.png\n    2  1.0000  b/003.png\nwritten to OUT/results.json and OUT/contact_sheet.png\n"
    )
    assert len(results(tmp_path / "OUT")["queries"][0]["neighbors"]) == 2


# -- moved, missing, or something else


@pytest.fixture
def moved(extracted: Path, tmp_path: Path) -> Path:
    """The same folder elsewhere, whose meta.json names what was moved away."""
    folder = shutil.copytree(extracted, tmp_path / "moved")
    meta = json.loads((folder / "features" / "meta.json").read_text())
    meta["source"] |= {"checkpoint": "/gone/backbone.safetensors", "data": ["/gone/images"]}
    (folder / "features" / "meta.json").write_text(json.dumps(meta))
    return folder


def test_moved_checkpoint_and_images(moved: Path, tmp_path: Path) -> None:
    query = str(moved / "other" / "a" / "000.png")
    data, checkpoint = str(moved / "images"), str(moved / "encoder" / "backbone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"the images of the index: /gone/images .*; give their new place with --data"):
        main(options(moved, tmp_path / "out", query, checkpoint=checkpoint))
    with pytest.raises(
        FileNotFoundError, match=r"the checkpoint of the index, /gone/.*, does not exist: give its new place with --checkpoint"
    ):
        main(options(moved, tmp_path / "out", query, data=data))
    other = exported(tmp_path / "encoder", seed=4, pool="simpool gamma")
    with pytest.raises(ValueError, match="is not the checkpoint that made the index"):
        main(options(moved, tmp_path / "out", query, data=data, checkpoint=other))
    with pytest.raises(ValueError, match=r"other has 4 images, not the 13 of the index, or other names: extract again"):
        main(options(moved, tmp_path / "out", query, data=str(moved / "other"), checkpoint=checkpoint))
    assert not (tmp_path / "out").exists()
    main(options(moved, tmp_path / "out", query, data=data, checkpoint=checkpoint))
    assert len(results(tmp_path / "out")["queries"][0]["neighbors"]) == 5


def test_folders_that_are_no_index(extracted: Path, tmp_path: Path) -> None:
    query, features = str(extracted / "other"), tmp_path / "features"
    with pytest.raises(ValueError, match=r"nowhere has no meta\.json: write it with `extract --index`"):
        main(options(extracted, tmp_path / "out", query, index=str(tmp_path / "nowhere")))
    shutil.copytree(extracted / "features", features)
    (features / "index.faiss").write_bytes((features / "index.faiss").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"index\.faiss is damaged or was changed"):
        main(options(extracted, tmp_path / "out", query, index=str(features)))
    faiss.write_index(build_flat(np.load(features / "features.npy")[:5]), str(features / "index.faiss"))
    with pytest.raises(ValueError, match=r"index\.faiss is damaged or was changed"):
        main(options(extracted, tmp_path / "out", query, index=str(features)))
    (features / "index.faiss").unlink()
    with pytest.raises(ValueError, match=r"features has no index\.faiss: write it with `extract --index`"):
        main(options(extracted, tmp_path / "out", query, index=str(features)))
    images, encoder = find_images(query), load_encoder(str(extracted / "encoder" / "backbone.safetensors"))
    unnamed = extract(encoder, images, tmp_path / "unnamed", batch_size=4, workers=0)
    faiss.write_index(build_flat(unnamed), str(tmp_path / "unnamed" / "index.faiss"))
    with pytest.raises(ValueError, match="does not say which checkpoint made it"):
        main(options(extracted, tmp_path / "out", query, index=str(tmp_path / "unnamed")))
    assert not (tmp_path / "out").exists()


def test_queries_that_cannot_be(extracted: Path, tmp_path: Path) -> None:
    image = str(extracted / "other" / "a" / "000.png")
    for query, kind, words in (
        (str(tmp_path / "nowhere.png"), FileNotFoundError, "nowhere.png does not exist: give an image, a folder"),
        (str(tmp_path / "nowhere"), FileNotFoundError, "nowhere"),
        ((image, str(extracted / "other")), ValueError, "mixes images such as .* with other sources"),
        ("", ValueError, "no query is given: give --index DIR --query IMAGE --out OUT"),
    ):
        with pytest.raises(kind, match=words):
            main(options(extracted, tmp_path / "out", query))
    for given, words in ((["--k", "0"], "k is 0: allowed is 1 to"), (["--workers", "-1"], "allowed is 0 to")):
        with pytest.raises(ConfigError, match=words):
            parse(SearchConfig, given)


# -- the contact sheet


def test_sheet_of_a_search_shows_query_and_neighbours(extracted: Path, tmp_path: Path) -> None:
    """The pictures themselves, fitted into tiles of 160 pixels; itself framed in gold."""
    query = str(extracted / "images" / "b" / "001.png")
    main(options(extracted, tmp_path, query, k=2))
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    found = [extracted / "images" / neighbor["name"] for neighbor in results(tmp_path)["queries"][0]["neighbors"]]
    assert str(found[0]) == query
    for path, left in zip([Path(query), *found], (GAP, 4 * GAP + 160, 5 * GAP + 320), strict=True):
        image = read_rgb(str(path))
        scale = 160 / max(image.size)
        shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        x, y = left + (160 - shape[0]) // 2, GAP + (160 - shape[1]) // 2
        shown = pixels[y : y + shape[1], x : x + shape[0]]
        np.testing.assert_array_equal(shown, np.asarray(image.resize(shape, Image.Resampling.BICUBIC)))
        beside = tuple(pixels[y + 5, x - 2].tolist())
        assert beside == {GAP: module.BLUE, 4 * GAP + 160: module.GOLD}.get(left, (255, 255, 255))


def test_the_sheet_has_the_rows_and_columns_of_the_options(extracted: Path, tmp_path: Path) -> None:
    """results.json has all of them."""
    main(options(extracted, tmp_path, str(extracted / "other"), k=5, sheet_rows=2, sheet_columns=3))
    assert [len(found["neighbors"]) for found in results(tmp_path)["queries"]] == [5] * 4
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width == GAP + 4 * (160 + GAP) + 2 * GAP and 2 * 160 < sheet.height < 3 * 160


def test_queries_go_through_the_weights_of_the_index(extracted: Path, tmp_path: Path) -> None:
    """Here the untrained ones."""
    checkpoint = str(extracted / "encoder" / "backbone.safetensors")
    images = extracted / "images"
    extraction.main(config(checkpoint, images, tmp_path / "index", index=True, which="untrained"))
    main(options(extracted, tmp_path / "out", str(images / "b" / "001.png"), index=str(tmp_path / "index"), k=1))
    (nearest_one,) = results(tmp_path / "out")["queries"][0]["neighbors"]
    assert (nearest_one["name"], nearest_one["similarity"]) == ("b/001.png", 1)
