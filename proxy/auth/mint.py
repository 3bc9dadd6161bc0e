"""`triptych key NAME`: makes an API key. Its entry goes to stdout, ready for the file; the key to stderr, this once."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence

import yaml
from pydantic import ValidationError

from proxy.auth.keys import Key, made


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; wrong arguments exit with 2."""
    parser = _parser()
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    key, digest = made(secrets.token_bytes(32))
    try:
        entry = Key(hash=digest, **given)
    except ValidationError as error:
        first = error.errors()[0]
        parser.error(f"{first['loc'][0]}: {first['msg']}")
    print(f"the key of {entry.name}, which is kept nowhere: {key}", file=sys.stderr, flush=True)
    shown = {"name": entry.name, "hash": entry.hash, **given}
    print(yaml.safe_dump([shown], sort_keys=False, default_flow_style=False), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="triptych key",
        description="Make an API key: triptych key acme >> keys.yaml, for triptych proxy --api-keys keys.yaml",
    )
    parser.add_argument("name", help="of its owner: what logs and receipts say")
    parser.add_argument("--models", type=_list, help="patterns of models it is for, as qwen*,llava; default: all")
    parser.add_argument("--requests-per-minute", type=int, help="default: no limit")
    parser.add_argument("--tokens-per-minute", type=int, help="of prompts and answers; default: no limit")
    parser.add_argument("--concurrent", type=int, help="requests in flight at once; default: no limit")
    parser.add_argument("--tenant", help="whose media these are: tenants never share an embedding")
    return parser


def _list(text: str) -> list[str]:
    return [pattern.strip() for pattern in text.split(",") if pattern.strip()]


if __name__ == "__main__":
    sys.exit(main())
