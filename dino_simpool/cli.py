"""The command line, dino-simpool <command>: reads the options, then imports what the command needs.

Torch is not imported before that, so help and error messages appear at once.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import re
import signal
import sys
from typing import Any

from dino_simpool import __version__, config
from dino_simpool.names import shown
from dino_simpool.paths import check_paths
from dino_simpool.signals import Stopped, raise_again, stop_at_once

COMMANDS: dict[str, tuple[type, str, str]] = {
    "train": (config.TrainConfig, "train:train", "pre-train an encoder, or resume a run that was stopped"),
    "knn": (config.KnnConfig, "eval.knn:main", "weighted k-NN classification with a frozen encoder"),
    "linear": (config.LinearConfig, "eval.linear:main", "linear classification with a frozen encoder"),
    "retrieval": (config.RetrievalConfig, "eval.retrieval:main", "landmark retrieval with a frozen encoder: ROxford, RParis"),
    "recall": (config.RecallConfig, "eval.recall:main", "fine-grained retrieval, Recall@k, with a frozen encoder"),
    "masks": (config.MasksConfig, "eval.masks:main", "share of the attention that is on the object, on images with masks"),
    "attention": (config.AttentionConfig, "eval.attention:main", "where the encoder looks: maps, overlays, masks and boxes"),
    "resources": (config.ResourcesConfig, "bench.resources:main", "parameters and multiply-adds of an encoder, as in Table 8"),
    "table": (config.TableConfig, "report.table:main", "results beside the numbers of the paper, table by table"),
    "extract": (config.ExtractConfig, "features.extract:main", "write the features of any images to a folder"),
    "search": (config.SearchConfig, "features.search:main", "find the most similar images of an extracted set"),
    "convert": (config.ConvertConfig, "convert:main", "weights of others to ours and back, to timm, ONNX and torch.export"),
    "check-data": (config.CheckDataConfig, "check_data:main", "list broken images, or what a public data set lacks"),
    "report": (config.ReportConfig, "report:main", "one HTML page about a run: curves, results, attention"),
    "bench data": (
        config.BenchDataConfig,
        "bench.data:main",
        "time from your image files to views, beside the published recipe",
    ),
    "bench knn": (config.BenchKnnConfig, "bench.knn:main", "time and memory of k-NN and Recall@k, beside the published code"),
    "bench step": (config.BenchStepConfig, "bench.step:main", "time and memory of a training step, beside a plain one"),
    "synthetic": (config.SyntheticConfig, "synthetic:main", "write the embedded data set as folders of images"),
    "submit": (config.SubmitConfig, "submit:main", "run any of these as a SLURM job: submit OPTIONS -- COMMAND OPTIONS"),
}
"""By command (one or two words): its options, module:function to call with them, what it does."""

FIRST_ARGUMENT = {"report": "--out", "synthetic": "--out", "check-data": "--data", "bench data": "--data"}
"""The option for a first argument without a name: `report OUT` is `report --out OUT`."""
FIRST_ARGUMENTS = {"table": "--results", "check-data": "--data", "bench data": "--data"}
"""The same for several first arguments: `table A B` is `table --results '["A", "B"]'`."""

KEPT = {
    "train": "the run is unfinished, run the same command again to resume",
    "extract": "what is done is kept, run the same command again to go on",
    "attention": "the pictures made so far are kept",
    "synthetic": "the images made so far are kept",
}
"""What a command that a signal stopped leaves; the others write only at their end."""

EXAMPLES = """\
examples:
  dino-simpool train --config vit_small_simpool --data.root IMAGES --run.out OUT
  torchrun --nproc_per_node 8 -m dino_simpool train --config vit_small_simpool --data.root IMAGES --run.out OUT
  dino-simpool knn --checkpoint OUT/last.pth --data IMAGENET
  dino-simpool report OUT --data IMAGENET
  dino-simpool submit --gpus 8 --time 72h -- train --config vit_small_simpool --data.root IMAGES --run.out OUT

