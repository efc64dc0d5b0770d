"""The record of a result: file names, versions, and one way to write it, whatever the evaluator."""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy
import PIL
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file

import dino_simpool
from dino_simpool.checkpoint import export_encoder
from dino_simpool.config import (
    AttentionConfig,
    EvalConfig,
    KnnConfig,
    LinearConfig,
    MasksConfig,
    ModelConfig,
    RecallConfig,
    RetrievalConfig,
)
from dino_simpool.eval import run
from dino_simpool.files import file_sha256, write_json
from dino_simpool.models.encoder import build_encoder
from dino_simpool.results import result_name, versions, write_record

PACKAGE = Path(dino_simpool.__file__).parent


@pytest.mark.parametrize(
    ("evaluator", "cfg", "name"),
    [
        ("knn", KnnConfig(checkpoint="run/last.pth"), "knn"),
        ("knn", KnnConfig(checkpoint="run/backbone.safetensors"), "knn"),
        ("knn", KnnConfig(checkpoint="run/epoch_0020.pth"), "knn_epoch_0020"),
        ("knn", KnnConfig(checkpoint="run/epoch_0020.pth", out="elsewhere"), "knn"),
        ("knn", KnnConfig(checkpoint="run/best.pth", which="student"), "knn_student_best"),
        ("knn", KnnConfig(checkpoint="run/best.pth", which="student", out="elsewhere"), "knn_student"),
        ("knn", KnnConfig(checkpoint="run/best.pth", which="untrained"), "knn_untrained"),
        ("knn", KnnConfig(checkpoint="run/last.pth", features="pixels"), "knn_pixels"),
        ("knn", KnnConfig(checkpoint="run/best.pth", features="pixels", which="student"), "knn_pixels"),
        ("knn", KnnConfig(features="pixels", out="elsewhere"), "knn_pixels"),
        ("linear_grid", LinearConfig(checkpoint="run/last.pth", protocol="grid"), "linear_grid"),
        ("retrieval", RetrievalConfig(checkpoint="run/last.pth"), "retrieval_roxford5k_dino_default"),
        ("retrieval", RetrievalConfig(checkpoint="a.pth", dataset="rparis6k", preset="ibot"), "retrieval_rparis6k_ibot_a"),
        (
            "recall",
            RecallConfig(checkpoint="last.pth", layout="cub200", which="untrained"),
            "recall_cub200_dino_eval_untrained",
        ),
        ("masks", MasksConfig(checkpoint="run/last.pth", which="student"), "masks_student"),
        ("attention", AttentionConfig(checkpoint="run/best.pth"), "attention_best"),
    ],
)
def test_result_names(evaluator: str, cfg: EvalConfig, name: str) -> None:
    assert result_name(evaluator, cfg) == name


def test_versions_are_those_of_the_modules() -> None:
    modules = (torch, torchvision, timm, numpy, faiss, PIL)
    expected = {module.__name__: str(module.__version__) for module in modules}
    assert versions() == {"dino_simpool": dino_simpool.__version__, "python": platform.python_version(), **expected}


def test_training_and_results_import_no_faiss(tmp_path: Path) -> None:
    """faiss is imported where it searches. timm cannot be imported without torchvision, so torchvision is always there."""
    program = (
        "import sys, dino_simpool.train, dino_simpool.results\n"
        "assert dino_simpool.results.versions()['faiss']\n"
        "assert 'timm' in sys.modules and 'faiss' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_the_benchmark_imports_torchvision_itself() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # at the top of the module
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] == "torchvision" for name in names):
                found.add(str(path.relative_to(PACKAGE)))
    assert found == {"bench/data.py"}


def test_json_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]} and len(list(tmp_path.iterdir())) == 1


def test_record_has_options_and_versions_and_tensors_lie_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    record = write_record(path, {"metrics": {"top1": 1.5}}, KnnConfig(k=(3,)), tensors={"ranks": torch.arange(3)})
    assert json.loads(path.read_text()) == record
    assert record["metrics"] == {"top1": 1.5} and record["config"]["k"] == [3] and record["versions"] == versions()
    assert load_file(tmp_path / "x.safetensors")["ranks"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="JSON"):
        write_record(path, {"metrics": {"top1": float("inf")}}, KnnConfig(), tensors={"ranks": torch.zeros(1)})
    assert json.loads(path.read_text()) == record and load_file(tmp_path / "x.safetensors")["ranks"].tolist() == [0, 1, 2]


@dataclass(frozen=True)
class CountConfig(EvalConfig):
    """The options of an evaluator that nobody has heard of."""

    what: str = "parameters"

    @property
    def variant(self) -> tuple[str, ...]:
        return (self.what,)

    @property
    def needs_encoder(self) -> bool:
        return self.what != "nothing"


def count(encoder: Any, cfg: CountConfig) -> dict[str, Any]:
    number = sum(p.numel() for p in encoder.parameters()) if encoder is not None else 0
    return {"number": number, "split": "all", "evaluator": "counter", "one": torch.ones(1)}


def test_an_unknown_evaluator_says_what_its_file_is_called_and_whether_it_needs_an_encoder(tmp_path: Path, capsys: Any) -> None:
    encoder = build_encoder(ModelConfig("resnet18", width=8, depth=(1, 1), stem="small", pool="gap", image_size=16))
    export_encoder(tmp_path, encoder)
    options: dict[str, Any] = {"data": "somewhere", "out": str(tmp_path / "out"), "device": "cpu"}
    record = run("count", count, CountConfig(checkpoint=str(tmp_path / "backbone.safetensors"), which="untrained", **options))
    assert json.loads((tmp_path / "out" / "counter_parameters_untrained.json").read_text()) == json.loads(json.dumps(record))
    assert (tmp_path / "out" / "counter_parameters_untrained.safetensors").is_file()
    assert record["metrics"] == {"number": sum(p.numel() for p in encoder.parameters())}
    assert (record["evaluator"], record["dataset"], record["split"]) == ("counter", "somewhere", "all")
    with pytest.raises(ValueError, match="no checkpoint is given"):
        run("count", count, CountConfig(**options))
    assert run("count", count, CountConfig(what="nothing", **options))["model"] is None
    assert (tmp_path / "out" / "counter_nothing.json").is_file()
    assert "counter_nothing\n  somewhere/all" in capsys.readouterr().out


def test_the_record_names_the_weights_that_were_evaluated(tmp_path: Path) -> None:
    """A training run may replace the file during the evaluation."""
    encoder = build_encoder(ModelConfig("resnet18", width=8, depth=(1, 1), stem="small", pool="gap", image_size=16))
    export_encoder(tmp_path, encoder)
    weights = tmp_path / "backbone.safetensors"
    expected = file_sha256(weights)

    def meanwhile(encoder: Any, cfg: CountConfig) -> dict[str, Any]:
        weights.write_bytes(b"those of a later epoch")
        return count(encoder, cfg)

    record = run("count", meanwhile, CountConfig(checkpoint=str(weights), out=str(tmp_path), device="cpu"))
    assert record["model"]["sha256"] == expected
