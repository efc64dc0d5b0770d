"""Image sets (sources.py), and the loaders that feed training and evaluation (loaders.py).

A source is a folder of any depth, a tar or zip archive, or a text file of paths. scan.py lists it,
archives.py looks into archives, index.py shares the list between processes, and cache.py keeps it
from one start to the next. labeled.py pairs labeled images to learn from with those to measure on.
In training, augment/ makes the views, other images replace broken ones, and feed.py moves batches
to the device. What a loader yields depends only on the seed and the position, so a run can be
stopped anywhere and resumed exactly, with any number of workers.
"""

from dino_simpool.data.labeled import class_numbers, labeled_sets, same_source
from dino_simpool.data.loaders import (
    LONGEST,
    AugmentedImages,
    EvalTransform,
    TrainBatches,
    default_workers,
    epoch_order,
    file_key,
    index_loader,
    keep_freed_memory,
    read_or_replace,
    start_worker,
    train_loader,
)
from dino_simpool.data.sources import ImageSet, class_folder, composed, evenly, find_images, same_names
from dino_simpool.names import IMAGE_SUFFIXES
from dino_simpool.paths import find_split, folder_or_archive
