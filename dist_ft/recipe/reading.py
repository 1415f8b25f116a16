"""YAML to plain dicts and lists, strictly: no surprises of YAML 1.1, no duplicate keys."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

RawPath = tuple[str | int, ...]
# Aliases may repeat a node; a recipe that grows beyond this is a mistake or an attack.
_MOST_NODES = 20_000


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2: ``no`` and ``1:30`` are text, ``2e-5`` is a number."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the attribute that PyYAML reads)


# PyYAML matches only the beginning, hence the $.
for _tag, _pattern in {
    "null": r"(~|null|Null|NULL|)$",
    "bool": r"(true|True|TRUE|false|False|FALSE)$",
    "int": r"[-+]?(0|[1-9][0-9]*)$",
    "float": r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), None)


@dataclass
class Document:
    """A YAML document as plain values.

    Attributes:
        value: Dicts, lists, text, numbers, booleans and None.
        problems: Path and text of what was not accepted while reading.
    """

    value: Any = None
    problems: list[tuple[RawPath, str]] = field(default_factory=list)


def read_yaml(path: Path) -> Document:
    """Return the document in a file.

    Raises:
        ValueError: If the file can't be read or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: correct the path of the recipe") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder: name the recipe file in it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}): save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}): check it") from None
    return parse_yaml(text, name=str(path))


def parse_yaml(text: str, *, name: str) -> Document:
    """Return the document in a text.

    Args:
        text: The YAML.
        name: What error messages call it.

    Raises:
        ValueError: If the text is not one YAML document.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        builder = _Builder(loader)
        return Document(None if node is None else builder.build(node, ()), builder.problems)
    except RecursionError:
        raise ValueError(f"{name}: is nested too deeply: make it flatter") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {_describe(error)}") from None


class _Builder:
    """Makes plain values of nodes, remembering what a recipe may not hold."""

    def __init__(self, loader: _Loader) -> None:
        self.loader = loader
        self.problems: list[tuple[RawPath, str]] = []
        self.nodes = 0
        self.open: set[int] = set()

    def build(self, node: yaml.Node, path: RawPath) -> Any:
        self.nodes += 1
        if self.nodes > _MOST_NODES or id(node) in self.open:
            raise yaml.YAMLError("the aliases (*name) never end: write the values out")
        self.open.add(id(node))
        try:
            if not node.tag.startswith("tag:yaml.org,2002:") or "/" in node.tag:
                return self._refuse_tag(node, path)
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: RawPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append((path, f"a key must be text, line {line}: write a word"))
                continue
            # Keys stay text: a label named 1 or a group named null is found under that name.
            key = str(key_node.value)
            value = self.build(value_node, (*path, key))
            if key in values:
                text = f"given twice, in lines {lines[key]} and {line}: keep one of them"
                self.problems.append(((*path, key), text))
                continue
            values[key], lines[key] = value, line
        return values

    def _scalar(self, node: yaml.Node, path: RawPath) -> Any:
        try:
            value = self.loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError):
            value = node
        if isinstance(value, float) and not math.isfinite(value):
            self.problems.append((path, f"must be a finite number, got {node.value}: lower it"))
            return None
        if value is None or isinstance(value, str | int | float):
            return value
        return self._refuse_tag(node, path)

    def _refuse_tag(self, node: yaml.Node, path: RawPath) -> None:
        text = f"must be plain YAML, got the tag {node.tag}: remove the tag"
        self.problems.append((path, text))


def value_at(raw: Any, path: RawPath) -> Any:
    """Return the value at a path, or None if there is none."""
    for key in path:
        if isinstance(raw, dict) and isinstance(key, str):
            raw = raw.get(key)
        elif isinstance(raw, list) and isinstance(key, int) and key < len(raw):
            raw = raw[key]
        else:
            return None
    return raw


def _describe(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return f"{place}{problem}: correct the YAML there"
