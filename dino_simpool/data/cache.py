"""The index of a source from the cache, if the source is what it was; otherwise listed anew, by one process of the node.

A folder's mtime and ctime change with its entries, so an index is up to date if those of all folders are what they were: one
question a folder, none a file. An image that is edited or replaced under its name is not a change of the index. Archives and
lists are compared by mtime and size (of what a list names, nothing is looked at again). The cache is one file a source in
$DINO_SIMPOOL_CACHE, or ~/.cache/dino_simpool; it may be removed at any time. Small sources are listed anew each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from dino_simpool import distributed
from dino_simpool.data.archives import ARCHIVE_SUFFIXES, IMAGE_SUFFIXES, TooMany
from dino_simpool.data.index import FORMAT, Index, open_index
from dino_simpool.data.scan import RECENT_NS, is_list, is_recent, scan, stamps
from dino_simpool.logs import say

SMALL = 5000
"""Files and folders of a source up to which nothing is cached: they are listed in less than a second."""


def load_index(root: str) -> tuple[str, Index]:
    """The index of a folder, an archive or a text file of paths, and the base folder (or archive) of its paths.

    What it took is said in one line, unless the source is small. Raises what `scan.scan` does.
    """
    started = time.perf_counter()
    base = os.path.dirname(root) if is_list(root) else root
    file = cache_file(root)
    (index, _), how = _cached(file, base), "from the cache"
    if index is None:
        try:
            return base, scan(root, limit=SMALL)
        except TooMany:
            index, how = _shared(file, root, base)
    folders = sum(count > 0 for count in index.counts.tolist())
    seconds = time.perf_counter() - started
    say(f"index of {root}: {len(index):,} images in {folders:,} top-level folder(s), {how}, {seconds:.1f} s")
    return base, index


def cache_file(root: str) -> Path:
    """Where the index of a source is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("DINO_SIMPOOL_CACHE") or os.path.join(home, "dino_simpool")).absolute()
    real = os.path.abspath(root) if is_list(root) else os.path.realpath(root)  # a list is read from where it is called
    key = "\0".join([FORMAT, real, *IMAGE_SUFFIXES, *ARCHIVE_SUFFIXES])
    return folder / f"{os.path.basename(real)}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.safetensors"


def _cached(file: Path, base: str) -> tuple[Index | None, str]:
    """What the cache holds, or None if that is nothing, not readable or not up to date; and why, if there is something."""
    try:
        index = open_index(str(file))
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, str(error)
    watched = list(index.watched.below(base) if base else index.watched)
    changed = (stamps(watched) != index.stamps).any(1)
    if changed.any():
        return None, f"{watched[int(changed.argmax())]} has changed"
    return index, ""


def _shared(file: Path, root: str, base: str) -> tuple[Index, str]:
    """The index, listed by this process or by another one that did so first; and how it was got, in words."""
    try:
        with _locked(file, root):
            index, why = _cached(file, base)  # by another process, while this one waited
            if index is not None:
                return index, "from the cache"
            if why:
                say(f"index of {root}: {why}, listing all files anew")
            return _built(file, root)
    except _NoCache as error:
        say(f"index of {root}: cannot be kept in {file.parent} ({error}), each start lists all files; set DINO_SIMPOOL_CACHE")
        return scan(root, bar=distributed.is_main()), "listed anew"


class _NoCache(Exception):
    """The cache cannot be used."""


def _built(file: Path, root: str) -> tuple[Index, str]:
    """List the source, and keep the index."""
    index = scan(root, bar=True)
    if is_recent(index):  # a change now might not show in the times that were noted
        time.sleep(RECENT_NS / 1e9)
        index = scan(root, bar=True)
        if is_recent(index):
            return index, "listed anew (not kept: files are just being added or removed)"
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        index.save(str(temporary))
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return index, f"listed anew (not kept in {file.parent}: {error})"
    return open_index(str(file)), "listed anew"


@contextlib.contextmanager
def _locked(file: Path, root: str) -> Iterator[None]:
    """Only one process of the node at a time. _NoCache if the folder cannot be written."""
    try:
        import fcntl  # not on Windows

        file.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except (OSError, ImportError) as error:
        raise _NoCache(error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"index of {root}: another process is listing the files, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _NoCache(error) from error
        yield
    finally:
        os.close(lock)  # unlocks
