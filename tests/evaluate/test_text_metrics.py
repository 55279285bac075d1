"""Text scores: hand-computed values, other scripts, and equality with the libraries' own tokenizers."""

# ruff: noqa: RUF001 - other scripts are what is tested

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer, tokenizers

from fedllm.errors import DataError
from fedllm.evaluate.text_metrics import ROUGE_TOKENIZER, bleu_tokenizer, rouge_tokens, score_texts

CHINESE = "这件红色连衣裙采用丝绸面料，优雅大方。"
ARABIC = "هذا الفستان الأحمر مصنوع من الحرير، أنيق جدًا؟"
GERMAN = "Das rote Kleid „Größe S“ ist aus Seide – schön und süß."
THAI = "ชุดเดรสสีแดงทำจากผ้าไหม"
JAPANESE = "この赤いドレスはシルクで作られています。"
HINDI = "यह लाल पोशाक रेशम से बनी है।"


@pytest.mark.parametrize("text", [CHINESE, ARABIC, GERMAN, THAI, JAPANESE, HINDI])
def test_a_sentence_against_itself_scores_100_in_any_script(text: str) -> None:
    scores = score_texts([text], [text])
    assert [scores.rouge1, scores.rouge2, scores.rougeL] == pytest.approx([100, 100, 100])
    assert scores.bleu4 == pytest.approx(100)


def test_english_rouge_equals_the_value_by_hand() -> None:
    # prediction "the cat lay on the mat": 6 words, 5 bigrams; reference "the cat sat on the mat": the same.
    # Common words: the the cat on mat = 5. Bigrams: the-cat on-the the-mat = 3. Longest common run: 5.
    scores = score_texts(["The cat lay on the mat!"], ["The cat sat on the mat."])
    assert [scores.rouge1, scores.rouge2, scores.rougeL] == pytest.approx([500 / 6, 60, 500 / 6])


def test_unequal_lengths_give_the_f_measure_by_hand() -> None:
    # 2 of 4 predicted words, 2 of 2 reference words: P = 1/2, R = 1, F = 2/3. Bigram: P = 1/3, R = 1, F = 1/2.
    scores = score_texts(["a red dress b"], ["red dress"])
    assert [scores.rouge1, scores.rouge2, scores.rougeL] == pytest.approx([200 / 3, 50, 200 / 3])


def test_chinese_rouge_counts_characters() -> None:
    # 红色连衣裙 / 红色短裙: common 红 色 裙, P = 3/5, R = 3/4, F = 2/3; bigram 红色: P = 1/4, R = 1/3, F = 2/7.
    scores = score_texts(["红色连衣裙。"], ["红色短裙"])
    assert [scores.rouge1, scores.rouge2, scores.rougeL] == pytest.approx([200 / 3, 200 / 7, 200 / 3])


def test_arabic_rouge_counts_words_and_ignores_punctuation() -> None:
    # 3 words each, two in common and in order; the Arabic comma and question mark are no words.
    scores = score_texts(["الفستان الأحمر، جميل؟"], ["الفستان الأحمر طويل"])
    assert [scores.rouge1, scores.rouge2, scores.rougeL] == pytest.approx([200 / 3, 50, 200 / 3])


def test_german_words_keep_their_umlauts_whole() -> None:
    assert rouge_tokens(GERMAN) == [
        "das",
        "rote",
        "kleid",
        "grösse",
        "s",
        "ist",
        "aus",
        "seide",
        "schön",
        "und",
        "süss",
    ]
    assert rouge_tokens("STRASSE") == rouge_tokens("Straße")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cafe\u0301 ｆｕｌｌ １２３", ["café", "full", "123"]),  # NFKC: composed marks, wide forms
        ("مُحَمَّد", ["مُحَمَّد"]),  # vowel marks stay in the word
        ("می\u200cخواهم", ["میخواهم"]),  # a joiner does not cut a word
        ("น้ำ", ["น\u0e49\u0e4d", "า"]),  # a Thai letter with its marks
        ("ドレス5着", ["ド", "レ", "ス", "5", "着"]),
        ("GPT用の", ["gpt", "用", "の"]),
        ("wow 👍🎉!", ["wow", "👍", "🎉"]),
        ("❤\ufe0f", ["❤"]),
        ("हिन्दी", ["हिन्दी"]),
        ("?! …", []),
        ("", []),
    ],
)
def test_words_of_other_scripts(text: str, words: list[str]) -> None:
    assert rouge_tokens(text) == words


@given(st.text(alphabet=string.printable), st.text(alphabet=string.printable))
def test_on_ascii_words_and_scores_are_those_of_rouge_score(prediction: str, reference: str) -> None:
    theirs = tokenizers.DefaultTokenizer()
    assert rouge_tokens(prediction) == theirs.tokenize(prediction)
    if theirs.tokenize(prediction) or theirs.tokenize(reference):
        expected = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=theirs).score(
            reference, prediction
        )
        scores = score_texts([prediction], [reference])
        assert scores.rouge1 == pytest.approx(100 * expected["rouge1"].fmeasure)
        assert scores.rouge2 == pytest.approx(100 * expected["rouge2"].fmeasure)
        assert scores.rougeL == pytest.approx(100 * expected["rougeL"].fmeasure)


@given(st.text())
def test_any_text_against_itself_scores_100(text: str) -> None:
    assert score_texts([text], [text]).rougeL == pytest.approx(100)


def test_scores_are_means_over_the_examples() -> None:
    scores = score_texts(["red dress", "nothing"], ["red dress", "blue coat"])
    assert (scores.rougeL, scores.examples) == (pytest.approx(50), 2)


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge"),
    [("", "red dress", 0), ("red dress", "", 0), ("", "", 100), ("!?", "!?", 100), ("!?", "...", 0), ("👍", "👍", 100)],
)
def test_texts_without_words(prediction: str, reference: str, rouge: float) -> None:
    assert score_texts([prediction], [reference]).rougeL == pytest.approx(rouge)


def test_corpus_bleu_equals_the_value_by_hand() -> None:
    # 5 of 5 words, 4 of 4, 3 of 3, 2 of 2 n-grams match; reference has 6: brevity penalty exp(1 - 6/5).
    scores = score_texts(["the cat sat on the"], ["the cat sat on the mat"])
    assert scores.bleu4 == pytest.approx(100 * 2.718281828459045 ** (-1 / 5))
    assert scores.bleu_signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert scores.rouge_tokenizer == ROUGE_TOKENIZER


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (CHINESE, "zh"),
        ("这件 iPhone 手机壳采用硅胶材质", "zh"),
        (JAPANESE, "char"),
        (THAI, "char"),
        (ARABIC, "intl"),
        (HINDI, "intl"),
        ("Красное платье", "intl"),
        (GERMAN, "13a"),
        ("The red dress 红", "13a"),
        ("12 %", "13a"),
        ("", "13a"),
    ],
)
def test_bleu_tokenizer_follows_the_script_of_the_references(text: str, name: str) -> None:
    assert bleu_tokenizer([text]) == name


def test_predictions_do_not_change_the_bleu_tokenizer() -> None:
    assert "tok:zh" in score_texts(["english only"], [CHINESE]).bleu_signature


def test_scoring_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    score_texts(["it is tokenized ."] * 200, ["it is tokenized ."] * 200)
    assert caplog.text == ""


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match="DATA_EMPTY"):
        score_texts([], [])


def test_unequal_numbers_are_an_error() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        score_texts(["a"], ["a", "b"])
