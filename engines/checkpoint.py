"""`triptych checkpoint`: make a tiny random checkpoint to play with, in the ordinary Hugging Face folder form."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engines.families import FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(prog="triptych checkpoint", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--family", choices=sorted(FAMILIES), default="qwen3_vl")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced if it exists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4, help="layers of the language model")
    arguments = parser.parse_args()
    from engines.tiny import make  # takes seconds to import

    folder = make(arguments.family, arguments.out, arguments.seed, arguments.layers)
    size = sum(file.stat().st_size for file in folder.iterdir())
    sys.stdout.write(f"{folder}: {arguments.family}, {size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
