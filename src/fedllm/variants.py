"""Settings of things that come in variants, each with keys of its own: filled in, and refused where they are idle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def with_own(
    values: Any, fields: Iterable[str], *, key: str, default: str, variants: Mapping[str, Mapping[str, Any]]
) -> Any:
    """Return the values as given, with the variant's defaults where they are silent.

    For a pydantic validator of mode `before`: what is no mapping, or names no known variant, comes back as it is, for
    the fields to refuse.

    Args:
        values: What was written.
        fields: All keys that any variant has.
        key: The key that names the variant.
        default: The variant where none is named.
        variants: Name -> its keys and their defaults.

    Raises:
        ValueError: A key is given that the variant has not.
    """
    name = values.get(key, default) if isinstance(values, dict) else None
    own = variants.get(name) if isinstance(name, str) else None
    if own is None:
        return values
    given = {field: value for field, value in values.items() if value is not None}
    if idle := sorted(given.keys() & set(fields) - own.keys() - {key}):
        raise ValueError(f"{', '.join(idle)} has no effect with {name}; leave it out, or choose another {key}")
    return {**own, **given}
