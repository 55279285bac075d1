"""`fedllm data check`: what training would see of a data file, without leaving this machine."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.output import print_json
from fedllm.errors import ConfigError, ExitCode, ModelError, nearest
from fedllm.tasks import CAUSAL_LM

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from fedllm.data.check import DataReport, Lengths, Preview, TokenCounts
    from fedllm.data.files import Place
    from fedllm.data.settings import DataSettings, DataSource

app = typer.Typer(help="Look at training data before a run.", no_args_is_help=True)

_PROBLEMS_SHOWN = 20
_PLACES_SHOWN = 8
_PIECES_SHOWN = 60
_BAR_WIDTH = 32


@app.callback()
def _group() -> None:
    """Look at training data before a run."""


@app.command()
def check(  # noqa: PLR0913 - each is an option of the command
    file: Annotated[str, typer.Argument(help="Data file, folder, or hub id.", show_default=False)],
    *,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the base model's tokenizer. Default: the demo's.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example, at most.")] = 1024,
    chat_template_path: Annotated[Path | None, typer.Option(help="Jinja file, as in job.yaml.")] = None,
    format_: Annotated[str, typer.Option("--format", help="Layout of the records; auto: seen from them.")] = "auto",
    column: Annotated[
        list[str] | None, typer.Option(help="Layout's column=name in the file, e.g. prompt=question.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a folder or hub id.")] = "train",
    task: Annotated[str, typer.Option(help="What is learnt, as `data.task` in job.yaml.")] = CAUSAL_LM,
    label: Annotated[list[str] | None, typer.Option(help="A label of a classifier, once for each, in order.")] = None,
    show_rows: Annotated[bool, typer.Option("--show-rows", help="With --json: add the examples shown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, without content of rows.")] = False,
) -> None:
    """Show format, counts, lengths, duplicates, broken lines, and what exactly would be trained."""
    from fedllm.data.check import check_data

    source = _source(file, split, format_, _columns(column or []))
    settings = _settings(max_length, chat_template_path, task, label)
    with ExitStack() as files:
        folder = tokenizer or files.enter_context(_demo_tokenizer())
        report = check_data(source, settings, _load_tokenizer(folder), base_dir=Path.cwd())
    code = ExitCode.USAGE if report.refusals else ExitCode.OK
    if as_json:
        data = {"source": file, "tokenizer": str(tokenizer) if tokenizer else "demo"}
        data |= report.to_json(show_rows=show_rows)
        print_json(data, status="error" if code else "ok", exit_code=code)
    else:
        _print_report(report, file, str(tokenizer) if tokenizer else None)
    if code:
        raise typer.Exit(int(code))


def _columns(pairs: list[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for pair in pairs:
        name, equals, found = pair.partition("=")
        if not (name and equals and found) or name in columns:
            raise ConfigError(
                "BAD_VALUE",
                f"{pair!r} is not one layout's column=name in the file",
                where="--column",
                fix="write for instance --column prompt=question --column completion=answer",
            )
        columns[name] = found
    return columns


def _source(file: str, split: str, format_: str, columns: dict[str, str]) -> DataSource:
    from fedllm.data.formats import LAYOUTS
    from fedllm.data.settings import DataSource, check_columns

    if format_ not in ("auto", *LAYOUTS):
        hint = nearest(format_, ("auto", *LAYOUTS))
        raise ConfigError("BAD_VALUE", f"there is no format {format_!r}", where="--format", fix=hint)
    try:
        check_columns(format_, columns)
    except ValueError as error:
        raise ConfigError("BAD_VALUE", str(error), where="--column", fix="see docs/reference/data-formats.md") from None
    return DataSource.model_validate({"train": file, "train_split": split, "format": format_, "columns": columns})


def _settings(max_length: int, chat_template_path: Path | None, task: str, labels: list[str] | None) -> DataSettings:
    from pydantic import ValidationError

    from fedllm.data.settings import DataSettings

    path = str(chat_template_path) if chat_template_path else None
    values = {"max_length": max_length, "chat_template_path": path, "task": task, "labels": labels or None}
    try:
        return DataSettings.model_validate(values)
    except ValidationError as error:
        what = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError("BAD_VALUE", what, where="--task, --label", fix="see docs/reference/job-file.md") from None


def _demo_tokenizer() -> AbstractContextManager[Path]:
    """Return the demo's tokenizer folder, as a file system path."""
    from importlib.resources import as_file, files

    return as_file(files("fedllm") / "assets" / "demo" / "base")


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from fedllm.models.load import load_tokenizer

    if not folder.is_dir():
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"no folder {folder}",
            where="--tokenizer",
            fix="name the folder that holds tokenizer.json",
        )
    return load_tokenizer(folder)


def _print_report(report: DataReport, file: str, tokenizer: str | None) -> None:
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    console.print(
        f"{file}: layout {report.layout or 'not known'}, {report.examples} examples", style="bold", soft_wrap=True
    )
    for name, value in _facts(report, tokenizer):
        console.print(f"  {name:<18} {value}", soft_wrap=True)  # digests stay whole when copied
    if report.tokens:
        _print_lengths(console, report.tokens)
    _print_problems(console, report)
    for preview in report.previews:
        _print_preview(console, preview)
    for error in report.refusals:
        console.print(f"\nerror {error}", style="red")
    verdict = "training would refuse these data" if report.refusals else "training would take these data"
    console.print(f"\n{verdict}", style="bold red" if report.refusals else "bold green")


