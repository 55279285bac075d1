"""Write the pages of docs/reference that are made from the code, or check that they are up to date.

    python scripts/make_reference.py           writes cli.md, python-api.md, a page and a schema per settings file
    python scripts/make_reference.py --check   exits with 1 when one of them differs

tests/test_reference.py holds them equal, so that no option, key or default changes unnoticed.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
_MADE = "<!-- Made by scripts/make_reference.py from the code. Change the code, then run `make reference`. -->\n\n"
Schema = dict[str, Any]


def pages() -> dict[Path, str]:
    """Return the content of each generated page by its path."""
    from fedllm.job.schema import json_schema

    made = {FOLDER / "cli.md": _MADE + cli_page(), FOLDER / "python-api.md": _MADE + python_page()}
    for kind, head in {"job": JOB_HEAD, "party": PARTY_HEAD, "project": PROJECT_HEAD}.items():
        schema = json_schema(kind)
        made[FOLDER / f"{kind}-file.md"] = _MADE + file_page(head, schema)
        made[FOLDER / f"{kind}.schema.json"] = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    return made


# Command line

CLI_HEAD = """# Command line

Results go to standard output, progress and errors to standard error.
With `--json` standard output holds one object: `schema_version`, `status`, `exit_code` and `data`.
What goes on for long (`serve`, `join`, `logs`, `status --follow`) prints one object a line instead, without that frame.
An error under `--json` has `code`, `what`, `where` and `fix` in `data`.
The [exit codes](exit-codes.md) and the [error codes](errors.md) are part of the interface.
`fedllm COMMAND --help` shows the same as this page.
"""


def cli_page() -> str:
    """Return the page of the command line."""
    import typer

    from fedllm.cli import app

    root: Any = typer.main.get_command(app)
    parts = [CLI_HEAD]
    for name, command in commands(root):
        parts.append(f"## fedllm {name}\n\n{inspect.cleandoc(command.help)}\n\n```text\n{usage(name, command)}\n```\n")
        parts.append(_table(["argument or option", "default", "meaning"], [_parameter(p) for p in command.params]))
    return "\n".join(parts)


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (words, command) for each command below a group, in the order of `--help`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def usage(name: str, command: Any) -> str:
    """Return the usage line of a command."""
    return " ".join(["fedllm", name, *(_in_usage(p) for p in command.params if p.name != "help")])


def _is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def _word(parameter: Any) -> str:
    if _is_argument(parameter):
        return str(parameter.metavar or parameter.name.upper())
    if getattr(parameter, "is_flag", False):
        return ""
    if parameter.name == "overrides":
        return "KEY=VALUE"
    annotation = parameter.type_descriptor.annotation
    return {int: "N", float: "X"}.get(annotation, "PATH" if annotation is Path else "TEXT")


def _in_usage(parameter: Any) -> str:
    if _is_argument(parameter):
        return _word(parameter) if parameter.required else f"[{_word(parameter)}]"
    longest = max(parameter.opts, key=len)
    text = f"{longest} {_word(parameter)}".strip()
    if parameter.required:
        return text
    return f"[{text}]{'...' if parameter.multiple else ''}"


def _parameter(parameter: Any) -> list[str]:
    if _is_argument(parameter):
        name = f"`{_word(parameter)}`"
    else:
        name = ", ".join(f"`{f'{opt} {_word(parameter)}'.strip()}`" for opt in parameter.opts)
    default = parameter.default
    if parameter.required:
        shown = "required"
    elif default is None or getattr(parameter, "is_flag", False):
        shown = ""
    else:
        shown = f"`{getattr(default, 'value', default)}`"
    return [name, shown, parameter.help or ""]


# job.yaml, party.yaml and project.yaml

JOB_HEAD = """# job.yaml

What all parties agree on. The same file goes to every party; its digest names the plan of the run.
`fedllm schema job` prints the [JSON Schema](job.schema.json), `fedllm config job.yaml` every value in effect with its
origin, `fedllm validate job.yaml` checks a file.

The file is YAML 1.2: `3e-5` is a number, `no` is a string. Refused are unknown keys, a key that stands twice, anchors,
aliases and tags. Relative paths start at the folder of the file. `--set key.path=value` wins over the file.
"""

PARTY_HEAD = """# party.yaml

What stays at a site. The file is never sent, and is no part of the job's digest. It is read from `parties/NAME.yaml`
beside the job file. Relative paths start at the folder of the party file. A site can only tighten what a job asks.
`fedllm schema party` prints the [JSON Schema](party.schema.json).
"""

PROJECT_HEAD = """# project.yaml