`dino-simpool <command> --help` explains every option.
`dino-simpool train --config RECIPE --print_config` prints the run as YAML.
"""


def with_named_arguments(name: str, options: list[str]) -> list[str]:
    """The options of a command, with names added to first arguments that have none.

    Those of submit end at `--`; what follows is the command that it submits.
    """
    if name == "submit":
        own = list(itertools.takewhile(lambda option: option != "--", options))
        command = [] if len(own) == len(options) else [f"--command={json.dumps(options[len(own) + 1 :])}"]
        named: list[str] = []
        for option in own:
            if named and named[-1] in ("--sbatch", "--srun"):  # whose values are options themselves
                named[-1] += f"={option}"
            else:  # `--dry-run` is how the schedulers' own tools write it
                named.append(re.sub(r"^--[a-z-]+", lambda match: "--" + match[0][2:].replace("-", "_"), option))
        return named + command
    bare = list(itertools.takewhile(lambda option: not option.startswith("-"), options))
    if bare and name in FIRST_ARGUMENT and (len(bare) == 1 or name not in FIRST_ARGUMENTS):
        return [FIRST_ARGUMENT[name], *options]
    if bare and name in FIRST_ARGUMENTS:
        return [f"{FIRST_ARGUMENTS[name]}={json.dumps(bare)}", *options[len(bare) :]]
    return options


def split(arguments: list[str]) -> tuple[str, list[str]]:
    """The command, of one or two words, and its options. ConfigError if there is none such."""
    name, *options = arguments
    if options and f"{name} {options[0]}" in COMMANDS:
        name, options = f"{name} {options[0]}", options[1:]
    if name not in COMMANDS:
        raise config.ConfigError(f"there is no command {name}; commands: {', '.join(COMMANDS)}")
    return name, options


def read(name: str, options: list[str]) -> Any:
    """The configuration of a command. ConfigError says in one line what is wrong."""
    return config.parse(COMMANDS[name][0], with_named_arguments(name, options), program=f"dino-simpool {name}")


def call(name: str, cfg: Any) -> Any:
    """Import the module of a command and run it; returns what it returns."""
    module, function = COMMANDS[name][1].split(":")
    imported = importlib.import_module(f"dino_simpool.{module}")
    raise_again()
    return getattr(imported, function)(cfg)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    0, 1 for a failed run, 2 for wrong options, 128 + number if a signal stopped it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # a name may have characters that a terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: dino-simpool <command> [options]\n\nSelf-supervised image encoders with DINO and SimPool.\n\ncommands:")
        print(*(f"  {name:11} {text}" for name, (_, _, text) in COMMANDS.items()), "", EXAMPLES, sep="\n", end="")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = ""
    try:
        name, options = split(arguments)
        cfg = read(name, options)
    except config.ConfigError as error:
        return _fail(name, str(error), 2)
    try:
        with stop_at_once():
            check_paths(cfg)
            call(name, cfg)
    except KeyboardInterrupt as stop:  # Stopped, or a second Ctrl-C
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            said = str(stop) or "stopped by SIGINT"
            print(f"dino-simpool {name}: {said}: {KEPT.get(name, 'no result was written')}", file=sys.stderr)
        return 128 + number
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DINO_SIMPOOL_TRACEBACK"):
            raise
        message = str(error)
        if "Original Traceback" in message:  # from a loader process, which sends its traceback as text
            message = message.strip().splitlines()[-1].partition(": ")[2]
        return _fail(name, message, 1)
    except Exception as error:
        known = "torch" in sys.modules  # without torch there are none of its errors
        line = importlib.import_module("dino_simpool.failures").in_a_line(error) if known else None
        if line is None or os.environ.get("DINO_SIMPOOL_TRACEBACK"):
            raise
        return _fail(name, line, 1)
    finally:
        if "dino_simpool.distributed" in sys.modules:
            sys.modules["dino_simpool.distributed"].cleanup()
    return 0


def _fail(name: str, message: str, status: int) -> int:
    """Print one line on stderr; with several processes, it names the process."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    speaker = f"dino-simpool {name}".rstrip() + (f" [process {rank}]" if rank != "0" else "")
    print(shown(f"{speaker}: error: {' '.join(message.split())}"), file=sys.stderr)
    return status
