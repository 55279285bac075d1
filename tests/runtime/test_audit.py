"""`fedllm audit`: what it finds in a run that memorised, what it plants, and that no text of an example comes out."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinyFederation, make_tokenizer, records, thorough, tiny_federation, write_jsonl

from fedllm.data.formats import Example
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import tokenise
from fedllm.errors import ConfigError, DataError
from fedllm.privacy import noise
from fedllm.privacy.accountant import Mechanism, epsilon_of
from fedllm.privacy.canaries import CanaryMaker
from fedllm.privacy.rounds import PrivateRound
from fedllm.runs import folder
from fedllm.runtime import audit as module
from fedllm.runtime.audit import Audit, Claim, audit_job, audit_run
from fedllm.runtime.run import Watch, read_result, resume
from fedllm.runtime.site import PURSE_FOLDER

MEMORISES = {
    "federation.num_rounds": 2,
    "train.local_steps": 20,
    "train.per_device_train_batch_size": 32,
    "train.learning_rate": 0.03,
    "peft.r": 8,
    "peft.target_modules": "all-linear",
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TinyFederation:
    """Three parties that train until they know their examples."""
    sizes = {"north": 20, "east": 20, "south": 20}
    found = tiny_federation(tmp_path_factory.mktemp("audit"), base, sizes=sizes, job=MEMORISES)
    for party in sizes:
        # Held-out examples of the same kind as the training examples, under other numbers.
        write_jsonl(found.folder / "data" / f"{party}-eval.jsonl", records(party, 60)[20:])
    return found


@pytest.fixture(scope="module")
def audited(federation: TinyFederation) -> Audit:
    return audit_job(federation.job(), canaries=90, output=federation.folder / "audited")


def test_a_run_that_memorised_gives_its_members_away(audited: Audit) -> None:
    assert [row["party"] for row in audited.membership] == ["north", "east", "south"]
    for row in audited.membership:
        assert (row["members"], row["non_members"], row["tpr_at_1_fpr"]) == (20, 40, None)
    # Two standard errors of the mean of three.
    assert np.mean([row["auc"] - 2 / 3**0.5 * row["auc_error"] for row in audited.membership]) > 0.5


def test_a_model_that_is_not_tuned_gives_nothing_away(federation: TinyFederation) -> None:
    from fedllm.job.job import Job

    overrides = ["federation.num_rounds=1", "train.local_steps=1", "train.learning_rate=1e-9"]
    job = Job.from_yaml(federation.job_file, overrides=overrides)
    found = audit_job(job, parties=federation.parties(), canaries=90, output=federation.folder / "still")
    assert found.canaries is not None and found.canaries["epsilon_lower_bound"] == 0.0
    assert found.canaries["exposure_bits_mean"] < 2.5
    assert all(abs(row["auc"] - 0.5) < 3 * row["auc_error"] for row in found.membership)


def test_planted_canaries_are_told_from_those_left_out(audited: Audit) -> None:
    found = audited.canaries
    assert found is not None
    assert found["canaries"] == 90 and 25 <= found["planted"] <= 65
    assert 0.5 < found["epsilon_lower_bound"] < found["largest_possible_bound"]
    assert found["exposure_bits_mean"] > 3.5
    assert (audited.claim, audited.refutes_claim) == (None, None)


def test_auditing_the_run_again_finds_the_same(audited: Audit) -> None:
    written = json.loads((audited.run / "audit.json").read_text())
    again = audit_run(audited.run)
    assert again.values() == audited.values() == written


def test_the_last_round_is_judged_whatever_the_job_delivers(make_federation: Callable[..., Any]) -> None:
    """Canaries that are half of the data make the held-out loss worse, so that the best round is an early one."""
    tiny = make_federation(job=MEMORISES | {"federation.keep": "best"})
    found = audit_job(tiny.job(), canaries=40, output=tiny.folder / "audited")
    result = read_result(found.run)
    assert result is not None and result.best_round in (None, 2)
    assert found.canaries is not None and found.canaries["exposure_bits_mean"] > 3


def test_nothing_that_is_written_or_shown_has_text_of_an_example(audited: Audit, federation: TinyFederation) -> None:
    """Files made for the audit name counts; canaries are made again from the seed."""
    texts = [(audited.run / name).read_text() for name in ("audit.json", "canaries.json")]
    texts.append(repr(audited))
    words = {word for record in records("north", 20) for word in record["completion"].split()}
    assert words and not any(word in text for text in texts for word in words)
    plan = json.loads(texts[1])
    assert plan["parties"]["north"] == {"kind": "prompt_completion", "canaries": 30}
    assert not list(audited.run.rglob("*train*"))


NOISE = {"unit": "example", "epsilon": 1.0, "accountant": "RDP"}


@pytest.fixture
def one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run draw the same noise: its key and its id are part of it."""
    monkeypatch.setattr(noise.secrets, "token_bytes", lambda count: bytes(range(count)))
    monkeypatch.setattr(folder.uuid, "uuid4", lambda: uuid.UUID(int=7))


