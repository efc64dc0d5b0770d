"""The command check-data: decodes every image of a data set, and lists the broken ones.

Training replaces broken images, and evaluation stops at the first one. This command finds all of
them beforehand, with all cores, and counts unusual images (decode.examine has the list). With a
layout it instead reports what a public data set lacks, in a second and without decoding.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from dino_simpool import distributed
from dino_simpool.config import CheckDataConfig
from dino_simpool.data import ImageSet, default_workers, find_images, start_worker
from dino_simpool.data.bad_files import write_bad_files
from dino_simpool.data.decode import BrokenImage, Examined, examine
from dino_simpool.data.value_range import narrow_range, with_range_of
from dino_simpool.files import make_writable
from dino_simpool.layouts import check_layout
from dino_simpool.logs import progress
from dino_simpool.names import shown

SHOWN = 20
"""The number of broken images that are printed; a file lists all."""
_BATCH = 32  # images that a worker takes at a time


@dataclass(frozen=True, eq=False)
class ExaminedImages(Dataset[tuple[int, Examined | str]]):
    """(index, what the image is or why it cannot be read)."""

    images: ImageSet

    def __getitem__(self, index: int) -> tuple[int, Examined | str]:
        try:
            return index, examine(self.images.read_bytes(index), decoding=self.images.decoding)
        except BrokenImage as error:
            return index, error.reason


@dataclass
class Summary:
    """The findings in a data set, or in a part of it."""

    readable: int = 0
    """The number of images that can be read."""
    widths: set[int] = field(default_factory=set)
    """The smallest and the largest, in pixels; empty if no image can be read."""
    heights: set[int] = field(default_factory=set)
    kinds: Counter[str] = field(default_factory=Counter)
    """The number of images of each unusual kind."""
    samples: set[int] = field(default_factory=set)
    """The lowest and the highest 16-bit sample, but for 1 % of each image; empty without any."""
    broken: dict[int, str] = field(default_factory=dict)
    """By image number, why it cannot be read."""

    def add(self, index: int, found: Examined | str) -> None:
        """Add one image."""
        if isinstance(found, str):
            self.broken[index] = found
        else:
            self.merge(Summary(1, {found.width}, {found.height}, Counter(found.kinds), set(found.samples or ())))

    def merge(self, other: Summary) -> None:
        """Add the findings of another part."""

        def ends(sizes: set[int]) -> set[int]:
            return {min(sizes), max(sizes)} if sizes else sizes

        self.readable += other.readable
        self.widths, self.heights = ends(self.widths | other.widths), ends(self.heights | other.heights)
        self.samples = ends(self.samples | other.samples)
        self.kinds.update(other.kinds)
        self.broken |= other.broken


def main(cfg: CheckDataConfig) -> None:
    """Print what was found. Under torchrun or SLURM each process takes a part of the images.
    ValueError if images are broken."""
    distributed.setup("cpu")
    if cfg.layout is not None:
        assert isinstance(cfg.data, str), "checked by the options"
        return report_layout(cfg.layout, cfg.data)
    images = find_images(cfg.data, cfg.excluded)
    images = images.with_decoding(with_range_of(images, cfg.decoding))
    if cfg.out and not Path(cfg.out).absolute().parent.is_dir():
        raise ValueError(f"{cfg.out} cannot be written because its folder does not exist: give another --out")
    if cfg.out and distributed.is_main():
        make_writable(Path(cfg.out).absolute().parent, "--out")
    started = time.monotonic()
    summary = check(images, workers=default_workers() if cfg.workers is None else cfg.workers)
    rows = [(images.name(index), reason) for index, reason in sorted(summary.broken.items())]
    if distributed.is_main():
        print(describe(summary, rows, seconds=time.monotonic() - started))
        used = (min(summary.samples), max(summary.samples)) if summary.samples and cfg.value_range == "full" else None
        if advice := narrow_range(used, "--data.value_range of train"):
            print(f"warning: {advice}")
        if cfg.out:
            write_bad_files(Path(cfg.out), rows)
    if rows:
        where = f" ({cfg.out} lists them)" if cfg.out else ""
        raise ValueError(f"{len(rows)} of {len(images)} images cannot be read{where}: repair or remove them")


def report_layout(layout: str, root: str) -> None:
    """Print what a public data set in `root` lacks. ValueError if it lacks something."""
    if not root:
        raise ValueError(f"no data is given: give --data DIR, the folder that holds {layout}")
    problems = check_layout(layout, root)
    if distributed.is_main():
        whole = [f"check-data: {layout} in {root} is complete; no image was decoded"]
        print("\n".join(shown(line) for line in [*(problems or whole), *(f"note: {line}" for line in problems.notes)]))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{layout} in {root} is not as published: {count}, see above")


def check(images: ImageSet, *, workers: int) -> Summary:
    """Examine a set of images; every process gets the whole result. ValueError if a loader process
    dies, which no image should cause."""
    loader = DataLoader(
        ExaminedImages(images),
        sampler=range(distributed.rank(), len(images), distributed.world_size()),
        batch_size=_BATCH,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=start_worker,
    )
    part, index = Summary(), 0
    try:
        with progress(len(loader), 0, "check-data", images_per_step=_BATCH * distributed.world_size()) as bar:
            for batch in loader:
                for index, found in batch:
                    part.add(index, found)
                bar.update()
    except RuntimeError as error:  # from the loader, if one of its processes is gone
        raise ValueError(
            f"a process died at an image shortly after {images.name(index)} (out of memory, or a fault in the decoder): "
            "use fewer --workers"
        ) from error
    summary = Summary()
    for each in distributed.gather_objects(part):
        summary.merge(each)
    return summary


def describe(summary: Summary, broken: list[tuple[str, str]], *, seconds: float) -> str:
    """The printed text: counts, sizes, kinds, and the first broken images (names and reasons)."""
    total = summary.readable + len(broken)
    lines = [f"check-data: {total:,} images in {seconds:.1f} s, {total / max(seconds, 1e-9):.0f} images/s"]
    for side, sizes in (("width", summary.widths), ("height", summary.heights)):
        if sizes:
            lines.append(f"  {side:<15} {min(sizes):,} to {max(sizes):,} pixels")
    lines += [f"  {kind:<15} {count:,}" for kind, count in summary.kinds.most_common()]
    lines.append(f"  {'broken':<15} {len(broken):,}")
    lines += [f"{shown(name)}\t{shown(reason)}" for name, reason in broken[:SHOWN]]
    if len(broken) > SHOWN:
        lines.append(f"and {len(broken) - SHOWN:,} more: --out FILE lists all")
    return "\n".join(lines)
