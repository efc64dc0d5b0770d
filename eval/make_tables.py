"""The same as `dino-simpool table`, as a script: python eval/make_tables.py OUT1 OUT2."""

from __future__ import annotations

import sys

from dino_simpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["table", *sys.argv[1:]]))