def _facts(report: DataReport, tokenizer: str | None) -> list[tuple[str, str]]:
    from fedllm.data.formats import show_columns

    facts = [("tokenizer", tokenizer or "the demo's; give --tokenizer for your base model's")]
    facts.append(("columns", show_columns(report.columns) or "none"))
    if report.unused_columns:
        facts.append(("not used", show_columns(report.unused_columns)))
    facts += [
        ("broken or empty", f"{len(report.problems)} of {report.records}"),
        ("repeated", _places(report.repeated)),
        ("contradicting", _places(report.contradicting, "the same question has another answer before")),
        ("special tokens", _places(report.holding_special_tokens, "text that spells a control token")),
    ]
    if report.tokens:
        facts += _token_facts(report.tokens, report.template_writes_stop)
    facts.append(("template sha256", report.template_digest or "not readable"))
    facts.append(("content sha256", report.content_digest))
    return facts


def _token_facts(tokens: TokenCounts, template_writes_stop: bool | None) -> list[tuple[str, str]]:
    stop = f"trained in {tokens.stop_trained} examples"
    if template_writes_stop is False:
        stop += "; put after the answer, the template does not write it"
    cut_off = ("cut off", f"{tokens.truncated} examples longer than max_length = {tokens.max_length}")
    if tokens.labels:
        labels = ", ".join(f"{_visible(label)} {count}" for label, count in tokens.labels.items())
        return [("tokens", str(tokens.tokens)), ("labels", labels), cut_off]
    return [
        ("tokens", f"{tokens.tokens}, of which {tokens.target_tokens} trained"),
        cut_off,
        ("dropped", f"{tokens.dropped} examples without a token to train"),
        ("stop token", stop),
    ]


def _places(places: tuple[Place, ...], meaning: str = "") -> str:
    if not places:
        return "0"
    more = ", ..." if len(places) > _PLACES_SHOWN else ""
    shown = ", ".join(str(place.number) for place in places[:_PLACES_SHOWN])
    return f"{len(places)} ({places[0].unit}s {shown}{more})" + (f": {meaning}" if meaning else "")


def _print_lengths(console: Console, tokens: TokenCounts) -> None:
    from rich.text import Text

    lengths: Lengths = tokens.lengths
    console.print(f"\nlengths in tokens: {lengths.shortest} to {lengths.longest}, median {lengths.median}")
    most = max(count for _, _, count in lengths.bins)
    digits = len(str(lengths.bins[-1][1]))
    for first, last, count in lengths.bins:
        bar = "#" * max(round(_BAR_WIDTH * count / most), min(count, 1))
        too_long = last > tokens.max_length
        line = Text(f"  {first:>{digits}} to {last:>{digits}} ")
        line.append(f"{bar:<{_BAR_WIDTH}}", style="yellow" if too_long else "cyan")
        line.append(f" {count}{'  longer than max_length' if too_long and count else ''}")
        console.print(line)


def _print_problems(console: Console, report: DataReport) -> None:
    if report.problems:
        console.print(f"\nrecords that cannot be used: {len(report.problems)}", style="bold red")
    for problem in report.problems[:_PROBLEMS_SHOWN]:
        console.print(f"  {problem.place.file}, {problem.place}: {problem.why}")
    if (more := len(report.problems) - _PROBLEMS_SHOWN) > 0:
        console.print(f"  and {more} more; --json lists all")


def _print_preview(console: Console, preview: Preview) -> None:
    cut = ", cut off" if preview.truncated else ""
    if preview.label is not None:
        label = _visible(preview.label)
        console.print(f"\n{preview.place}: {preview.num_tokens} tokens, label {label}{cut}", style="bold")
        console.print(_marked(preview, in_colour=False))
        return
    in_colour = console.color_system is not None and not console.no_color
    ends = "stop token trained" if preview.stop_trained else "stop token NOT trained"
    console.print(
        f"\n{preview.place}: {preview.num_tokens} tokens, {preview.num_targets} trained "
        f"({'underlined' if in_colour else 'in [[ ]]'}), {ends}{cut}",
        style="bold",
    )
    console.print(_marked(preview, in_colour=in_colour))


def _marked(preview: Preview, *, in_colour: bool) -> Text:
    """Return the tokens, parted by `|`, the trained ones marked; the middle of a long example is left out."""
    from rich.text import Text

    text, inside = Text("  "), False
    hidden = range(_PIECES_SHOWN, len(preview.pieces) - _PIECES_SHOWN)
    for i, piece in enumerate(preview.pieces):
        if i in hidden:
            if i == hidden.start:
                text.append(f" ... {len(hidden)} more ... ")
            continue
        if piece.trained != inside and not in_colour:
            text.append("[[" if piece.trained else "]]")
        elif i:
            text.append("|", style="dim")
        inside = piece.trained
        text.append(_visible(piece.text), style="green underline" if piece.trained else "dim")
    return text.append("]]" if inside and not in_colour else "")


def _visible(text: str) -> str:
    """Return a text with control and invisible characters spelt out, so that no row can steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
