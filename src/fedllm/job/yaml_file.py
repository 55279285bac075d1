"""Read a YAML 1.2 file into plain values and remember the line of each."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from fedllm.errors import ConfigError

# Bounds that no job comes near; a file at a bound is still read within a second or so.
_MAX_BYTES = 2**18
_MAX_DEPTH = 20
_MAX_VALUES = 5000
_INT = re.compile(r"[-+]?[0-9]{1,100}")
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
        path: The file; at most 256 KiB, 5000 keys and values, and 20 levels deep.

    Raises:
        ConfigError: `FILE_NOT_FOUND`, `BAD_YAML` or `DUPLICATE_KEY`, with the line.
    """
    text = _read_text(path)
    _scan(path, text)
    try:
        node = _parser().compose(text)
    except YAMLError as error:
        raise _bad(path, text, error) from None
    file = YamlFile(path, {})
    if not isinstance(node, MappingNode):
        fix = "write `key: value` lines; `fedllm init FOLDER` writes a commented example"
        raise ConfigError("BAD_YAML", "the file is not a mapping of keys to values", where=f"{path}:1", fix=fix)
    file.values = _build(node, (), file)
    return file


def _parser() -> Any:
    return YAML(typ="safe", pure=True)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            fix = "name a job or party file; data stand in their own files"
            raise ConfigError("BAD_YAML", "the file is larger than 256 KiB", where=str(path), fix=fix)
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        fix = "save it as UTF-8 text"
        raise ConfigError("BAD_YAML", "the file is not UTF-8 text", where=str(path), fix=fix) from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(
            "FILE_NOT_FOUND", "no such file", where=str(path), fix="`fedllm init FOLDER` writes a commented example"
        ) from None
    except OSError as error:
        what = f"the file cannot be read: {error.strerror}"
        raise ConfigError("FILE_NOT_FOUND", what, where=str(path), fix="check its permissions") from None


def _bad(path: Path, text: str, error: YAMLError) -> ConfigError:
    line, problem = 1, type(error).__name__
    if isinstance(error, MarkedYAMLError):
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = error.problem or problem
    elif isinstance(error, ReaderError):
        line, problem = text.count("\n", 0, error.position) + 1, error.reason
    fix = "check indentation, colons and quotes around this line"
    return ConfigError("BAD_YAML", f"not valid YAML: {problem}", where=f"{path}:{line}", fix=fix)


def _scan(path: Path, text: str) -> None:
    depth = values = 0
    try:
        for event in _parser().parse(text):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            values += isinstance(event, ScalarEvent)
            if refusal := _refusal(event, depth, values):
                what, fix = refusal
                raise ConfigError("BAD_YAML", what, where=f"{path}:{event.start_mark.line + 1}", fix=fix)
    except YAMLError as error:
        raise _bad(path, text, error) from None


def _refusal(event: Any, depth: int, values: int) -> tuple[str, str] | None:
    if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
        return "anchors and aliases (& and *) are refused", "write the value out each time"
    # ruamel gives an untagged node no tag here, so whatever has one was written by hand.
    if getattr(event, "tag", None):
        return "tags (!...) are refused", "write plain values"
    if depth > _MAX_DEPTH:
        return f"more than {_MAX_DEPTH} levels deep", "no setting lies that deep: check brackets and indentation"
    if values > _MAX_VALUES:
        return f"more than {_MAX_VALUES} keys and values", "name a job or party file; data stand in their own files"
    return None


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
            raise ConfigError("BAD_YAML", "a key is not a plain word", where=where, fix="write `key: value`")
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
    # What is too large for a number stays a word, and is refused where a number is asked for.
    return float(text) if _FLOAT.fullmatch(text) and math.isfinite(float(text)) else text
