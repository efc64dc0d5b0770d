"""dino-simpool <command>: reads the options, then imports what the command needs. No torch until then: help answers at once."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from typing import Any

from dino_simpool import __version__, config

COMMANDS: dict[str, tuple[type, str, str]] = {
    "train": (
        config.TrainConfig,
        "dino_simpool.train:train",
        "pre-train an encoder; with the folder of a stopped run, go on with it",
    ),
    "knn": (config.KnnConfig, "dino_simpool.eval.knn:main", "weighted k-NN classification with a frozen encoder"),
    "linear": (config.LinearConfig, "dino_simpool.eval.linear:main", "linear classification on a frozen encoder"),
    "retrieval": (
        config.RetrievalConfig,
        "dino_simpool.eval.retrieval:main",
        "find landmarks of ROxford or RParis with frozen features",
    ),
    "recall": (config.RecallConfig, "dino_simpool.eval.recall:main", "fine-grained retrieval, Recall@k, with frozen features"),
    "masks": (
        config.MasksConfig,
        "dino_simpool.eval.masks:main",
        "how much of the attention is on the object, on images with masks",
    ),
    "attention": (
        config.AttentionConfig,
        "dino_simpool.eval.attention:main",
        "where the encoder looks: maps, overlays, masks and boxes of any images",
    ),
    "resources": (
        config.ResourcesConfig,
        "dino_simpool.bench.resources:main",
        "parameters and multiply-adds of an encoder, as Table 8 of the paper counts them",
    ),
    "table": (config.TableConfig, "dino_simpool.report.table:main", "results beside the figures of the paper, table by table"),
    "extract": (config.ExtractConfig, "dino_simpool.features.extract:main", "write the features of any images to a folder"),
    "search": (
        config.SearchConfig,
        "dino_simpool.features.search:main",
        "find the images of an extracted set that are like others",
    ),
    "check-data": (
        config.CheckDataConfig,
        "dino_simpool.check_data:main",
        "which images of a folder cannot be read, or what a public data set lacks",
    ),
    "report": (config.ReportConfig, "dino_simpool.report:main", "one HTML page about a run: curves, results, attention"),
    "bench data": (
        config.BenchDataConfig,
        "dino_simpool.bench.data:main",
        "time from your image files to views, beside the published recipe",
    ),
    "bench knn": (
        config.BenchKnnConfig,
        "dino_simpool.bench.knn:main",
        "time and memory of k-NN and Recall@k, beside the published way",
    ),
    "synthetic": (config.SyntheticConfig, "dino_simpool.synthetic:main", "write the embedded data set as an image tree"),
}
"""Name of a command, in one word or two: its options, the function that takes them, and what it does."""

FIRST_ARGUMENT = {"report": "--out", "synthetic": "--out", "check-data": "--data", "bench data": "--data"}
"""The option that a bare first argument stands for: `report OUT` for `report --out OUT`."""
FIRST_ARGUMENTS = {"table": "--results", "check-data": "--data", "bench data": "--data"}
"""The option for which several bare first arguments stand: `table A B` for `table --results '["A", "B"]'`."""

EXAMPLES = """\
examples:
  dino-simpool train --config vit_small_simpool --data.root IMAGES --run.out OUT
  torchrun --nproc_per_node 8 -m dino_simpool train --config vit_small_simpool --data.root IMAGES --run.out OUT
  dino-simpool knn --checkpoint OUT/last.pth --data IMAGENET
  dino-simpool report OUT --data IMAGENET

`dino-simpool <command> --help` explains every option.
`dino-simpool train --config RECIPE --print_config` prints the run as YAML.
"""


def _help() -> str:
    commands = "\n".join(f"  {name:11} {text}" for name, (_, _, text) in COMMANDS.items())
    title = "Self-supervised image encoders with DINO and SimPool."
    return f"usage: dino-simpool <command> [options]\n\n{title}\n\ncommands:\n{commands}\n\n{EXAMPLES}"


def with_named_arguments(name: str, options: list[str]) -> list[str]:
    """The options of a command with its bare first arguments under their names."""
    bare = list(itertools.takewhile(lambda option: not option.startswith("-"), options))
    if bare and name in FIRST_ARGUMENT and (len(bare) == 1 or name not in FIRST_ARGUMENTS):
        return [FIRST_ARGUMENT[name], *options]
    if bare and name in FIRST_ARGUMENTS:
        return [f"{FIRST_ARGUMENTS[name]}={json.dumps(bare)}", *options[len(bare) :]]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run a command line (sys.argv by default); returns the exit status: 0, 1 for a failed run, 2 for wrong options."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *options = arguments
    if options and f"{name} {options[0]}" in COMMANDS:
        name, options = f"{name} {options[0]}", options[1:]
    if name not in COMMANDS:
        return _fail("", f"there is no command {name}; commands: {', '.join(COMMANDS)}", 2)
    kind, action, _ = COMMANDS[name]
    try:
        cfg: Any = config.parse(kind, with_named_arguments(name, options), program=f"dino-simpool {name}")
    except config.ConfigError as error:
        return _fail(name, str(error), 2)
    module, function = action.split(":")
    try:
        getattr(importlib.import_module(module), function)(cfg)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DINO_SIMPOOL_TRACEBACK"):
            raise
        message = str(error)
        if "Original Traceback" in message:  # from a loader process, which sends its traceback as text
            message = message.strip().splitlines()[-1].partition(": ")[2]
        return _fail(name, message, 1)
    except RuntimeError as error:
        # What torch raises, anywhere in this process, when the system has ended a loader process.
        if "DataLoader worker" not in str(error) or os.environ.get("DINO_SIMPOOL_TRACEBACK"):
            raise
        advice = "no memory is left, or too little shared memory (docker run --shm-size): give fewer workers"
        return _fail(name, f"a loader process died; {advice}. A training goes on with the same command", 1)
    finally:
        if "dino_simpool.distributed" in sys.modules:
            sys.modules["dino_simpool.distributed"].cleanup()
    return 0


def _fail(name: str, message: str, status: int) -> int:
    """One line on stderr; under several processes it says which one speaks."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    speaker = f"dino-simpool {name}".rstrip() + (f" [process {rank}]" if rank != "0" else "")
    print(f"{speaker}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
