"""The index of codes (`--index_kind ivfpq`): near neighbors of millions of images, and how many of them it misses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from PIL import Image
from test_extract import config, exported

from dino_simpool.config import ConfigError, ExtractConfig, SearchConfig, parse
from dino_simpool.features import index as module
from dino_simpool.features.extract import main
from dino_simpool.features.index import build_ivfpq, measure, nearest
from dino_simpool.features.rows import StoredRows
from dino_simpool.features.search import main as search


def mixture(count: int, width: int, *, centers: int, seed: int = 0) -> np.ndarray:
    """(count, width) float32, of any length: points around random centers, with a cosine of 0.8 to others of their center."""
    generator = np.random.default_rng(seed)
    middle = np.random.default_rng(99).normal(size=(centers, width)).astype(np.float32)
    noise = 0.5 * generator.standard_normal((count, width), np.float32)
    length = generator.uniform(0.5, 9, (count, 1)).astype(np.float32)
    return (middle[generator.integers(centers, size=count)] + noise) * length


def true_neighbors(rows: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By one float64 product."""
    double = rows.astype(np.float64)
    cosines = (double @ query.astype(np.float64)) / np.linalg.norm(double, axis=1) / np.linalg.norm(query.astype(np.float64))
    best = np.argsort(-cosines, kind="stable")[:k]
    return cosines[best], best


def test_recall_is_that_of_a_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12,000 rows of width 32: the recall that is said, at the lists that are read, is that of other queries too."""
    rows = mixture(12_000, 32, centers=40)
    np.save(tmp_path / "rows.npy", rows)
    index, about = build_ivfpq(StoredRows(tmp_path / "rows.npy"))
    said = capsys.readouterr().err
    assert (
        "128 lists, 4 bytes an image, learned from 8,192 images; needs about 0.00 GB of memory (a flat index: 0.00 GB)" in said
    )
    assert (about["kind"], about["lists"], about["code_bytes"], about["queries"]) == ("ivfpq", 128, 4, 200)
    recalls = {int(lists): recall for lists, recall in about["recall@10"].items()}
    assert list(recalls) == [2**i for i in range(len(recalls))] and max(recalls) == about["nprobe"] == index.nprobe
    *before, last = recalls.values()
    assert last >= module.ENOUGH and all(recall < module.ENOUGH for recall in before)
    hits = 0
    for query in mixture(100, 32, centers=40, seed=1):
        similarity, found = nearest(rows, index, query, k=10)
        _, best = true_neighbors(rows, query, 10)
        hits += len(set(found) & set(best))
        everything, _ = true_neighbors(rows[found], query, 10)
        np.testing.assert_allclose(similarity, everything, atol=1e-6)  # exact, in order
    assert hits / 1000 == pytest.approx(last, abs=0.05)


def test_with_all_lists_and_candidates_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CODED_CANDIDATES", 10_000)
    monkeypatch.setattr(module, "ENOUGH", 2.0)  # never: all lists are read
    rows = mixture(10_000, 16, centers=5)
    index, about = build_ivfpq(rows)
    assert about["nprobe"] == about["lists"] == 128 and about["recall@10"]["128"] == 1
    for query in rows[:20]:
        similarity, found = nearest(rows, index, query, k=7)
        expected, best = true_neighbors(rows, query, 7)
        np.testing.assert_array_equal(found, best)
        np.testing.assert_allclose(similarity, expected, atol=1e-6)


def test_duplicates_do_not_lower_the_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is there 20 times: of ten neighbors that are equally near, any ten are right."""
    monkeypatch.setattr(module, "ENOUGH", 0.0)
    rows = np.tile(mixture(600, 16, centers=3), (20, 1))
    index, _ = build_ivfpq(rows)
    assert measure(index, rows)["recall@10"] == {"1": 1.0}


def test_few_images_and_odd_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"index_kind ivfpq is for 10,000 images or more, given 9,999: use flat, which is exact"
    ):
        build_ivfpq(np.zeros((9_999, 8), np.float32))
    monkeypatch.setattr(module, "LEAST_ROWS", 300)
    for width, code_bytes in ((7, 1), (13, 1), (12, 1), (27, 3), (3, 1)):
        rows = mixture(300, width, centers=3)
        index, about = build_ivfpq(rows)
        assert about["code_bytes"] == code_bytes and index.ntotal == 300
        assert nearest(rows, index, rows[5], k=1)[1].tolist() == [5]


