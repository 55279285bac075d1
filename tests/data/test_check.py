from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from fedllm.cli.data import app
from fedllm.data.check import DataReport, check_data, show_tokens
from fedllm.data.formats import Example
from fedllm.data.settings import DataSettings, DataSource
from fedllm.data.tokens import tokenise
from fedllm.errors import ConfigError, FedllmError

Tok = PreTrainedTokenizerFast
Write = Callable[..., Path]
PAIRS = [{"prompt": f"question {i}: ", "completion": f"答案 {i}"} for i in range(6)]


def check(path: Path, tokenizer: Tok, settings: DataSettings | None = None, **source: Any) -> DataReport:
    return check_data(
        DataSource(train=str(path), **source), settings or DataSettings(), tokenizer, base_dir=path.parent
    )


def test_good_data_are_counted_and_not_refused(write_jsonl: Write, tokenizer: Tok) -> None:
    report = check(write_jsonl(*PAIRS), tokenizer)
    assert (report.layout, report.records, report.examples, report.refusals) == ("prompt_completion", 6, 6, ())
    assert report.tokens is not None
    assert (report.tokens.truncated, report.tokens.dropped, report.tokens.stop_trained) == (0, 0, 6)
    assert sum(count for _, _, count in report.tokens.lengths.bins) == 6
    assert report.tokens.tokens == 6 * report.tokens.lengths.median


def test_every_problem_is_found_in_one_pass(write_jsonl: Write, tokenizer: Tok) -> None:
    report = check(write_jsonl(PAIRS[0], "{", "", PAIRS[1], '{"prompt": "q"}'), tokenizer)
    assert [(p.place.number, p.why.split(":")[0]) for p in report.problems] == [
        (2, "not JSON"),
        (3, "empty line"),
        (5, "lacks `completion`"),
    ]
    assert [error.code for error in report.refusals] == ["DATA_BROKEN_LINE"]
    assert report.examples == 2
    assert report.tokens is not None, "the good lines are still looked at"


def test_repeats_and_contradictions_are_placed(write_jsonl: Write, tokenizer: Tok) -> None:
    other = PAIRS[0] | {"completion": "another answer"}
    report = check(write_jsonl(PAIRS[0], PAIRS[1], PAIRS[0], other, other), tokenizer)
    assert [place.number for place in report.repeated] == [3, 5]
    assert [place.number for place in report.contradicting] == [4]


def test_equal_plain_texts_do_not_contradict_one_another(write_jsonl: Write, tokenizer: Tok) -> None:
    report = check(write_jsonl({"text": "a"}, {"text": "b"}, {"text": "a"}), tokenizer)
    assert (len(report.repeated), report.contradicting) == (1, ())


def test_text_that_spells_a_control_token_is_placed(write_jsonl: Write, tokenizer: Tok) -> None:
    report = check(write_jsonl(PAIRS[0], {"prompt": "q", "completion": "stop <eos> here"}), tokenizer)
    assert [place.number for place in report.holding_special_tokens] == [2]


def test_what_is_cut_off_and_dropped_is_counted(write_jsonl: Write, tokenizer: Tok) -> None:
    long = [{"prompt": "q", "completion": "a b " * 50}, {"prompt": "a b " * 50, "completion": "x"}]
    report = check(write_jsonl(*PAIRS, *long), tokenizer, DataSettings(max_length=40))
    assert report.tokens is not None
    assert (report.tokens.truncated, report.tokens.dropped, report.tokens.stop_trained) == (2, 1, 6)
    assert report.tokens.lengths.longest > 40, "lengths are those before the cut"
    assert report.refusals == ()


def test_no_target_at_all_is_refused(write_jsonl: Write, tokenizer: Tok) -> None:
    report = check(write_jsonl(*PAIRS), tokenizer, DataSettings(max_length=2))
    assert [error.code for error in report.refusals] == ["DATA_NO_TARGET"]


def test_chats_without_a_template_are_refused(write_jsonl: Write, bare_tokenizer: Tok) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    report = check(write_jsonl({"messages": turns}), bare_tokenizer)
    assert [error.code for error in report.refusals] == ["DATA_NO_TEMPLATE"]
    assert report.refusals[0].where.endswith("train.jsonl:1")
    assert report.tokens is None


def test_a_template_that_writes_no_stop_token_is_told(write_jsonl: Write, tokenizer: Tok, bare_tokenizer: Tok) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_jsonl({"messages": turns})
    assert check(path, tokenizer).template_writes_stop is True
    bare_tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    report = check(path, bare_tokenizer)
    assert report.template_writes_stop is False
    assert report.tokens is not None
    assert report.tokens.stop_trained == 1
    assert check(path.parent / "train.jsonl", tokenizer).template_digest != report.template_digest


def test_previews_spell_the_example_and_mark_exactly_the_targets(write_jsonl: Write, tokenizer: Tok) -> None:
    report = check(write_jsonl(*PAIRS, {"prompt": "红色 and long: ", "completion": "长长长长"}), tokenizer)
    assert [preview.place.number for preview in report.previews] == [1, 7, 2]
    longest = report.previews[1]
    assert "".join(piece.text for piece in longest.pieces) == "红色 and long: 长长长长<eos>"
    assert "".join(piece.text for piece in longest.pieces if piece.trained) == "长长长长<eos>"
    assert longest.stop_trained


