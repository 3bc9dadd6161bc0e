"""A YAML text: what it says, and on which line. Reads no file and knows no setting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

_QUOTES = "'\"`()[],:;"


class Unreadable(ValueError):
    """No YAML, or not this kind of it; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class Document:
    """`value`: plain lists, mappings and scalars; None for an empty text."""

    def __init__(self, text: str) -> None:
        """Raises Unreadable; of a mapping that has a key twice too, where YAML would take the last."""
        try:
            loader = yaml.SafeLoader(text)
        except yaml.reader.ReaderError as error:
            raise Unreadable(1 + text.count("\n", 0, error.position), str(error.reason)) from None
        try:
            self._root: yaml.Node | None = loader.get_single_node()
            self._refuse_twins()
            self.value: Any = None if self._root is None else loader.construct_document(self._root)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise Unreadable(1 if mark is None else mark.line + 1, str(error.problem or error.context)) from None
        except RecursionError:
            raise Unreadable(loader.line + 1, "nested too deeply") from None
        finally:
            loader.dispose()

    def line(self, where: Sequence[str | int]) -> int:
        """Of the key or entry that `where` leads to, as far as it leads. A key's - and _ are the same."""
        node, line = self._root, 1
        for step in where:
            found = _step(node, step)
            if found is None:
                break
            line, node = found
        return line

    def mention(self, message: str, where: Sequence[str | int] = ()) -> int | None:
        """The line of the last scalar below `where` that is a word of `message`; None if there is none."""
        node = self._root
        for step in where:
            found = _step(node, step)
            if found is None:
                return None
            node = found[1]
        words = {word.strip(_QUOTES) for word in message.split()} - {""}
        return next((line for line, text in reversed([*_scalars(node)]) if text in words), None)

    def _refuse_twins(self) -> None:
        for node in _nodes(self._root):
            seen: set[str] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                name = _plain(key.value)
                if name in seen:
                    raise Unreadable(key.start_mark.line + 1, f"{key.value} is there twice")
                seen.add(name)


def _plain(key: Any) -> str:
    return str(key).replace("-", "_")


def _step(node: yaml.Node | None, step: str | int) -> tuple[int, yaml.Node] | None:
    """The line on which an entry begins, and what it is."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if _plain(key.value) == _plain(step):
                return key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        entry = node.value[step]
        return entry.start_mark.line + 1, entry
    return None


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if node is None:
        return
    yield node
    if isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _nodes(value)
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _nodes(entry)


def _scalars(node: yaml.Node | None) -> Iterator[tuple[int, str]]:
    for one in _nodes(node):
        if isinstance(one, yaml.ScalarNode):
            yield one.start_mark.line + 1, one.value
