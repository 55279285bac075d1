"""ROUGE and BLEU of completions against references, right in any script. Definitions: docs/reference/metrics.md."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedllm.errors import DataError

ROUGE_TOKENIZER = "unicode-words/1"

_ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
# Scripts written without spaces between words, by the first words of their characters' Unicode names.
_HAN = ("CJK", "IDEOGRAPHIC")
_KANA = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")
_OTHER_UNSPACED = ("THAI", "LAO", "KHMER", "MYANMAR", "TAI", "NEW TAI")


@dataclass(frozen=True)
class TextScores:
    """Scores of a set of completions, each from 0 to 100, and what is needed to compute them again."""

    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815 - the metric's own name
    bleu4: float
    bleu_signature: str
    rouge_tokenizer: str
    examples: int


class UnicodeTokenizer:
    """Words of any script, for `rouge_score.rouge_scorer.RougeScorer(tokenizer=...)`."""

    def tokenize(self, text: str) -> list[str]:
        """Return the text's words: see `rouge_tokens`."""
        return rouge_tokens(text)


def rouge_tokens(text: str) -> list[str]:
    """Return the words of a text, case-folded and in Unicode's NFKC form.

    A word is a run of letters, digits and their marks. In scripts written without spaces (Han, kana,
    Thai, Lao, Khmer, Myanmar, Tai) every character with its marks is a word, and so is every symbol
    such as an emoji. Punctuation separates; joiners, soft hyphens and direction marks are dropped.
    On ASCII text the words are those of rouge-score's own tokenizer.
    """
    words: list[str] = []
    within = False  # whether the next mark or letter goes on with the last word
    open_run = False  # whether the next letter does so too
    for char in _folded(text):
        kind = _kind(char)
        if kind == "dropped":
            continue
        if kind == "separator":
            within = open_run = False
        elif (kind == "mark" and within) or (kind == "letter" and open_run):
            words[-1] += char
        else:
            words.append(char)
            within, open_run = True, kind in ("letter", "mark")
    return words


def bleu_tokenizer(references: Iterable[str]) -> str:
    """Return the sacrebleu tokenizer for these references; none of them needs a download.

    Decided by the references alone, so that every model compared on one set gets the same:
    `zh` if most letters are Han and less than a tenth of those with kana are kana; `char` if most are
    of another script written without spaces; else `13a` if most are Latin, and `intl` if not.
    """
    scripts = Counter(_script(char) for text in references for char in _folded(text) if char.isalpha())
    letters, han, kana = scripts.total(), scripts["han"], scripts["kana"]
    if 2 * (han + kana + scripts["unspaced"]) > letters:
        return "zh" if 2 * han > letters and 10 * kana < han + kana else "char"
    return "13a" if 2 * scripts["latin"] >= letters else "intl"


def score_texts(predictions: Sequence[str], references: Sequence[str]) -> TextScores:
    """Return ROUGE-1/2/L F-measures (means over the examples) and corpus BLEU-4, all from 0 to 100.

    Where neither text of a pair has a word, ROUGE is 100 if the two are the same text and 0 if not.

    Args:
        predictions: The completions of one model.
        references: The wanted completion of each, in the same order.

    Raises:
        DataError: `DATA_EMPTY`, there is nothing to score.
        ValueError: The two differ in number.
    """
    if not references:
        raise DataError("DATA_EMPTY", "there is no completion to score", fix="give at least one example")
    rouge = _mean_rouge(predictions, references)
    bleu, signature = _corpus_bleu(predictions, references)
    return TextScores(**rouge, bleu4=bleu, bleu_signature=signature, rouge_tokenizer=ROUGE_TOKENIZER,
                      examples=len(references))  # fmt: skip


def _mean_rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE_TYPES), tokenizer=UnicodeTokenizer())
    sums = dict.fromkeys(_ROUGE_TYPES, 0.0)
    for prediction, reference in zip(predictions, references, strict=True):
        if not rouge_tokens(prediction) and not rouge_tokens(reference):
            same = float(_folded(prediction).split() == _folded(reference).split())
            sums = {name: total + same for name, total in sums.items()}
            continue
        scores = scorer.score(reference, prediction)
        sums = {name: total + scores[name].fmeasure for name, total in sums.items()}
    return {name: 100 * total / len(references) for name, total in sums.items()}


def _corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    from sacrebleu.metrics import BLEU

    # force: a model that puts a space before its full stop is scored, not warned about.
    metric = BLEU(tokenize=bleu_tokenizer(references), force=True)
    score = metric.corpus_score(list(predictions), [list(references)]).score
    return score, metric.get_signature().format()


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


@lru_cache(maxsize=65536)
def _kind(char: str) -> str:
    category = unicodedata.category(char)
    # A zero width space (U+200B) is a format character too, but it does separate words.
    if (category == "Cf" and char != "\u200b") or "VARIATION SELECTOR" in unicodedata.name(char, ""):
        return "dropped"
    if category[0] == "M":
        return "mark"
    if category[0] in "LN":
        return "single" if _script(char) in ("han", "kana", "unspaced") else "letter"
    return "single" if category == "So" else "separator"


@lru_cache(maxsize=65536)
def _script(char: str) -> str:
    name = unicodedata.name(char, "")
    first = name.split(" ")[0]
    if first in _HAN:
        return "han"
    if first in _KANA:
        return "kana"
    if name.startswith(tuple(f"{script} " for script in _OTHER_UNSPACED)):
        return "unspaced"
    return "latin" if first == "LATIN" else "other"
