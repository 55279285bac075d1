"""What `fedllm data check` finds out about a source. Everything stays on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.data.files import Place
from fedllm.data.formats import ColumnMap, Example, content_digest
from fedllm.data.read import Problem, Scan, scan_source
from fedllm.data.settings import DataSettings, DataSource
from fedllm.data.template import chat_template, render_ids, template_digest
from fedllm.data.tokens import TokenisedExample, no_target, prompt_ids, stop_id, tokenise
from fedllm.errors import DataError, FedllmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BINS = 10


@dataclass(frozen=True)
class Piece:
    """One token, or the few that share a character, as text. The repr shows no content."""

    text: str = field(repr=False)
    trained: bool


@dataclass(frozen=True)
class Preview:
    """One example with its mask, or its label; `stop_trained` is whether the model learns to end the answer."""

    place: Place
    num_tokens: int
    num_targets: int
    truncated: bool
    stop_trained: bool
    label: str | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens before anything is cut; `bins` are (first, last, examples)."""

    shortest: int
    median: int
    longest: int
    bins: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class TokenCounts:
    """What training would see of a source; `labels` counts a classifier's, in the job's order."""

    max_length: int
    lengths: Lengths
    tokens: int
    target_tokens: int
    truncated: int
    dropped: int
    stop_trained: int
    labels: dict[str, int]


@dataclass(frozen=True)
class DataReport:
    """All findings about a source.

    Args:
        layout: Layout found; empty when it could not be told.
        records: Records seen, the broken ones included.
        examples: Records that can be used.
        columns: Columns found; `unused_columns` those that the layout does not use.
        problems: Records that cannot be used, and why.
        repeated: Places of examples that stand before in the source, word for word.
        contradicting: Places of examples whose question stands before with another answer.
        holding_special_tokens: Places of examples whose text spells one of the tokenizer's special tokens.
        content_digest: SHA-256 over the examples in canonical form.
        template_digest: SHA-256 of the chat template; None when the template file cannot be read.
        template_writes_stop: Whether the template itself ends an answer in the stop token; None without chats.
        tokens: Counts in tokens; None when the examples could not be tokenised.
        previews: A few examples with their mask.
        refusals: Why training would refuse the source; empty when it would take it.
    """

    layout: str
    records: int
    examples: int
    columns: tuple[str, ...]
    unused_columns: tuple[str, ...]
    problems: tuple[Problem, ...]
    repeated: tuple[Place, ...]
    contradicting: tuple[Place, ...]
    holding_special_tokens: tuple[Place, ...]
    content_digest: str
    template_digest: str | None
    template_writes_stop: bool | None
    tokens: TokenCounts | None
    previews: tuple[Preview, ...]
    refusals: tuple[FedllmError, ...]

    def to_json(self, *, show_rows: bool = False) -> dict[str, Any]:
        """Return the report as JSON values: counts, places and digests, and no content of a row.

        Args:
            show_rows: Whether to add the previews, which do hold content.
        """
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["problems"] = [asdict(problem.place) | {"why": problem.why} for problem in self.problems]
        for name in ("repeated", "contradicting", "holding_special_tokens"):
            plain[name] = [asdict(place) for place in plain[name]]
        plain["tokens"] = asdict(self.tokens) if self.tokens else None
        plain["refusals"] = [
            {"code": error.code, "what": error.what, "where": error.where, "fix": error.fix} for error in self.refusals
        ]
        plain["previews"] = [asdict(preview) for preview in self.previews] if show_rows else []
        return plain


@dataclass(frozen=True)
class _Tokenised:
    """The usable examples, whole and cut, or the reason why they cannot be tokenised."""

    whole: tuple[TokenisedExample, ...] = ()
    cut: tuple[TokenisedExample, ...] = ()
    refusal: FedllmError | None = None


def check_data(
    source: DataSource,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_dir: Path,
    num_previews: int = 3,
) -> DataReport:
    """Return all that can be found out about a source's training data, problems collected and not raised.

    Args:
        source: Where the data are; `eval` is not looked at.
        settings: How they become tokens.
        tokenizer: The base model's tokenizer.
        base_dir: Where relative paths start.
        num_previews: Examples to show with their mask.

    Raises:
        DataError: The source is not there, or a file of it cannot be read at all.
    """
    columns = ColumnMap(source.format, source.columns, settings.dataset_text_field, settings.task, settings.group_by)
    scan = scan_source(source.train, base_dir=base_dir, split=source.train_split, column_map=columns)
    tokenised = _tokenise(scan, tokenizer, settings)
    refusals: list[FedllmError] = list(scan.refusals)
    if tokenised.refusal:
        refusals.append(tokenised.refusal)
    repeated, contradicting = _repeats(scan)
    return DataReport(
        layout=scan.layout,
        records=scan.num_records,
        examples=len(scan.examples),
        columns=scan.columns,
        unused_columns=scan.unused,
        problems=scan.problems,
        repeated=repeated,
        contradicting=contradicting,
        holding_special_tokens=_holding_special_tokens(scan, tokenizer),
        content_digest=content_digest(scan.examples),
        template_digest=_template_digest(tokenizer, settings),
        template_writes_stop=None if tokenised.refusal else _template_writes_stop(scan, tokenizer, settings),
        tokens=_counts(tokenised, settings, stop_id(tokenizer)) if tokenised.whole else None,
        previews=tuple(islice(_previews(scan, tokenised, tokenizer, settings), num_previews)),
        refusals=tuple(refusals),
    )


