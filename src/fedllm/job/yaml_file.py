"""Read a YAML 1.2 file into plain values and remember the line of each."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from fedllm.errors import ConfigError

_MAX_BYTES = 2**20
_MAX_DEPTH = 20
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}

KeyPath = tuple[str | int, ...]


@dataclass
class YamlFile:
    """A file's values, and the line (from 1) on which each key or item stands."""

    path: Path
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, keys: KeyPath) -> str:
        """Return `file:line` of a key, or of the nearest mapping around it.

        Args:
            keys: Path of keys and indices from the top.
        """
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return f"{self.path}:{self.lines.get(keys, 1)}"


def read_yaml(path: Path) -> YamlFile:
    """Return the values of a YAML file. Aliases, tags and duplicate keys are refused.

    Args:
        path: The file; at most 1 MiB and 20 levels deep.

    Raises:
        ConfigError: `FILE_NOT_FOUND`, `BAD_YAML` or `DUPLICATE_KEY`, with the line.
    """
    text = _read_text(path)
    _scan(path, text)
    try:
        node = _parser().compose(text)
    except YAMLError as error:
        raise _bad(path, error) from None
    file = YamlFile(path, {})
    if not isinstance(node, MappingNode):
        raise ConfigError("BAD_YAML", "the file is not a mapping of keys to values", where=f"{path}:1")
    file.values = _build(node, (), file)
    return file


def _parser() -> Any:
    return YAML(typ="safe", pure=True)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError("BAD_YAML", "the file is larger than 1 MiB", where=str(path))
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(
            "FILE_NOT_FOUND", "no such file", where=str(path), fix="`fedllm init FOLDER` writes a commented example"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError("BAD_YAML", "the file is not UTF-8 text", where=str(path)) from None


def _bad(path: Path, error: Exception) -> ConfigError:
    line, problem = 1, type(error).__name__
    if isinstance(error, MarkedYAMLError):
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = error.problem or problem
    return ConfigError("BAD_YAML", f"not valid YAML: {problem}", where=f"{path}:{line}", fix="check the indentation")


def _scan(path: Path, text: str) -> None:
    depth = 0
    try:
        for event in _parser().parse(text):
            where = f"{path}:{event.start_mark.line + 1}"
            if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
                raise ConfigError("BAD_YAML", "anchors and aliases (& and *) are refused", where=where)
            # ruamel gives an untagged node no tag here, so whatever has one was written by hand.
            if getattr(event, "tag", None):
                raise ConfigError("BAD_YAML", "tags (!...) are refused", where=where, fix="write plain values")
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ConfigError("BAD_YAML", f"more than {_MAX_DEPTH} levels deep", where=where)
    except YAMLError as error:
        raise _bad(path, error) from None


def _build(node: Any, keys: KeyPath, file: YamlFile) -> Any:
    if isinstance(node, MappingNode):
        return _build_mapping(node, keys, file)
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            file.lines[(*keys, index)] = item.start_mark.line + 1
        return [_build(item, (*keys, index), file) for index, item in enumerate(node.value)]
    return _scalar(node)


def _build_mapping(node: MappingNode, keys: KeyPath, file: YamlFile) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{file.path}:{key_node.start_mark.line + 1}"
        key: Hashable = key_node.value if isinstance(key_node, ScalarNode) else None
        if not isinstance(key, str):
            raise ConfigError("BAD_YAML", "a key is not a plain word", where=where)
        if key in result:
            raise ConfigError("DUPLICATE_KEY", f"`{key}` stands twice here", where=where, fix="keep one of them")
        file.lines[(*keys, key)] = key_node.start_mark.line + 1
        result[key] = _build(value_node, (*keys, key), file)
    return result


def _scalar(node: ScalarNode) -> Any:
    return node.value if node.style in ("'", '"', "|", ">") else plain_value(node.value)


def plain_value(text: str) -> Any:
    """Return what an unquoted word means in YAML 1.2: `3e-5` is a number, `no` is a string.

    Args:
        text: The word.
    """
    if text.lower() in _WORDS and text in (text.lower(), text.capitalize(), text.upper()):
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
