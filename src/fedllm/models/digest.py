"""Digests by which parties know that they hold the same base model and tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

# Keys of config.json that tools rewrite without changing what the model computes.
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures_version"}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, hex.

    Args:
        path: The file.
    """
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form, hex.

    Args:
        value: A JSON-serialisable value.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def base_digest(folder: Path) -> str:
    """Return the SHA-256 of a base model: its weight files and what its config computes with.

    Args:
        folder: Folder with `config.json` and `*.safetensors`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    weights = {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    return json_digest({"config": kept, "weights": weights})


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of what a tokenizer does: vocabulary, merges, rules and special tokens.

    Args:
        tokenizer: A transformers tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    # Truncation and padding are call settings that a tokenizer remembers, not a part of what it is.
    if isinstance(rules, dict):
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json_digest({"rules": rules, "special": special})
