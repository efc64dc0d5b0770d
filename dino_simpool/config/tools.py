"""The options of commands that read or make data sets, show results, or submit jobs."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Literal

from dino_simpool.config.parts import (
    MAX_SEED,
    MAX_SIZE,
    DecodingSettings,
    Device,
    Excluding,
    Options,
    Weights,
    Workers,
    option,
    path,
)


@dataclass(frozen=True)
class CheckDataConfig(DecodingSettings, Excluding, Workers):
    """List the broken images of a data set, or check that a public data set is complete."""

    data: str | tuple[str, ...] = path("", "images")
    """A folder, a text file of paths, or a list of these: anything data.root of train takes."""
    layout: Literal["cub200", "cars196", "sop", "inshop", "roxford5k", "rparis6k", "imagenet", "folder"] | None = None
    """A public data set, or folder: CLASS/IMAGE. Files, folders and counts are checked then, and no
    image is decoded. null: decode every image."""
    out: str = ""
    """File for the broken images, one per line: name, tab, reason. Empty: only print them."""

    def needs(self, option: str) -> bool:
        """A layout says itself what is missing."""
        return self.layout is None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout is not None and (self.out or not isinstance(self.data, str)):
            raise ValueError("layout checks one folder and lists no broken images: leave out `out` and give one folder as data")


@dataclass(frozen=True)
class SyntheticConfig(Options):
    """The embedded data set: images made from a seed, with class, box and mask."""

    out: str = path("", "out")
    """Folder to write train/, val/ and masks/ into."""
    seed: int = option(0, least=0, most=MAX_SEED)
    """Seed that determines every image."""
    train_per_class: int = option(200, least=1, most=10**6)
    """Training images of each class."""
    val_per_class: int = option(50, least=1, most=10**6)
    """Held-out images of each class."""
    size: int = option(40, least=16, most=1024)
    """Side of the images in pixels."""


@dataclass(frozen=True)
class TableConfig(Options):
    """Results beside the numbers of the paper, table by table."""

    results: tuple[str, ...] = path(
        (), "existing", needed="no results are given: give files or folders of results, as in dino-simpool table RUN1 RUN2"
    )
    """Result files, or folders with them (training runs): the arguments before any option."""
    format: Literal["text", "markdown", "csv"] = "text"
    """text: aligned columns. csv: all tables in one, in full precision."""
    out: str = ""
    """File to write. Empty: print."""


@dataclass(frozen=True)
class ReportConfig(Device):
    """One self-contained HTML page about a run."""

    out: str = path("", "run", needed="no run is given: give the folder of a training run, as in dino-simpool report OUT")
    """Folder of the training run; report.html is written there."""
    data: str = path("", "existing")
    """Folder with held-out images in val/ or val.tar (and masks, if any, in masks/val/) to show."""
    num_images: int = option(12, least=1, most=1000)
    """Held-out images to show."""


@dataclass(frozen=True)
class ConvertConfig(Weights):
    """Weights in another form: for the official scripts, for timm, or as a graph of its own."""

    to: Literal["official", "ours", "timm", "onnx", "program"] = "ours"
    """official: a checkpoint for the scripts of DINO and SimPool. ours: backbone.safetensors, and
    with a head also weights.pth. timm: for timm.create_model. onnx: for onnxruntime. program: for
    torch.export.load."""
    out: str = path("", "out", needed="no folder is given: give --out DIR, a new folder for what is written")
    """Folder to write to, with convert.json about how. Files that are there are never replaced."""
    size: tuple[int, int] | None = option(None, least=1, most=MAX_SIZE)
    """Height and width in pixels of the images of onnx and program, fixed for ViTs. null: the
    model's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.to not in ("onnx", "program"):
            raise ValueError(f"size is for onnx and program, and `to` is {self.to}: leave it out")
        if self.which == "untrained" and self.to in ("official", "ours"):
            raise ValueError(f"which untrained has no file to be made of with `to` {self.to}: give teacher or student")