def _tokenise(scan: Scan, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> _Tokenised:
    whole: list[TokenisedExample] = []
    cut: list[TokenisedExample] = []
    for place, example in zip(scan.places, scan.examples, strict=True):
        try:
            whole.append(tokenise(example, tokenizer, settings, cut=False))
            cut.append(tokenise(example, tokenizer, settings) if _too_long(whole[-1], settings) else whole[-1])
        except DataError as error:
            where = f"{place.file}:{place.number}"
            return _Tokenised(refusal=DataError(error.code, error.what, where=where, fix=error.fix))
        except FedllmError as error:
            return _Tokenised(refusal=error)
    nothing = bool(cut) and not any(example.num_targets for example in cut)
    return _Tokenised(tuple(whole), tuple(cut), no_target(len(cut), settings.max_length) if nothing else None)


def _too_long(example: TokenisedExample, settings: DataSettings) -> bool:
    return len(example.input_ids) > settings.max_length


def _counts(tokenised: _Tokenised, settings: DataSettings, stop: int) -> TokenCounts:
    kept = [example for example in tokenised.cut if example.num_targets]
    return TokenCounts(
        max_length=settings.max_length,
        lengths=_lengths([len(example.input_ids) for example in tokenised.whole]),
        tokens=sum(len(example.input_ids) for example in kept),
        target_tokens=sum(example.num_targets for example in kept),
        truncated=sum(example.truncated for example in tokenised.cut),
        dropped=len(tokenised.cut) - len(kept),
        stop_trained=sum(_trains_stop(example, stop) for example in kept),
        labels={name: sum(example.label == i for example in kept) for i, name in enumerate(settings.label_names)},
    )


def _trains_stop(example: TokenisedExample, stop: int) -> bool:
    targets = [i for i, wanted in enumerate(example.loss_mask) if wanted]
    return bool(targets) and example.input_ids[targets[-1]] == stop


def _lengths(lengths: Sequence[int]) -> Lengths:
    ordered = sorted(lengths)
    low, high = ordered[0], ordered[-1]
    width = max(1, -(-(high - low + 1) // _BINS))
    bins = [
        (start, start + width - 1, sum(start <= length < start + width for length in ordered))
        for start in range(low, high + 1, width)
    ]
    return Lengths(low, ordered[len(ordered) // 2], high, tuple(bins))


def _repeats(scan: Scan) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """Return places of (exact repeats, known questions with another answer)."""
    seen: set[Example] = set()
    asked: set[Any] = set()
    repeated, contradicting = [], []
    for place, example in zip(scan.places, scan.examples, strict=True):
        if example in seen:
            repeated.append(place)
        elif example.question is not None and example.question in asked:
            contradicting.append(place)
        seen.add(example)
        asked.add(example.question)
    return tuple(repeated), tuple(contradicting)


def _holding_special_tokens(scan: Scan, tokenizer: PreTrainedTokenizerBase) -> tuple[Place, ...]:
    """Return places of texts that the tokenizer would read as control tokens rather than as text."""
    special = [token for token in tokenizer.all_special_tokens if token]
    return tuple(
        place
        for place, example in zip(scan.places, scan.examples, strict=True)
        if any(token in text for text in example.strings() for token in special)
    )


def _template_digest(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> str | None:
    try:
        return template_digest(tokenizer, settings)
    except FedllmError:
        return None


def _template_writes_stop(scan: Scan, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> bool | None:
    chat = next((example for example in scan.examples if example.messages), None)
    template = chat_template(tokenizer, settings) if chat else None
    if chat is None or template is None:
        return None
    given = prompt_ids(chat, tokenizer, settings)
    return stop_id(tokenizer) in render_ids(tokenizer, template, chat.messages)[len(given) :]


def _previews(
    scan: Scan, tokenised: _Tokenised, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> Iterator[Preview]:
    """Yield the first, the longest and the shortest example, then those that follow."""
    if not tokenised.cut:
        return
    by_length = sorted(range(len(tokenised.whole)), key=lambda i: len(tokenised.whole[i].input_ids))
    chosen = dict.fromkeys([0, by_length[-1], by_length[0], *range(len(tokenised.cut))])
    for i in chosen:
        yield _preview(scan.places[i], tokenised.cut[i], tokenizer, settings.label_names)


def _preview(
    place: Place, example: TokenisedExample, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]
) -> Preview:
    return Preview(
        place=place,
        num_tokens=len(example.input_ids),
        num_targets=example.num_targets,
        truncated=example.truncated,
        stop_trained=_trains_stop(example, stop_id(tokenizer)),
        label=None if example.label is None else labels[example.label],
        pieces=tuple(show_tokens(example, tokenizer)),
    )


def show_tokens(example: TokenisedExample, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Return an example's tokens as text, each marked as trained or not.

    A character can be spread over several tokens; those come as one piece, if they are trained alike.

    Args:
        example: The example.
        tokenizer: The base model's tokenizer.
    """
    pieces: list[Piece] = []
    before: list[int] = []
    group: list[int] = []
    ids, mask = example.input_ids, example.loss_mask
    for i, token in enumerate(ids):
        group.append(token)
        text = _decode(before + group, tokenizer)[len(_decode(before, tokenizer)) :]
        last = i + 1 == len(ids) or mask[i + 1] != mask[i]
        if not text.endswith("\ufffd") or len(group) == 4 or last:
            pieces.append(Piece(text, mask[i]))
            before, group = group, []
    return pieces


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text
