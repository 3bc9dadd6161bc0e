"""Recorded arrivals, from files in the formats in which two services published theirs. None is shipped or fetched.

Azure LMM 2025 (CC-BY, github.com/Azure/AzurePublicDataset): csv, perhaps gzipped, with the columns TIMESTAMP,
NumImages, ContextTokens, GeneratedTokens. Says nothing of sizes or identity: a gallery does.

Mooncake (github.com/kvcache-ai/Mooncake, FAST25-release): one JSON object per line with timestamp (milliseconds),
input_length, output_length and hash_ids, one for each block of 512 tokens. Text only: `workloads.illustrated` adds
images.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

import orjson

from bench.simulator.requests import Request, Text
from bench.simulator.workloads import Arrival, Gallery

BLOCK = 512
"""Tokens of a Mooncake block; the last one of a prompt may have fewer."""


def azure(file: Path, gallery: Gallery, speed: float = 1.0) -> Iterator[Arrival]:
    """An Azure LMM trace from time 0 on, `speed` times as fast, in the file's order.

    ContextTokens are taken as the text's. Raises ValueError, naming the line, for one that is not of this format.
    """
    start: datetime | None = None
    with _text(file) as lines:
        for number, row in enumerate(csv.DictReader(lines), 2):
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"])
                images, text, output = (int(row[name]) for name in ("NumImages", "ContextTokens", "GeneratedTokens"))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file.name}, line {number}, is not of an Azure LMM trace: {error!r}") from error
            start = start or at
            request = Request((*gallery.show(images), Text(max(1, text))), max(1, output))
            yield (at - start).total_seconds() / speed, request


def mooncake(file: Path, speed: float = 1.0) -> Iterator[Arrival]:
    """A Mooncake trace from time 0 on, `speed` times as fast, in the file's order; a part of a request for each block.

    Raises ValueError, naming the line, for one that is not of this format.
    """
    start: float | None = None
    with _text(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = orjson.loads(line)
                at, tokens, output = (float(row[n]) for n in ("timestamp", "input_length", "output_length"))
                names = [str(name) for name in row["hash_ids"]]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file.name}, line {number}, is not of a Mooncake trace: {error!r}") from error
            start = at if start is None else start
            yield (at - start) / 1000 / speed, Request(_blocks(names, int(tokens)), max(1, int(output)))


def _blocks(names: list[str], tokens: int) -> tuple[Text, ...]:
    parts = []
    for name in names:
        if tokens > 0:
            parts.append(Text(min(BLOCK, tokens), name))
            tokens -= BLOCK
    return tuple(parts) or (Text(max(1, tokens)),)


def _text(file: Path) -> IO[str]:
    return gzip.open(file, "rt") if file.suffix == ".gz" else file.open()
