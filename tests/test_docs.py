"""README and docs: links lead somewhere, and the marked examples run.

A `console` or `python` block after `<!-- test -->` is run; a block after `<!-- test: file=NAME -->` goes into a file;
blocks inside `<!-- test-hidden ... -->` are run and not shown. The blocks of a page run in order, in an empty folder.
In a `console` block the lines with `$` are commands; other lines show what comes out and are not compared.
"""

import contextlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
_BLOCK = re.compile(r"<!-- test(?:: file=(?P<file>\S+))? -->\n```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_HIDDEN = re.compile(r"<!-- test-hidden\n(?P<inside>.*?)\n-->", re.S)
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """One marked example."""

    language: str
    text: str
    file: str | None


def blocks(text: str) -> list[Block]:
    shown = _HIDDEN.sub(lambda match: match["inside"].replace("```", "<!-- test -->\n```", 1), text)
    return [Block(match["language"], match["text"], match["file"]) for match in _BLOCK.finditer(shown)]


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in _LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in PAGES if "docs" in page.parts}
    listed = {line for line in index.splitlines() if re.fullmatch(r"[\w\-/]+", line)}
    assert listed == pages - {"index"}


class Session:
    """Runs the examples of one page in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, block: Block) -> None:
        if block.file:
            (self.folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "console":
            for line in block.text.splitlines():
                if line.startswith("$ "):
                    self.command(line[2:].partition("  #")[0].strip())
        else:
            assert block.language == "python", f"a block of {block.language} cannot be run"
            script = self.folder / "_example.py"
            script.write_text(block.text, encoding="utf-8")
            with in_folder(self.folder):
                runpy.run_path(str(script), run_name="__main__")

    def command(self, line: str) -> None:
        words = shlex.split(line)
        if words[0] == "cd":
            self.folder = self.folder / words[1]
        elif words[0] == "fedllm" and words[-2] == ">":
            with (self.folder / words[-1]).open("w", encoding="utf-8") as handle, contextlib.redirect_stdout(handle):
                self.fedllm(words[:-2])
        elif words[0] == "fedllm":
            self.fedllm(words)
        elif words[0] == "python":
            with in_folder(self.folder):
                runpy.run_path(str(self.folder / words[1]), run_name="__main__")
        else:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            subprocess.run(line, shell=True, cwd=self.folder, env=os.environ | {"PATH": path}, check=True)  # noqa: S602

    def fedllm(self, words: list[str]) -> None:
        """Run a command in this process: the libraries are loaded once."""
        if words == ["fedllm", "demo"]:
            self.fedllm(["fedllm", "init", "fedllm-demo"])
        with in_folder(self.folder):
            assert call_main(words) == 0, shlex.join(words)
            if words[1] == "init":
                make_small(Path(words[2]))


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    path = list(sys.path)
    with contextlib.chdir(folder), warnings.catch_warnings():
        # What a library warns of is no failure of the page.
        warnings.simplefilter("default")
        try:
            yield
        finally:
            sys.path[:] = path


def call_main(words: list[str]) -> int:
    from fedllm.cli import main

    old, old_handler, environment = sys.argv, signal.getsignal(signal.SIGTERM), dict(os.environ)
    sys.argv = words
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = old
        signal.signal(signal.SIGTERM, old_handler)
        os.environ.clear()
        os.environ.update(environment)
    return 0


def make_small(folder: Path) -> None:
    """Make the job that `fedllm init` wrote a matter of seconds."""
    yaml = YAML(typ="safe", pure=True)
    job = yaml.load((folder / "job.yaml").read_text(encoding="utf-8"))
    job["federation"]["num_rounds"] = job["train"]["local_steps"] = 1
    job["train"]["per_device_train_batch_size"] = 4
    job["runtime"]["num_threads"] = 1
    job["evaluate"] |= {"max_new_tokens": 4, "max_examples": 2}
    with (folder / "job.yaml").open("w", encoding="utf-8") as handle:
        yaml.dump(job, handle)
    for path in folder.glob("parties/*.yaml"):
        party = yaml.load(path.read_text(encoding="utf-8"))
        if "emulator" in party:
            # What so little work makes of the emulator no policy would let out.
            margins = dict.fromkeys(("full_zs_margin", "plug_margin", "gain_margin", "thief_margin"), -99.0)
            party["emulator"] |= {"distil_steps": 2, "policy": margins | {"check_steps": 1, "thief_budgets": [1]}}
            with path.open("w", encoding="utf-8") as handle:
                yaml.dump(party, handle)
    for path in (*folder.glob("data/*/*.jsonl"), *folder.glob("data/public.jsonl")):
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:20]), encoding="utf-8")


WITH_EXAMPLES = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=page_id)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    session = Session(tmp_path)
    for block in blocks(page.read_text(encoding="utf-8")):
        session.run(block)


def test_each_tutorial_and_the_readme_have_examples_that_run() -> None:
    must = {ROOT / "README.md", *(ROOT / "docs" / "tutorials").glob("*.md")}
    assert must - set(WITH_EXAMPLES) == set()


def test_a_broken_example_is_found(tmp_path: Path) -> None:
    (block,) = blocks("<!-- test -->\n```console\n$ fedllm validate nowhere.yaml\n```\n")
    with pytest.raises(AssertionError, match="nowhere"):
        Session(tmp_path).run(block)


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the extra `docs`: make docs")
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("_build"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "html"]
    subprocess.run(command, cwd=tmp_path, check=True)