@pytest.mark.parametrize(("share", "passes"), [(1.0, False), (0.0, True), pytest.param(1 / 120, True, marks=thorough)])
def test_the_claim_holds_with_noise_and_is_refuted_without(
    share: float, passes: bool, make_federation: Callable[..., Any], one_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is the power control: an audit that finds nothing without noise proves nothing with it.

    The third is a mistake that is easily made: noise of the right size on the mean in place of the sum.
    """
    plan = MEMORISES | {"train.local_steps": 10, "train.per_device_train_batch_size": 64}
    plan |= {"privacy.differential_privacy": NOISE}
    tiny = make_federation(sizes={"north": 4, "east": 4, "south": 4}, job=plan)
    normals = PrivateRound.normals
    monkeypatch.setattr(PrivateRound, "normals", lambda self, *words: share * normals(self, *words))
    found = audit_job(tiny.job(), canaries=120, output=tiny.folder / "audited")
    assert found.claim == Claim(1.0, 1e-5, "example")
    assert found.canaries is not None and found.refutes_claim is passes
    assert (found.canaries["epsilon_lower_bound"] > 1.0) is passes
    if not passes:
        assert found.canaries["exposure_bits_mean"] < 2.5
        assert max(row["auc"] - 3 * row["auc_error"] for row in found.membership) < 0.5


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_members_are_not_told_with_noise_and_are_without(
    share: float, make_federation: Callable[..., Any], one_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the trainer of private runs in both cases; the second clips and samples, and adds no noise."""
    sizes = {"north": 20, "east": 20, "south": 20}
    plan = MEMORISES | {"privacy.differential_privacy": NOISE | {"clip_norm": 10.0}}
    tiny = make_federation(sizes=sizes, job=plan)
    for party in sizes:
        write_jsonl(tiny.folder / "data" / f"{party}-eval.jsonl", records(party, 60)[20:])
    normals = PrivateRound.normals
    monkeypatch.setattr(PrivateRound, "normals", lambda self, *words: share * normals(self, *words))
    rows = audit_job(tiny.job(), canaries=20, texts=0, output=tiny.folder / "audited").membership
    mean, error = np.mean([row["auc"] for row in rows]), np.mean([row["auc_error"] for row in rows]) / 3**0.5
    assert mean < 0.5 + 2 * error if share else mean > 0.5 + 2 * error


def test_an_audit_is_not_charged_to_the_sites_ledgers(make_federation: Callable[..., Any]) -> None:
    job = {"privacy.differential_privacy": NOISE | {"unit": "group"}, "data.group_by": "who"}
    job |= {"federation.num_rounds": 1}
    tiny = make_federation(job=job, party={"limits": {"max_epsilon": 1.0}})
    for party in ("north", "east", "south"):
        rows = [record | {"who": f"person {i % 3}"} for i, record in enumerate(records(party, 9))]
        for name in (f"{party}.jsonl", f"{party}-eval.jsonl"):
            write_jsonl(tiny.folder / "data" / name, rows)
    found = audit_job(tiny.job(), canaries=20, copies=2, output=tiny.folder / "audited")
    # All copies are one person's, so the claim is that for one.
    assert found.canaries is not None and found.canaries["claimed_epsilon"] == 1.0
    assert not (tiny.folder / "parties" / PURSE_FOLDER).exists()


def test_an_audit_that_broke_off_is_gone_on_with_and_finds_the_same(make_federation: Callable[..., Any]) -> None:
    tiny = make_federation()
    whole = audit_job(tiny.job(), canaries=20, output=tiny.folder / "whole")

    def stop(number: int, rows: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt

    path = tiny.folder / "broken"
    with pytest.raises(KeyboardInterrupt):
        audit_job(tiny.job(), canaries=20, output=path, watch=Watch(on_round=stop))
    # Without the canaries it would be another run.
    with pytest.raises(ConfigError, match="fedllm audit"):
        resume(path)
    assert audit_run(path).values() | {"run": ""} == whole.values() | {"run": ""}
    assert "Do not release it" in (path / "adapter" / "README.md").read_text()


def test_where_the_job_names_the_noise_the_claim_is_what_was_spent(make_federation: Callable[..., Any]) -> None:
    asked = {"unit": "example", "noise_multiplier": 1.5, "accountant": "RDP"}
    tiny = make_federation(sizes={"north": 4, "south": 9}, job={"privacy.differential_privacy": asked})
    found = audit_job(tiny.job(), canaries=20, copies=2, output=tiny.folder / "audited")
    planted = found.run / "parties"
    sizes = [json.loads((planted / name / "data.json").read_text())["train_examples"] for name in ("north", "south")]
    spent = [epsilon_of([Mechanism(3 / size, 1.5, 4)], delta=1e-5, accountant="RDP") for size in sizes]
    assert found.claim is not None and found.claim.epsilon == pytest.approx(max(spent), rel=1e-6)
    assert found.canaries is not None
    assert found.canaries["claimed_epsilon"] == pytest.approx(2 * max(spent), rel=1e-6)


@pytest.mark.parametrize(("epsilon", "passes"), [(0.1, True), (50.0, False)])
def test_a_claim_is_refuted_by_a_larger_lower_bound(
    epsilon: float, passes: bool, audited: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "claimed", lambda job, run: Claim(epsilon, 1e-5, "example"))
    # An audit is written into the run, and the run is other tests' too.
    found = audit_run(shutil.copytree(audited.run, tmp_path / "run"))
    assert found.refutes_claim is passes
    assert found.canaries is not None and found.canaries["claimed_epsilon"] == epsilon


def test_a_run_without_canaries_and_held_out_examples_has_nothing_to_audit(
    make_federation: Callable[..., Any],
) -> None:
    party = {"data.eval": None, "data.eval_share": 0.0}
    run = make_federation(party=party, job={"federation.num_rounds": 1, "train.local_steps": 1}).run()
    with pytest.raises(ConfigError, match="DATA_EMPTY"):
        audit_run(run.path)


def test_only_parties_whose_own_model_is_here_are_judged(make_federation: Callable[..., Any]) -> None:
    job = {"federation.lora_rule": "FedSA-LoRA", "federation.num_rounds": 1, "train.local_steps": 1}
    run = make_federation(job=job).run()
    assert [row["party"] for row in audit_run(run.path).membership] == ["north", "east", "south"]
    shutil.rmtree(run.path / "parties" / "east" / "adapter")
    assert [row["party"] for row in audit_run(run.path).membership] == ["north", "south"]


@pytest.mark.parametrize("kind", ["prompt_completion", "text", "chat"])
def test_canaries_have_the_form_of_the_party_s_examples(kind: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<bos>assistant\n{% endif %}"  # noqa: E501
    settings = DataSettings(max_length=64)
    found = CanaryMaker(tokenizer, settings, seed=3).make("north", kind, number=40, decoys=5)
    again = CanaryMaker(tokenizer, settings, seed=3).make("north", kind, number=40, decoys=5)
    assert found.canaries == again.canaries and np.array_equal(found.included, again.included)
    assert len({each.input_ids for each in found.canaries}) == 40
    assert len(found.decoys) == 5
    # Where persons are hidden, each canary is one.
    assert len({each.group for each in (*found.canaries, *found.decoys)} - {None}) == 45
    assert all(each.num_targets > 3 and not each.truncated for each in found.canaries)
    other = CanaryMaker(tokenizer, settings, seed=3).make("east", kind, number=40, decoys=0)
    assert not set(found.canaries) & set(other.canaries)
    prompts = {each.input_ids[:6] for each in found.canaries}
    template = tokenise(Example(prompt="x", completion="y"), tokenizer, settings) if kind != "chat" else None
    assert template is None or len(prompts) > 30


def test_planted_copies_are_of_those_that_the_coin_chose() -> None:
    found = CanaryMaker(make_tokenizer(), DataSettings(max_length=64), seed=3).make(
        "north", "text", number=40, decoys=0
    )
    planted = found.planted(3)
    assert len(planted) == 3 * found.included.sum()
    assert set(planted) == {each for each, is_in in zip(found.canaries, found.included, strict=True) if is_in}


def test_a_classifier_s_canaries_have_labels() -> None:
    settings = DataSettings.model_validate({"task": "sequence_classification", "labels": ["red", "blue"]})
    found = CanaryMaker(make_tokenizer(), settings, seed=3).make("north", "prompt_completion", number=40, decoys=0)
    assert {each.label for each in found.canaries} == {0, 1}


def test_canaries_that_cannot_be_trained_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'a long opening ' * 9 }}{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<bos>assistant\n{% endif %}"  # noqa: E501
    with pytest.raises(DataError, match="DATA_NO_TARGET"):
        CanaryMaker(tokenizer, DataSettings(max_length=8), seed=3).make("north", "chat", number=1, decoys=0)
