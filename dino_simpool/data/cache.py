"""The index of a source: from the cache if the source is unchanged, else listed again.

The mtime and ctime of a folder change with its entries, so an index is up to date if those of all
folders are unchanged: one request per folder and none per file. Editing or replacing an image under
its name does not change the index. Archives and lists are compared by mtime and size; the files
that a list names are not checked again. Only one process of a node lists a source. The cache has
one file per source, in $DINO_SIMPOOL_CACHE or ~/.cache/dino_simpool, and can be removed any time.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: each process lists the source itself
    fcntl = None  # type: ignore[assignment]

import numpy as np
from safetensors import SafetensorError

from dino_simpool import distributed
from dino_simpool.config import Exclude
from dino_simpool.data.archives import TooMany
from dino_simpool.data.index import FORMAT, Index, open_index
from dino_simpool.data.scan import NOTHING_EXCLUDED, RECENT_NS, is_list, is_recent, scan, stamps
from dino_simpool.files import write_atomically
from dino_simpool.logs import say
from dino_simpool.names import ARCHIVE_SUFFIXES, IMAGE_SUFFIXES

SMALL = 5000
"""Sources with at most this many files and folders are listed at each start, in under a second."""


def load_index(root: str, exclude: Exclude = NOTHING_EXCLUDED) -> tuple[str, Index]:
    """The base folder (or archive) of a source, and its index. Raises the errors of `scan.scan`."""
    started = time.perf_counter()
    base = os.path.dirname(root) if is_list(root) else root
    file = cache_file(root, exclude)
    (index, _), how = _cached(file, base), "from the cache"
    if index is None:
        try:
            return base, scan(root, exclude, limit=SMALL)
        except TooMany:
            index, how = _shared(file, root, base, exclude)
    folders, seconds = np.count_nonzero(index.counts), time.perf_counter() - started
    say(f"index of {root}: {len(index):,} images in {folders:,} top-level folder(s), {how}, {seconds:.1f} s")
    return base, index


def cache_file(root: str, exclude: Exclude = NOTHING_EXCLUDED) -> Path:
    """The cache file of a source."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("DINO_SIMPOOL_CACHE") or os.path.join(home, "dino_simpool")).absolute()
    # The paths in a list are relative to the place where it was given, not to its real path.
    real = os.path.abspath(root) if is_list(root) else os.path.realpath(root)
    key = "\0".join([FORMAT, real, *IMAGE_SUFFIXES, *ARCHIVE_SUFFIXES, *exclude.patterns])
    return folder / f"{os.path.basename(real)}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.safetensors"


def _cached(file: Path, base: str) -> tuple[Index | None, str]:
    """The cached index, or None if it is missing, unreadable or stale; and the reason."""
    try:
        index = open_index(str(file))
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, str(error)
    watched = list(index.watched.below(base))
    changed = (stamps(watched) != index.stamps).any(1)
    if changed.any():
        return None, f"{watched[int(changed.argmax())]} has changed"
    return index, ""


def _shared(file: Path, root: str, base: str, exclude: Exclude) -> tuple[Index, str]:
    """The index, listed by this process or another one, and where it came from, in words."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_suffix(".lock"), "ab")  # noqa: SIM115 (held below)
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"index of {root}: another process is listing the files, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        say(f"index of {root}: cannot be cached in {file.parent} ({error}), each start lists all files; set DINO_SIMPOOL_CACHE")
        return scan(root, exclude, bar=distributed.is_main()), "listed now"
    with lock:  # closing unlocks
        index, why = _cached(file, base)  # another process may have listed it while this one waited
        if index is not None:
            return index, "from the cache"
        if why:
            say(f"index of {root}: {why}, listing all files again")
        return _built(file, root, exclude)


def _built(file: Path, root: str, exclude: Exclude) -> tuple[Index, str]:
    """List the source, and cache the index."""
    index = scan(root, exclude, bar=True)
    if is_recent(index):  # another change now might not change the recorded times
        time.sleep(RECENT_NS / 1e9)
        index = scan(root, exclude, bar=True)
        if is_recent(index):
            return index, "listed now (not cached: files are being added or removed)"
    try:
        write_atomically(file, index.save)
    except (OSError, SafetensorError) as error:
        return index, f"listed now (not cached in {file.parent}: {error})"
    return open_index(str(file)), "listed now"
