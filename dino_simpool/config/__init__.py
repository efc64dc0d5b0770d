"""Every option of dino_simpool, each defined once, and the functions that read and write them.

`parse` turns YAML recipes and command-line overrides into a frozen dataclass, `from_dict` does the same for a plain dict (a
checkpoint's), `to_dict` and `dump` go back. Nothing is ever written into a configuration after it was parsed: the scaled
learning rate, the number of steps and the like are functions of the configuration and of the run. No torch is imported here,
so that help and mistakes answer at once.

    train.py     the options of a training run        evaluate.py   of the evaluators, the report, the embedded data
    data.py      of its data                          attention.py  of the attention maps
    bench.py     of the benchmarks                    features.py   of extract and search
    tools.py     of the commands about files          parse.py      recipes + command line <-> dataclass
"""

from __future__ import annotations

from dino_simpool.config.attention import AttentionConfig
from dino_simpool.config.bench import BenchDataConfig, BenchKnnConfig
from dino_simpool.config.data import MAX_PIXELS, CropsConfig, DataConfig
from dino_simpool.config.evaluate import (
    EvalConfig,
    KnnConfig,
    LinearConfig,
    MasksConfig,
    RecallConfig,
    ReportConfig,
    ResourcesConfig,
    RetrievalConfig,
    SyntheticConfig,
    TableConfig,
)
from dino_simpool.config.features import ExtractConfig, SearchConfig
from dino_simpool.config.parse import ConfigError, dump, from_dict, option_names, parse, to_dict
from dino_simpool.config.tools import CheckDataConfig
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
    "ConfigError",
    "CropsConfig",
    "DataConfig",
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