def minutes_of(time: str) -> int:
    """Whole minutes of a time limit, rounded up.

    time: minutes (`4320`), hours (`72h`), `30m` or `3d`, or as SLURM writes it: `72:00:00`,
    `1-12`, `1-12:00`, `1-12:00:00` (days-hours:minutes:seconds). ValueError for anything else, for
    zero, and for `72:00`, which SLURM reads as 72 minutes and people as 72 hours.
    """
    said = f"time is {time!r}"
    if re.fullmatch(r"\d+:\d+", time):
        raise ValueError(f"{said}, which may mean hours or minutes: give {time.partition(':')[0]}h, {time}:00 or whole minutes")
    simple = re.fullmatch(r"(\d{1,9})([mhd]?)", time)
    slurm = re.fullmatch(r"(?:(\d{1,5})-)?(\d{1,5})(?::(\d{1,2}))?(?::(\d{1,2}))?", time)
    if simple:
        minutes = int(simple[1]) * {"": 1, "m": 1, "h": 60, "d": 1440}[simple[2]]
    elif slurm:
        days, hours, part, seconds = (int(number or 0) for number in slurm.groups())
        minutes = 1440 * days + 60 * hours + part + -(-seconds // 60)
    else:
        raise ValueError(f"{said}: give minutes, or for three days 72h, 3d, 72:00:00 or 3-00:00:00")
    if not 0 < minutes <= 525_600:
        raise ValueError(f"{said}, {minutes} minutes: allowed is 1 minute to a year. SLURM would let a job of 0 wait forever")
    return minutes


@dataclass(frozen=True)
class SubmitConfig(Options):
    """Run another command as a SLURM job: dino-simpool submit OPTIONS -- COMMAND OPTIONS."""

    nodes: int = option(1, least=1, most=4096)
    """Machines."""
    gpus: int = option(1, least=0, most=64)
    """GPUs of each node. 0: CPUs only."""
    tasks: int | None = option(None, least=1, most=1024)
    """Processes on each node. null: one for each GPU, or one."""
    cpus: int = option(8, least=1, most=1024)
    """CPU cores of each process."""
    memory: str = ""
    """Memory of each node, such as 200G. Empty: what the cluster gives."""
    time: str = ""
    """Time limit: 4320 (minutes), 72h, 3d or 72:00:00; in a file '4320' and '72:00:00', in quotes.
    At the limit train and extract are requeued and go on, so it need not cover the whole run."""
    warn_seconds: int = option(120, least=10, most=3600)
    """Seconds before the time limit at which SLURM tells the job to save. SLURM may be 60 early."""
    partition: str = ""
    """Partition. Empty: the cluster's default, as for the next three."""
    account: str = ""
    """Account that is charged."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that the nodes must have, such as `a100`."""
    sbatch: str = ""
    """More options of sbatch, in quotes: "--exclude=node7 --mail-type=END"."""
    srun: str = ""
    """More options of srun, in quotes: "--container-image=FILE --container-mounts=DIR"."""
    setup: str = ""
    """Lines of shell that run first on the first node: "module load cuda". The job ends if one
    fails."""
    python: str = ""
    """Python that runs in the job, for containers. Empty: the one that submits."""
    array: str = ""
    """One job for each value: 0..4, or A,B,C. `{}` in the command is the value, as in --run.seed {}
    --run.out runs/seed{}, --config {} or --shard {}/16. 0..15%4: at most four jobs at a time."""
    folder: str = ""
    """Folder for logs and results, which all nodes see. Empty: OUT/submit for train, else
    runs/submit."""
    dry_run: bool = False
    """Print the script for sbatch, and do nothing else."""
    command: tuple[str, ...] = ()
    """What to run; written after `--`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time:
            minutes_of(self.time)
        if self.memory and not re.fullmatch(r"[1-9]\d{0,8}[KMGT]?", self.memory):
            raise ValueError(f"memory is {self.memory}: give a whole number with K, M, G or T, such as 200G")
        for name in ("partition", "account", "qos", "constraint", "setup", "folder", "python"):
            if "\0" in getattr(self, name) or (name != "setup" and "\n" in getattr(self, name)):
                raise ValueError(f"{name} must be one line of text, not {getattr(self, name)!r}")
        for name in ("sbatch", "srun"):
            try:
                shlex.split(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name} is {getattr(self, name)!r}: {str(error).lower()}") from None