def test_tokens_that_share_a_character_are_shown_as_one(tokenizer: Tok) -> None:
    example = tokenise(Example(prompt="q", completion="龘"), tokenizer, DataSettings())
    assert len(example.input_ids) > 3
    assert [piece.text for piece in show_tokens(example, tokenizer)] == ["q", "龘", "<eos>"]


def test_json_of_a_report_holds_no_content_unless_asked(write_jsonl: Write, tokenizer: Tok) -> None:
    path = write_jsonl(
        {"prompt": "SECRET", "completion": "SECRET"}, '{"prompt": "SECRET', {"prompt": "SECRET", "completion": 1}
    )
    report = check(path, tokenizer)
    assert "SECRET" not in json.dumps(report.to_json())
    assert report.to_json()["previews"] == []
    assert "SECRET" not in repr(report)
    assert "SECRET" in "".join(p["text"] for p in report.to_json(show_rows=True)["previews"][0]["pieces"])


def test_digests_name_the_content_and_not_the_file(write_jsonl: Write, tokenizer: Tok) -> None:
    first = check(write_jsonl(*PAIRS), tokenizer)
    again = check(write_jsonl(*PAIRS, name="copy.jsonl"), tokenizer)
    other = check(write_jsonl(*PAIRS[1:], name="other.jsonl"), tokenizer)
    assert first.content_digest == again.content_digest != other.content_digest


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer: Tok, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


def command(*args: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["check", *args], env={"NO_COLOR": "1", "COLUMNS": "60"})
    if isinstance(result.exception, FedllmError):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result.stdout


def test_the_command_shows_the_mask_without_colour(write_jsonl: Write, tokenizer_folder: str) -> None:
    out = command(str(write_jsonl(*PAIRS)), "--tokenizer", tokenizer_folder)
    assert "layout prompt_completion, 6 examples" in out
    assert "training would take these data" in out
    assert "\x1b" not in out
    marked = "".join(out.split("in [[ ]]")[1].splitlines()[1:4])
    assert marked.replace("|", "").strip().startswith("question 0: [[答案 0<eos>]]")


def test_the_command_colours_the_mask_on_a_terminal(
    write_jsonl: Write, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    env = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}
    args = ["check", str(write_jsonl(*PAIRS)), "--tokenizer", tokenizer_folder]
    out = CliRunner().invoke(app, args, env=env, color=True).stdout
    assert "\x1b[4;32m" in out, "trained tokens are green and underlined"
    assert "[[" not in out


def test_the_command_exits_2_where_training_would_refuse(write_jsonl: Write, tokenizer_folder: str) -> None:
    path = write_jsonl(PAIRS[0], "", PAIRS[1])
    out = command(str(path), "--tokenizer", tokenizer_folder, exit_code=2)
    assert "line 2: empty line" in out
    assert "training would refuse these data" in out


def test_the_command_prints_the_envelope_without_content(write_jsonl: Write, tokenizer_folder: str) -> None:
    path = write_jsonl({"prompt": "SECRET", "completion": "SECRET"}, "SECRET")
    out = command(str(path), "--tokenizer", tokenizer_folder, "--json", exit_code=2)
    assert "SECRET" not in out
    envelope = json.loads(out)
    assert (envelope["status"], envelope["exit_code"]) == ("error", 2)
    assert envelope["data"]["problems"] == [
        {"file": str(path), "number": 2, "unit": "line", "why": "not JSON: Expecting value (column 1)"}
    ]
    assert envelope["data"]["previews"] == []
    shown = command(str(path), "--tokenizer", tokenizer_folder, "--json", "--show-rows", exit_code=2)
    pieces = json.loads(shown)["data"]["previews"][0]["pieces"]
    assert "".join(piece["text"] for piece in pieces if piece["trained"]) == "SECRET<eos>"


def test_the_command_maps_columns_and_cuts(write_jsonl: Write, tokenizer_folder: str) -> None:
    path = write_jsonl({"q": "one", "a": "two " * 30})
    mapping = ("--column", "prompt=q", "--column", "completion=a", "--max-length", "8", "--json")
    data = json.loads(command(str(path), "--tokenizer", tokenizer_folder, *mapping))["data"]
    assert (data["layout"], data["tokens"]["truncated"]) == ("prompt_completion", 1)


@pytest.mark.parametrize(
    ("args", "where"),
    [
        (("--column", "prompt"), "--column"),
        (("--column", "promt=q"), "--column"),
        (("--format", "mesages"), "--format"),
        (("--tokenizer", "/nowhere"), "--tokenizer"),
    ],
)
def test_the_command_refuses_bad_options(write_jsonl: Write, args: tuple[str, str], where: str) -> None:
    with pytest.raises((ConfigError, FedllmError)) as caught:
        command(str(write_jsonl(*PAIRS)), *args)
    assert caught.value.where == where
    assert caught.value.exit_code == 2


def test_no_row_can_steer_the_terminal(write_jsonl: Write, tokenizer_folder: str) -> None:
    path = write_jsonl({"prompt": "a\x1b[2Jb\u202e", "completion": "[bold]x[/bold]"})
    out = command(str(path), "--tokenizer", tokenizer_folder)
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[bold]" in out.replace("|", "").replace("\n", "")


def test_the_demo_tokenizer_is_used_by_default(write_jsonl: Write) -> None:
    assert "the demo's" in command(str(write_jsonl(*PAIRS)))
