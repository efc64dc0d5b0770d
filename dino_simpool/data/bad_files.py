"""The images of a run that could not be read: gathered from all processes, listed, and limited.

The loader puts another image in place of a broken one and says so with the batch. `Feed` notes it
here when it hands the batch out. All processes gather their notes when a log line or a checkpoint
is due, so that both hold what was found until then, and a resumed run reports the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dino_simpool import distributed
from dino_simpool.data.lists import as_line
from dino_simpool.data.sources import ImageSet
from dino_simpool.files import write_atomically
from dino_simpool.logs import say
from dino_simpool.names import shown


class BadFiles:
    """The content of OUT/bad_files.txt: rewritten when it grows, in the order of the data set."""

    def __init__(self, images: ImageSet, out: Path, *, max_share: float, found: dict[int, str]) -> None:
        """max_share: 0 to 1.   found: what is wrong with each broken image, by its number."""
        self.images, self._path, self._max_share = images, out / "bad_files.txt", max_share
        self.found = dict(found)
        self._noted: dict[int, str] = {}
        if not distributed.is_main():
            return
        if found:
            self._write()
        else:
            self._path.unlink(missing_ok=True)

    def note(self, indices: Sequence[int], problems: Sequence[str]) -> None:
        """Remember the broken images of a batch; problems: what is wrong with each image, or ""."""
        self._noted |= {index: problem for index, problem in zip(indices, problems, strict=True) if problem}

    def gather(self) -> None:
        """Take over what all processes have noted since the last call. All call this together.

        ValueError, in all of them, if more than max_share of the images are broken.
        """
        fresh: dict[int, str] = {}
        for noted in distributed.gather_objects(self._noted):
            fresh |= {index: problem for index, problem in noted.items() if index not in self.found}
        self._noted = {}
        if not fresh:
            return
        self.found = dict(sorted({**self.found, **fresh}.items()))
        if distributed.is_main():
            self._write()
        first = min(fresh)
        example, broken, total = f"{shown(self.images.name(first))} ({fresh[first]})", len(self.found), len(self.images)
        if broken > self._max_share * total:
            raise ValueError(
                f"{broken} of {total} images cannot be read, such as {example}, and data.max_bad_share is {self._max_share:g}: "
                f"repair or remove what {self._path} lists (`dino-simpool check-data` finds all), or raise data.max_bad_share"
            )
        say(
            f"warning: {example} cannot be read and was replaced by another image; {broken} of {total} so far, see {self._path}"
        )

    def say_total(self) -> None:
        """Say at the end of a run how many images were replaced, if any."""
        if self.found:
            say(f"{len(self.found)} of {len(self.images)} images could not be read and were replaced: see {self._path}")

    def _write(self) -> None:
        write_bad_files(self._path, ((self.images.name(index), reason) for index, reason in self.found.items()))


def write_bad_files(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write (name, what is wrong), one per line with a tab between; names as in a list of paths."""
    text = "".join(f"{as_line(name)}\t{shown(reason)}\n" for name, reason in rows)
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
