"""What holds for the package as a whole: a light command line, docstrings, codes that are used and explained."""

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedllm
from fedllm.errors import CODES, ExitCode

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fedllm"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "peft", "datasets", "trl", "matplotlib", "sacrebleu", "pandas", "numpy"}


def module_id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def cpu_seconds(command: list[str]) -> float:
    """Return user + system time of a command: what it costs, whatever else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_costs_less_than_twice_that_of_a_program_of_one_verb() -> None:
    """A third of a second on the machines of today. Seconds are the machine's, and a ratio is ours."""
    smallest = "import typer, rich.console\ntyper.run(lambda: None)"
    # The least of several: what else the machine does only adds to it.
    ours, least = (
        min(cpu_seconds([sys.executable, *words, "--help"]) for _ in range(5))
        for words in (["-m", "fedllm"], ["-c", smallest])
    )
    assert ours < 2 * least


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["data", "check", "--help"]])
def test_help_imports_no_heavy_library(arguments: list[str]) -> None:
    code = "import json, sys\nfrom fedllm.cli import main\ntry:\n    main()\nexcept SystemExit as stop:\n"
    code += "    sys.stderr.write(json.dumps([stop.code, sorted(sys.modules)]))"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    code_, modules = json.loads(result.stderr)
    assert code_ == 0 and "Usage" in result.stdout
    assert HEAVY & set(modules) == set()


def test_importing_fedllm_imports_no_heavy_library() -> None:
    code = "import sys, fedllm; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & set(result.stdout.split()) == set()


def test_public_names_are_there() -> None:
    assert [name for name in fedllm.__all__ if getattr(fedllm, name, None) is None] == []


def test_the_version_is_that_of_the_metadata() -> None:
    from importlib.metadata import version

    assert fedllm.__version__ == version("fedllm")


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Yield the module, public classes, functions and methods that have no docstring."""
    if not ast.get_docstring(tree):
        yield "module"
    todo: list[tuple[str, ast.AST]] = [("", tree)]
    for prefix, parent in todo:
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                yield f"{prefix}{node.name}, line {node.lineno}"
            if isinstance(node, ast.ClassDef):
                todo.append((f"{node.name}.", node))


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_every_public_thing_has_a_docstring(path: Path) -> None:
    assert list(undocumented(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source", ["x = 1", '"""M."""\ndef f(): pass', '"""M."""\nclass C:\n  """C."""\n  def f(s): 1']
)
def test_a_missing_docstring_is_found(source: str) -> None:
    assert len(list(undocumented(ast.parse(source)))) == 1


def strings_used(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def error_codes_given(path: Path) -> Iterator[str]:
    """Yield the first argument of each `SomeError("CODE", ...)` or `RunFailed("CODE", ...)` in a module."""
    classes = {"FedllmError", *_error_classes()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _error_classes() -> set[str]:
    tree = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_every_error_code_is_used() -> None:
    used = set().union(*(strings_used(path) for path in MODULES if path.name != "errors.py"))
    assert set(CODES) - used == set()


def test_every_error_raised_has_a_known_code() -> None:
    given = {code for path in MODULES for code in error_codes_given(path)}
    assert len(given) > 20 and given <= set(CODES)


def headings(path: Path, level: int) -> list[str]:
    mark = "#" * level + " "
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix(mark).strip() for line in lines if line.startswith(mark)]


def test_every_error_code_has_a_section_and_no_other_has() -> None:
    assert sorted(headings(ROOT / "docs/reference/errors.md", 3)) == sorted(CODES)


def test_every_exit_code_has_a_line_and_no_other_has() -> None:
    text = (ROOT / "docs/reference/exit-codes.md").read_text(encoding="utf-8")
    cells = [[cell.strip(" `") for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    found = {(int(line[1]), line[2]) for line in cells if line[1].isdigit()}
    assert found == {(int(code), code.name) for code in ExitCode}


def test_the_changelog_names_this_version() -> None:
    assert f"## {fedllm.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
