"""A YAML file and a settings class -> a checked object, or errors that name file, line, key and mend."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedllm.errors import ConfigError, nearest
from fedllm.job.yaml_file import KeyPath, YamlFile, plain_value, read_yaml
from fedllm.train.settings import HINTS

M = TypeVar("M", bound=BaseModel)
Origins = dict[str, str]


def load_model(cls: type[M], path: Path, *, overrides: list[str]) -> tuple[M, Origins]:
    """Return the object in a file, and where each value came from.

    Args:
        cls: The settings class.
        path: The YAML file.
        overrides: `key.path=value` settings that win over the file.

    Raises:
        ConfigError: The first error, with the others in `also`.
    """
    file = read_yaml(path)
    origins: Origins = {dotted(keys): file.where(keys) for keys in file.lines}
    for override in overrides:
        _apply(file, override, origins)
    try:
        return cls.model_validate(file.values), origins
    except ValidationError as error:
        # A mistyped key is often why another is missing: it comes first.
        items = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
        errors = [_explain(cls, file, item, origins) for item in items]
        errors[0].also = tuple(errors[1:])
        raise errors[0] from None


def dotted(keys: KeyPath) -> str:
    """Return `train.learning_rate` for a path of keys.

    Args:
        keys: Keys and indices from the top.
    """
    return ".".join(str(key) for key in keys)


def _apply(file: YamlFile, override: str, origins: Origins) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        fix = "for example `--set train.learning_rate=1e-4`"
        raise ConfigError("BAD_VALUE", f"`{override}` is not key=value", where="--set", fix=fix)
    target = file.values
    for depth, key in enumerate(keys[:-1], start=1):
        if key not in target:
            origins[dotted(tuple(keys[:depth]))] = "flag"
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            fix = "`fedllm config` lists all keys"
            raise ConfigError("BAD_VALUE", f"`{key}` in `{name}` has no keys below it", where="--set", fix=fix)
    target[keys[-1]] = _override_value(text.strip())
    origins[name.strip()] = "flag"


def _override_value(text: str) -> Any:
    """Return a scalar, `[a, b]` as a list, or `{a: b, c: d}` as a mapping; none of them within another."""
    items = [item.strip() for item in text[1:-1].split(",") if item.strip()]
    if text.startswith("[") and text.endswith("]"):
        return [plain_value(item) for item in items]
    pairs = [item.partition(": ") for item in items]
    if text.startswith("{") and text.endswith("}") and all(colon for _, colon, _ in pairs):
        return {key.strip(): plain_value(value.strip()) for key, _, value in pairs}
    return plain_value(text)


def _explain(cls: type[BaseModel], file: YamlFile, item: Any, origins: Origins) -> ConfigError:
    keys: KeyPath = tuple(key for key in item["loc"] if not isinstance(key, str) or _is_key(key))
    name = dotted(keys)
    where = "--set" if origins.get(name) == "flag" else file.where(keys)
    kind = item["type"]
    if kind == "extra_forbidden":
        word = str(keys[-1])
        section = settings_at(cls, keys[:-1], file.values)
        fix = HINTS.get(word) or nearest(word, section.model_fields if section else ())
        inside = f"`{dotted(keys[:-1])}`" if keys[:-1] else "this file"
        return ConfigError("UNKNOWN_KEY", f"`{word}` is not a key of {inside}", where=where, fix=fix)
    if kind == "missing":
        fix = f"add it: {_help(cls, keys, file.values)}"
        return ConfigError("MISSING_KEY", f"`{name}` is missing", where=where, fix=fix)
    if kind == "value_error":
        # Validators say what is wrong, then after a semicolon how to mend it.
        text, _, fix = str(item["ctx"]["error"]).partition("; ")
        code = "BAD_VALUE" if keys and name in origins and not isinstance(item["input"], dict) else "BAD_COMBINATION"
        what = f"`{name}`: {text}" if name else text
        return ConfigError(code, what, where=where, fix=fix or _help(cls, keys, file.values))
    what = f"`{name}` is {_shown(item['input'])}: {item['msg'][:1].lower()}{item['msg'][1:]}"
    fix = _help(cls, keys, file.values)
    if kind == "literal_error":
        hint = nearest(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
        fix = f"{hint} {fix}" if hint.startswith("did you mean") else fix
    return ConfigError("BAD_VALUE", what, where=where, fix=fix)


def _is_key(key: str) -> bool:
    # pydantic adds the names of a union's members to the location.
    return key not in ("str", "int", "float", "bool", "list[str]", "none") and "[" not in key


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _help(cls: type[BaseModel], keys: KeyPath, values: Any) -> str:
    # An item of a list has no description of its own: that of the list serves.
    while keys:
        section = settings_at(cls, keys[:-1], values)
        field = section.model_fields.get(str(keys[-1])) if section else None
        if field and field.description:
            return field.description
        keys = keys[:-1]
    return "`fedllm schema` prints all keys and what they may be"


def settings_at(cls: type[BaseModel], keys: KeyPath, values: Any) -> type[BaseModel] | None:
    """Return the settings class of a section, or None.

    Args:
        cls: The class at the top.
        keys: Path of the section.
        values: The file's values, for the scenario's own section.
    """
    current: type[BaseModel] | None = cls
    for depth, key in enumerate(keys):
        if current is None or str(key) not in current.model_fields:
            return None
        if depth == 0 and key == "federation" and "scenario" in cls.model_fields:
            # Only here, since the scenarios load torch: a party or project file is explained without.
            from fedllm.scenarios import SCENARIOS

            scenario = SCENARIOS.get(str(values.get("scenario", "FedHomoLLM")))
            current = scenario.settings if scenario else None
            continue
        current = _class_of(current.model_fields[str(key)].annotation)
    return current


def _class_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return next((cls for part in typing.get_args(annotation) if (cls := _class_of(part))), None)
    return None
