"""Every option of dino_simpool, each defined once, and the functions that read and write options.

`parse` turns YAML recipes and command-line arguments into a frozen dataclass, and `from_dict` does
the same for a plain dict (from a checkpoint). `to_dict` and `dump` go back. Nothing is written into
a configuration after it was parsed: the scaled learning rate, the number of steps and the like are
functions of the configuration and of the run. No torch is imported here, so help and error messages
appear at once.

    parts.py     options that several commands share      features.py  of extract and search
    train.py     of a training run                        bench.py     of the benchmarks and of resources
    data.py      of its data                              report.py    of the report and the tables
    evaluate.py  of the evaluators                        tools.py     of the commands that read or make data sets
    attention.py of the attention maps                    parse.py     recipes and command line <-> dataclass
"""

from __future__ import annotations

from dino_simpool.config.attention import AttentionConfig
from dino_simpool.config.bench import BenchDataConfig, BenchKnnConfig, ResourcesConfig
from dino_simpool.config.data import CropsConfig, DataConfig
from dino_simpool.config.evaluate import (
    ClassificationConfig,
    EvalConfig,
    KnnConfig,
    LinearConfig,
    MasksConfig,
    RecallConfig,
    RetrievalConfig,
)
from dino_simpool.config.features import ExtractConfig, SearchConfig
from dino_simpool.config.parse import ConfigError, dump, from_dict, option_names, parse, to_dict
from dino_simpool.config.parts import MAX_PIXELS, Decoding
from dino_simpool.config.report import ReportConfig, TableConfig
from dino_simpool.config.tools import CheckDataConfig, SyntheticConfig
from dino_simpool.config.train import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Duration,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    parse_duration,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_PIXELS",
    "AttentionConfig",
    "BenchDataConfig",
    "BenchKnnConfig",
    "CheckDataConfig",
    "ClassificationConfig",
    "ConfigError",
    "CropsConfig",
    "DataConfig",
    "Decoding",
    "Duration",
    "EvalConfig",
    "ExtractConfig",
    "HeadConfig",
    "KnnConfig",
    "LinearConfig",
    "LossConfig",
    "MasksConfig",
    "ModelConfig",
    "OptimConfig",
    "RecallConfig",
    "ReportConfig",
    "ResourcesConfig",
    "RetrievalConfig",
    "RunConfig",
    "SearchConfig",
    "SyntheticConfig",
    "TableConfig",
    "TeacherConfig",
    "TrainConfig",
    "dump",
    "from_dict",
    "option_names",
    "parse",
    "parse_duration",
    "to_dict",
]