Who works together between machines, and where the server is. The coordinator's own file; it is not sent. The server's
folder `coordinator/` is beside it. [Let organisations into a project](../how-to/provision.md) shows how it is used.
`fedllm schema project` prints the [JSON Schema](project.schema.json).
"""


def file_page(head: str, schema: Schema) -> str:
    """Return the page of a settings file: one table per section, from its JSON Schema."""
    parts = [head, "## Top level\n", _keys(schema, schema)]
    for title, section in sections(schema, schema, ""):
        parts.append(f"## {title}\n\n{section.get('description', '')}\n")
        parts.append(_keys(section, schema))
    return "\n".join(parts)


def sections(section: Schema, root: Schema, prefix: str) -> Iterator[tuple[str, Schema]]:
    """Yield (title, schema) of every section below one, depth first."""
    for key, item in section["properties"].items():
        for target, scenario in _objects(item, root):
            name = prefix + key
            yield (f"{name}, scenario {scenario}" if scenario else name), target
            yield from sections(target, root, f"{name}.")


def _objects(item: Schema, root: Schema) -> Iterator[tuple[Schema, str]]:
    if "$ref" in item:
        yield _resolved(item, root), ""
    for option in item.get("anyOf", ()):
        if "$ref" in option:
            yield _resolved(option, root), option["$ref"].rpartition("/")[2].removesuffix("Settings")


def _resolved(item: Schema, root: Schema) -> Schema:
    found: Schema = root["$defs"][item["$ref"].rpartition("/")[2]] if "$ref" in item else item
    return found


def _keys(section: Schema, root: Schema) -> str:
    required = section.get("required", [])
    rows = []
    for key, item in section["properties"].items():
        is_section = any(True for _ in _objects(item, root))
        default = "required" if key in required else ""
        if not default and not is_section and "default" in item:
            default = f"`{json.dumps(item['default'])}`"
        text = item.get("description") or _resolved(item, root).get("description", "")
        rows.append([f"`{key}`", "section" if is_section else _type(item), default, text])
    return _table(["key", "value", "default", "meaning"], rows)


def _type(item: Schema) -> str:
    if "anyOf" in item:
        return " or ".join(_type(option) for option in item["anyOf"])
    if "enum" in item or "const" in item:
        return ", ".join(f"`{value}`" for value in item.get("enum", [item.get("const")]))
    kind = item.get("type", "any")
    if kind == "array":
        return f"list of {_type(item['items'])}"
    if kind == "object":
        values = item.get("additionalProperties", {})
        return f"mapping of name to {_type(values)}" if values.get("type") == "integer" else "mapping of strings"
    words = {"integer": "integer", "number": "number", "string": "string", "boolean": "true or false", "null": "null"}
    return words.get(kind, kind) + _bounds(item)


def _bounds(item: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {item[key]}" for key, sign in signs.items() if key in item]
    if "pattern" in item:
        bounds.append(f"`{item['pattern']}`".replace("|", "\\|"))
    return f" {', '.join(bounds)}" if bounds else ""


# Python

PYTHON_HEAD = """# Python

Everything here is imported from `fedllm` itself. What is imported from a folder below it may change without notice.
Errors are subclasses of `fedllm.errors.FedllmError`, with `code`, `what`, `where` and `fix`: see [errors](errors.md).
"""


def python_page() -> str:
    """Return the page of the public Python names, from their signatures and docstrings."""
    import fedllm

    parts = [PYTHON_HEAD]
    for name in sorted(fedllm.__all__, key=str.lower):
        found = getattr(fedllm, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            parts.append(_entry(f"## {name}", name, found))
            for method, function in _methods(found) if inspect.isclass(found) else ():
                parts.append(_entry(f"### {name}.{method}", f"{name}.{method}", function))
    return "\n".join(parts)


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(cls).items():
        if isinstance(member, classmethod | staticmethod):
            member = getattr(cls, name)
        is_own = inspect.isfunction(member) or inspect.ismethod(member) or isinstance(member, property)
        # The default of a callback field is a function, too; it has no docstring.
        if is_own and member.__doc__ and not name.startswith("_") and name != "model_post_init":
            yield name, member


def _entry(heading: str, name: str, found: Any) -> str:
    text = f"{heading}\n\n"
    if not isinstance(found, property) and not _is_settings(found):
        text += f"```python\n{name}{_signature(found)}\n```\n\n"
    return text + _docstring(found)


def _is_settings(found: Any) -> bool:
    # The fields of a pydantic model are on the page of its file.
    return inspect.isclass(found) and hasattr(found, "model_fields")


def _signature(found: Any) -> str:
    signature = inspect.signature(found)
    # The type annotations are strings, shown as they are written; defaults that are functions have no stable repr.
    parameters = [
        p.replace(default=_Shown("...")) if callable(p.default) and p.default is not p.empty else p
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    returns = signature.empty if inspect.isclass(found) else signature.return_annotation
    text = str(signature.replace(parameters=parameters, return_annotation=returns))
    text = re.sub(r"'([^']*)'", r"\1", text)
    if len(text) <= 100:
        return text
    inside, _, tail = text[1:].rpartition(")")
    return "(\n    " + ",\n    ".join(_split(inside)) + f",\n){tail}"


class _Shown:
    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _split(text: str) -> list[str]:
    """Return the parts of a parameter list, split at the commas outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _docstring(found: Any) -> str:
    """Return a docstring as Markdown: its Args and Raises become lists."""
    lines: list[str] = []
    for line in inspect.cleandoc(found.__doc__ or "").splitlines():
        if line in ("Args:", "Raises:", "Returns:"):
            lines.append(f"{line[:-1]}:\n")
        elif match := re.fullmatch(r"    (\w+): (.*)", line):
            lines.append(f"- `{match[1]}`: {match[2]}")
        else:
            lines.append(line[2:] if line.startswith("        ") else line)
    return "\n".join(lines).rstrip() + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main() -> int:
    """Write the pages, or with `--check` say which are out of date; return the exit code."""
    made = pages()
    if "--check" not in sys.argv:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for path, text in made.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = 0
    for path, text in made.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old != text:
            stale += 1
            sys.stderr.writelines(difflib.unified_diff(old.splitlines(True), text.splitlines(True), str(path), "code"))
    if stale:
        sys.stderr.write(f"{stale} pages of docs/reference are out of date: run `make reference`\n")
    return min(stale, 1)


if __name__ == "__main__":
    sys.exit(main())
