"""Imports go one way (.importlinter), and what could run code or draw from global generators is nowhere used."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fedllm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Modules that run code when they read data.
FORBIDDEN_IMPORTS = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
# The engine, and the only folder that may know of it.
ENGINE, ENGINE_FOLDER = "nvflare", PACKAGE / "runtime" / "flare"
# Full names, as `import numpy as np; np.random.seed` resolves to numpy.random.seed.
FORBIDDEN_CALLS = (
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "torch.load",
    "torch.save",
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.seed",
    "numpy.load",
    "numpy.random.seed",
    "random.seed",
    "transformers.set_seed",
    "accelerate.utils.set_seed",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
)
FORBIDDEN_TRUE_ARGUMENTS = ("trust_remote_code", "shell", "allow_pickle")
# `multiprocessing.connection.Connection.recv` unpickles; `recv_bytes` does not.
FORBIDDEN_METHODS = ("recv",)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package below a folder."""
    code = "import sys; sys.path.insert(0, 'src'); from importlinter.cli import lint_imports; "
    code += "sys.exit(lint_imports(config_filename='.importlinter', no_cache=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def copy_of_package(folder: Path) -> Path:
    shutil.copy(ROOT / ".importlinter", folder)
    shutil.copytree(PACKAGE, folder / "src" / "fedllm", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    return folder / "src" / "fedllm"


def test_imports_go_one_way() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("below", "above"),
    [("errors.py", "seeds"), ("wire/frame.py", "models.digest"), ("train/base.py", "evaluate.loss")],
)
def test_an_import_against_the_layers_is_found(tmp_path: Path, below: str, above: str) -> None:
    module = copy_of_package(tmp_path) / below
    module.write_text(module.read_text(encoding="utf-8") + f"\nimport fedllm.{above}\n", encoding="utf-8")
    result = lint_imports(tmp_path)
    assert result.returncode == 1 and "Layers of the package BROKEN" in result.stdout


def test_a_new_folder_must_be_given_a_layer(tmp_path: Path) -> None:
    (copy_of_package(tmp_path) / "gossip.py").write_text('"""New."""\n')
    assert "fedllm.gossip" in lint_imports(tmp_path).stdout


def aliases_of(tree: ast.AST) -> dict[str, str]:
    """Return the names that a module's imports bind, and what they stand for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                names[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.expr, aliases: dict[str, str]) -> str:
    """Return the dotted name of `a.b.c` with the import of `a` resolved; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([aliases.get(node.id, node.id), *reversed(parts)])


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def unsafe_uses(source: str, *, path: Path = PACKAGE) -> Iterator[str]:
    """Yield `line: what` for each use of something forbidden in a module."""
    tree = ast.parse(source)
    aliases = aliases_of(tree)
    forbidden = FORBIDDEN_IMPORTS if path.is_relative_to(ENGINE_FOLDER) else (*FORBIDDEN_IMPORTS, ENGINE)
    for node in ast.walk(tree):
        for name in imported(node):
            if name.partition(".")[0] in forbidden:
                yield f"{node.lineno}: import of {name}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            # A mention is enough: `load = torch.load` would hide the call.
            name = full_name(node, aliases)
            if name in FORBIDDEN_CALLS:
                yield f"{node.lineno}: {name}"
        if isinstance(node, ast.Call):
            yield from unsafe_arguments(node)


def unsafe_arguments(call: ast.Call) -> Iterator[str]:
    if isinstance(call.func, ast.Attribute) and call.func.attr in FORBIDDEN_METHODS:
        yield f"{call.lineno}: .{call.func.attr}()"
    for keyword in call.keywords:
        # Anything but a plain False is refused: `trust_remote_code=setting` is a way in, too.
        is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in FORBIDDEN_TRUE_ARGUMENTS and not is_false:
            yield f"{call.lineno}: {keyword.arg}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_runs_code_from_data_or_seeds_a_global_generator(path: Path) -> None:
    assert list(unsafe_uses(path.read_text(encoding="utf-8"), path=path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import nvflare.client as flare",
        "import torch\ntorch.load('x')",
        "from torch import load as read\nread('x')",
        "import numpy as np\nnp.random.seed(0)",
        "import torch\nseed = torch.manual_seed",
        "import random\nrandom.seed(1)",
        "eval('1')",
        "def f():\n    exec('1')",
        "import yaml\nyaml.load('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=settings.trust)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "connection.recv()",
    ],
)
def test_each_unsafe_use_is_found(source: str) -> None:
    assert len(list(unsafe_uses(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import torch\ntorch.Generator().manual_seed(3)",
        "AutoModel.from_pretrained('x', trust_remote_code=False)",
        "import re\nre.compile('x')",
        "connection.recv_bytes()",
        "from safetensors.torch import load\nload(b'')",
    ],
)
def test_safe_uses_that_look_alike_pass(source: str) -> None:
    assert list(unsafe_uses(source)) == []


def test_only_the_folder_of_the_engine_may_import_it() -> None:
    source = "from nvflare.apis.signal import Signal"
    assert list(unsafe_uses(source, path=ENGINE_FOLDER / "clerk.py")) == []
    assert len(list(unsafe_uses(source, path=PACKAGE / "runtime" / "up.py"))) == 1
    assert len(list(unsafe_uses("import pickle", path=ENGINE_FOLDER / "clerk.py"))) == 1
