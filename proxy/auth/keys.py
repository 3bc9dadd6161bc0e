"""API keys by their hashes: who a credential belongs to, and what its owner may do. The file holds no key itself.

    - name: acme                        # in logs
      hash: blake3:4f0c…                # or sha256:…, 64 hexadecimal digits
      models: [qwen*, llava]            # what may be named as `model`; default: all
      requests_per_minute: 600
      tokens_per_minute: 200000         # prompt and output
      concurrent: 32
      tenant: acme                      # tenants never share an embedding; default: --tenant-header tells them apart

A key is 32 random bytes, so a fast hash hides it as well as a slow one would. Reads no file.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Any

import yaml
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

MOST = 8192
"""Keys that one file may hold."""

_PREFIX = "triptych-"
_HASHES: dict[str, Callable[[bytes], bytes]] = {
    "blake3": lambda data: blake3(data).digest(),
    "sha256": lambda data: sha256(data).digest(),
}


class Key(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    hash: str = Field(pattern=rf"^({'|'.join(_HASHES)}):[0-9a-f]{{64}}$", repr=False)
    models: tuple[str, ...] = ("*",)
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    concurrent: PositiveInt | None = None
    tenant: str = ""

    def allows(self, model: str) -> bool:
        """Whether `model` may be asked for. No name at all is whatever the engine serves: not one that is listed."""
        return any(pattern == "*" or (model and fnmatchcase(model, pattern)) for pattern in self.models)

    @property
    def limited(self) -> bool:
        """Whether anything of its use has to be counted."""
        return any((self.requests_per_minute, self.tokens_per_minute, self.concurrent))


class Keys:
    """All keys of a file."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = tuple(keys)
        self._found: dict[str, dict[bytes, tuple[bytes, Key]]] = {}  # by algorithm and the beginning of the hash
        for key in keys:
            algorithm, _, digest = key.hash.partition(":")
            whole = bytes.fromhex(digest)
            self._found.setdefault(algorithm, {})[whole[:8]] = whole, key

    def __repr__(self) -> str:
        return f"<Keys {', '.join(key.name for key in self._keys)}>"

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return (key.name for key in self._keys)

    def find(self, credential: str) -> Key | None:
        """Whose `credential` this is. How long it takes tells nothing of any key: what is looked up is a hash, which
        nobody can steer, and hashes are compared in constant time."""
        given = credential.encode("utf-8", "surrogateescape")
        for algorithm, known in self._found.items():
            digest = _HASHES[algorithm](given)
            whole, key = known.get(digest[:8], (b"", None))
            if key is not None and hmac.compare_digest(whole, digest):
                return key
        return None

    @classmethod
    def parse(cls, text: str) -> Keys:
        """Raises ValueError that names the line and the field at fault."""
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            entries = [] if node is None else loader.construct_document(node)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(entries, list):
            raise ValueError("line 1: a list of keys is needed, each with a name and a hash")
        if len(entries) > MOST:
            raise ValueError(f"more than {MOST} keys")
        nodes: list[yaml.Node] = [] if node is None else node.value
        return cls(_distinct([_key(entry, at) for entry, at in zip(entries, nodes, strict=True)]))


def _key(entry: Any, node: yaml.Node) -> Key:
    line = node.start_mark.line + 1
    try:
        return Key.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        for named, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = named.start_mark.line + 1 if named.value == field else line
        raise ValueError(f"line {line}: {field and f'{field}: '}{first['msg']}") from None


def _distinct(keys: list[Key]) -> list[Key]:
    seen: set[str] = set()
    for key in keys:
        for what, value in (("name", key.name), ("hash", key.hash)):
            if value in seen:  # a name has no colon, a hash has one
                raise ValueError(f"{key.name}: another key has the same {what}")
            seen.add(value)
    return keys


def made(random: bytes) -> tuple[str, str]:
    """A key of 32 `random` bytes, and the hash that its entry has."""
    key = _PREFIX + random.hex()
    return key, f"blake3:{_HASHES['blake3'](key.encode()).hex()}"