def test_search_says_that_it_is_approximate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From images to the results; the same index of codes again is the same bit for bit; flat replaces it."""
    monkeypatch.setattr(module, "LEAST_ROWS", 256)  # as many as codes
    images, out = tmp_path / "images" / "a", tmp_path / "out"
    images.mkdir(parents=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (256, 3, 3, 3), np.uint8)):
        Image.fromarray(pixels).resize((20, 20)).save(images / f"{number}.png")
    cfg = config(exported(tmp_path), images, out, index=True, index_kind="ivfpq", batch_size=64)
    main(cfg)
    assert "recall@10 is" in capsys.readouterr().err
    first, about = (out / "index.faiss").read_bytes(), json.loads((out / "meta.json").read_text())["index"]
    assert about["kind"] == "ivfpq" and str(about["nprobe"]) in about["recall@10"]
    with monkeypatch.context() as patch:  # it is kept, and built again only if it is damaged
        patch.setattr("dino_simpool.features.extract.build_ivfpq", lambda rows: pytest.fail("built again"))
        main(cfg)
    (out / "index.faiss").write_bytes(first[:-1])
    main(cfg)
    assert (out / "index.faiss").read_bytes() == first
    query = images / "7.png"
    searched = SearchConfig(index=str(out), query=str(query), out=str(tmp_path / "found"), k=3, workers=0, device="cpu")
    search(searched)
    assert "approximate: of ten true neighbors, this index finds" in capsys.readouterr().out
    record = json.loads((tmp_path / "found" / "results.json").read_text())
    assert record["index"] == about and record["queries"][0]["neighbors"][0]["similarity"] == 1
    main(config(cfg.checkpoint, images, out, index=True, batch_size=64))
    assert json.loads((out / "meta.json").read_text())["index"] == {"kind": "flat"}
    capsys.readouterr()
    search(searched)
    assert "approximate" not in capsys.readouterr().out


def test_a_kind_without_an_index_is_refused() -> None:
    with pytest.raises(ConfigError, match="index_kind ivfpq needs index: give --index too"):
        parse(ExtractConfig, ["--index_kind", "ivfpq"])


MILLIONS = """
import json, re, sys, time
from pathlib import Path
import faiss, numpy as np
from dino_simpool.features.index import build_ivfpq, nearest
from dino_simpool.features.rows import StoredRows
folder, rows = Path(sys.argv[1]), StoredRows(Path(sys.argv[1], "rows.npy"))
start = time.monotonic()
index, about = build_ivfpq(rows)
faiss.write_index(index, str(folder / "index.faiss"))
built = time.monotonic() - start
index = faiss.read_index(str(folder / "index.faiss"), faiss.IO_FLAG_MMAP)
start = time.monotonic()
for row in range(0, len(rows), len(rows) // 100):
    assert nearest(rows, index, rows[row : row + 1][0], k=10)[1][0] == row
searched = (time.monotonic() - start) / 100
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps(about | {"build_seconds": built, "seconds_a_query": searched, "peak_bytes": peak}))
"""


@pytest.mark.long
def test_ten_million_images_in_four_gigabytes(tmp_path: Path) -> None:
    """15 GB on the disk; DINO_SIMPOOL_TEST_ROWS for fewer."""
    count, width = int(os.environ.get("DINO_SIMPOOL_TEST_ROWS", 10_000_000)), 384
    if shutil.disk_usage(tmp_path).free < 6 * count * width:
        pytest.skip(f"needs {6 * count * width / 1e9:.0f} GB of disk space")
    with open(tmp_path / "rows.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for number, start in enumerate(range(0, count, 100_000)):
            mixture(min(100_000, count - start), width, centers=20_000, seed=number).tofile(file)
    done = subprocess.run([sys.executable, "-c", MILLIONS, str(tmp_path)], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    about = json.loads(done.stdout)
    assert about["peak_bytes"] < 4e9 and about["recall@10"][str(about["nprobe"])] >= module.ENOUGH
    assert faiss.read_index(str(tmp_path / "index.faiss"), faiss.IO_FLAG_MMAP).ntotal == count
    (tmp_path / "rows.npy").unlink()
