"""Every option of dino_simpool, each defined once, and the functions that read and write options.

`parse` turns YAML recipes and command-line arguments into a frozen dataclass, and `from_dict` does
the same for a plain dict (from a checkpoint). `to_dict` and `dump` go back. Nothing is written into
a configuration after it was parsed: the scaled learning rate, the number of steps and the like are
functions of the configuration and of the run. No torch is imported here, so help and error messages
appear at once.

    parts.py     options that several commands share     train.py     of a training run
    data.py      of its data                             evaluate.py  of the evaluators
    features.py  of extract and search                   bench.py     of benchmarks and resources
    tools.py     of check-data, convert, synthetic, report, table, submit
    parse.py     recipes and command line <-> dataclass
    words.py     what other tools call an option
"""

from dino_simpool.config.bench import BenchDataConfig, BenchKnnConfig, BenchStepConfig, ResourcesConfig
from dino_simpool.config.data import CropsConfig, DataConfig
from dino_simpool.config.evaluate import AttentionConfig, ClassificationConfig, EvalConfig, FeaturesConfig, KnnConfig
from dino_simpool.config.evaluate import LinearConfig, MasksConfig, RecallConfig, RetrievalConfig
from dino_simpool.config.features import ExtractConfig, SearchConfig, parse_shard
from dino_simpool.config.parse import ConfigError, dump, from_dict, option_names, parse, to_dict
from dino_simpool.config.parts import DEFAULT_DECODING, MAX_PIXELS, DecodingSettings, Exclude, PixelValues
from dino_simpool.config.tools import CheckDataConfig, ConvertConfig, ReportConfig, SubmitConfig, SyntheticConfig
from dino_simpool.config.tools import TableConfig, minutes_of
from dino_simpool.config.train import IMAGENET_MEAN, IMAGENET_STD, HeadConfig, LossConfig, ModelConfig
from dino_simpool.config.train import OptimConfig, RunConfig, TeacherConfig, TrainConfig, is_vit, parse_duration
