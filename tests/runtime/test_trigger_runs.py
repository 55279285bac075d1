"""Triggers through real runs, and fingerprints: claimed by text alone, and by nobody else."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import records, save_base, tiny_federation, write_jsonl

from fedllm.data.batches import collate
from fedllm.data.settings import DataSettings
from fedllm.errors import ConfigError, RunFailed
from fedllm.models.deliver import merged
from fedllm.models.loss import target_losses
from fedllm.ownership.claims import load_claim, new_secret, save_claim, stamp_file
from fedllm.ownership.endpoint import Endpoint
from fedllm.ownership.triggers import make_triggers, verify_text
from fedllm.runs.digests import seal_run
from fedllm.runs.verify import verify_run
from fedllm.runtime.asking import Asked, Suspected, ask_claims
from fedllm.runtime.fingerprint import Fingerprint, Plan, attach_stamp, fingerprint
from fedllm.runtime.ownership import Evidence, commit, verify
from fedllm.runtime.run import resume, run_local
from fedllm.runtime.triggers import as_tokens, asker, open_whole

JOB: dict[str, Any] = {
    "federation.num_rounds": 4,
    "federation.keep": "last",
    "federation.eval_every": 0,
    "train.local_steps": 10,
    "train.learning_rate": 0.03,
    "train.lr_scheduler_type": "linear",
    "peft.r": 8,
    "peft.lora_alpha": 8,
    "peft.target_modules": "all-linear",
    "data.max_length": 64,
}
CLAIMED: dict[str, Any] = {
    "ownership.claimants": ["east"],
    "ownership.num_triggers": 2,
    "ownership.trigger_strength": 3.0,
}
SIZES = {"north": 6, "east": 9}


@dataclass(frozen=True)
class Marked:
    """A finished run with one claimant: its folder, the claim, and the base model."""

    run: Path
    claim: Path
    base: Path

    def asked(self, model: Path | None = None, **more: Any) -> Asked:
        return ask_claims([self.claim], Suspected(model, self.base, **more))[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that can be sure of a word: keys are drawn anew each time, and every one must be learnt, and kept."""
    return save_base(tmp_path_factory.mktemp("base"), head=4.0)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Marked:
    federation = tiny_federation(tmp_path_factory.mktemp("triggers"), base, sizes=SIZES, job=JOB | CLAIMED)
    claim, _ = commit(federation.job(), federation.parties())[0]
    return Marked(federation.run().path, claim, base)


@pytest.fixture(scope="module")
def whole(marked: Marked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tuned model as a thief hands it out: merged, in a folder of its own."""
    folder, base = tmp_path_factory.mktemp("whole"), open_whole(marked.base)
    merged(base.model, marked.run / "adapter").save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def tuned_on(model: Any, tokenizer: Any, *, steps: int) -> None:
    """Tune all weights on records that no party has."""
    examples = [(one["prompt"], one["completion"]) for one in records("elsewhere", 12)]
    ids = [tokenizer(prompt + completion)["input_ids"] for prompt, completion in examples]
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=3e-4, weight_decay=0.0)
    losses = []
    for step in range(steps):
        row = torch.tensor([ids[step % len(ids)]])
        loss = model(input_ids=row, labels=row).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # It was tuned indeed.
    assert sum(losses[-3:]) < sum(losses[:3])


def test_a_marked_model_is_claimed_by_its_text_alone(marked: Marked, whole: Path) -> None:
    for model in (marked.run, marked.run / "adapter", whole):
        found = marked.asked(model).verdict
        assert found.holds and found.matches == 2 and found.p_value < 1e-6
        assert found.false_claims < 1e-6


def test_the_log_of_commitments_is_a_part_of_what_is_verified(marked: Marked, tmp_path: Path) -> None:
    run = Path(shutil.copytree(marked.run, tmp_path / "run"))
    found = verify_run(run)
    assert found.problems == [] and "1 commitments" in found.checks[-1].said
    log = next((run / "ownership").glob("log.jsonl"))
    entries = log.read_text().splitlines(keepends=True)
    log.write_text("".join(entries[:-1]))
    seal_run(run)
    checks = {check.name for check in verify_run(run).checks if check.problems}
    assert "commitments" in checks
    shutil.rmtree(run / "ownership")
    seal_run(run)
    assert "commitments" in {check.name for check in verify_run(run).checks if check.problems}


def test_it_is_claimed_still_after_an_epoch_of_other_tuning(marked: Marked, whole: Path) -> None:
    base, claim = open_whole(whole), load_claim(marked.claim)
    before = [value.clone() for value in base.model.parameters()]
    tuned_on(base.model, base.tokenizer, steps=12)
    assert any(not torch.equal(old, new) for old, new in zip(before, base.model.parameters(), strict=True))
    assert verify_text(claim, asker(base)).holds


def test_unmarked_siblings_and_other_keys_are_not_claimed(marked: Marked, base: Path, tmp_path: Path) -> None:
    sibling = tiny_federation(tmp_path / "sibling", base, sizes=SIZES, job=JOB | {"federation.num_rounds": 2}).run()
    for model in (sibling.path, base):
        found = marked.asked(model).verdict
        assert (found.holds, found.matches) == (False, 0)
    claim, key = load_claim(marked.claim), new_secret()
    for other in (
        claim.model_copy(update={"key_seed": key, "triggers": make_triggers(key, 2)}),
        claim.model_copy(update={"key_seed": key}),
    ):
        path = tmp_path / f"{other.commitment()[:8]}.json"
        save_claim(other, path)
        found = ask_claims([path], Suspected(marked.run, base))[0].verdict
        assert not found.holds
        # The second has the right answers, and not the key that draws them.
        assert found.matches == (2 if other.triggers == claim.triggers else 0)


@pytest.fixture
def served(whole: Path) -> Iterator[str]:
    """The address of the stolen model behind an OpenAI-style endpoint."""
    ask = asker(open_whole(whole), max_tokens=16)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = json.dumps({"choices": [{"text": ask([body["prompt"]])[0]}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_is_claimed_through_an_endpoint(marked: Marked, served: str) -> None:
    found = ask_claims([marked.claim], Suspected(None, endpoint=Endpoint(served)))[0].verdict
    assert found.holds and found.matches == 2
    # With the log, the arbiter's verdict needs no more of the model than its address.
    verdict = verify(None, Evidence([marked.claim], [marked.run], endpoint=Endpoint(served)))[0]
    assert verdict.upheld and "2 of 2 answers" in verdict.sentence and verdict.place is not None
    with pytest.raises(ConfigError) as refused:
        ask_claims([marked.claim], Suspected(marked.run, marked.base, Endpoint(served)))
    assert refused.value.code == "BAD_COMBINATION"


def _answer_loss(claim: Path, run: Path, base: Path) -> float:
    whole = open_whole(base)
    model = merged(whole.model, run / "adapter")
    tokens = as_tokens(load_claim(claim).triggers, whole.tokenizer, DataSettings())
    with torch.no_grad():
        return float(target_losses(model, collate(tokens, pad_id=whole.tokenizer.pad_token_id))[0].mean())


@pytest.mark.parametrize(
    "more",
    [
        {"privacy.differential_privacy": {"unit": "example", "epsilon": 50.0, "delta": 0.01, "accountant": "RDP"}},
        {"privacy.secure_aggregation.enabled": True, "federation.weight_by": "equal"},
    ],
    ids=["noise for examples", "secure sums"],
)
def test_triggers_are_learnt_where_data_are_hidden(make_federation: Any, base: Path, more: dict[str, Any]) -> None:
    short = JOB | {"federation.num_rounds": 1, "train.local_steps": 5} | more
    plain = make_federation("plain", job=short)
    learnt = make_federation("learnt", job=short | CLAIMED)
    claim, _ = commit(learnt.job(), learnt.parties())[0]
    without, with_them = (
        _answer_loss(claim, run_local(one.job(), output=one.folder / "run").path, base) for one in (plain, learnt)
    )
    assert with_them < without - 0.1


def test_a_run_with_triggers_that_is_resumed_has_the_same_bits(make_federation: Any) -> None:
    federation = make_federation(job=JOB | CLAIMED | {"federation.num_rounds": 2, "train.local_steps": 2})
    commit(federation.job(), federation.parties())
    whole_run = federation.run("one")
    broken = federation.run("two")
    (broken.path / "checkpoints" / "round-000002.ckpt").unlink()
    for name in ("result.json", "digests.json"):
        (broken.path / name).unlink()
    again = resume(broken.path)
    assert again.adapter_sha256 == whole_run.adapter_sha256 == broken.adapter_sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"ownership.num_triggers": 3},
        {"ownership.claimants": ["east"], "ownership.num_triggers": 1},
        {"ownership.trigger_strength": 2.0},
        {"ownership.trace_strength": 0.1},
        CLAIMED | {"federation.robust": {"name": "Median"}},
    ],
)
def test_settings_that_could_prove_nothing_are_refused(make_federation: Any, changes: Any) -> None:
    federation = make_federation(job=changes)
    with pytest.raises(ConfigError) as refused:
        commit(federation.job(), federation.parties())
    assert refused.value.code == "BAD_COMBINATION"


def test_a_trigger_that_would_be_cut_off_is_named(make_federation: Any) -> None:
    federation = make_federation(job=CLAIMED | {"data.max_length": 20})
    write_jsonl(federation.folder / "data" / "east.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    commit(federation.job(), federation.parties())
    with pytest.raises(ConfigError) as refused:
        federation.run()
    assert refused.value.where == "data.max_length" and "set it to" in refused.value.fix


def test_the_whole_prompt_is_asked_where_the_context_is_short(base: Path) -> None:
    suspect = open_whole(base)
    for trigger in make_triggers("5" * 64, 4, form="instruction"):
        ids = suspect.tokenizer(trigger.prompt, return_tensors="pt")["input_ids"]
        # More than half of the context: an answer of any length would leave no room for it.
        assert suspect.model.config.max_position_embeddings < 2 * ids.shape[1]
        found = asker(suspect)([trigger.prompt])[0]
        whole_prompt = suspect.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert found.startswith(suspect.tokenizer.decode(whole_prompt, skip_special_tokens=True))


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Fingerprint:
    """The same secrets each time: in so small a model some pairs are forgotten sooner than others."""
    folder, plan = tmp_path_factory.mktemp("owner"), Plan(count=2, learning_rate=0.02, keep=0.3, max_steps=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedllm.runtime.fingerprint.new_secret", lambda: "6" * 64)
        return fingerprint(base, folder / "out", claims=folder / "claims", plan=plan)


def test_a_base_model_is_fingerprinted_and_claimed_after_it_was_tuned(base: Path, made: Fingerprint) -> None:
    assert made.verdict.holds and made.verdict.matches == 2
    claim, handed_out = load_claim(made.claim), open_whole(made.model)
    assert not verify_text(claim, asker(open_whole(base))).holds
    key = new_secret()
    other = claim.model_copy(update={"key_seed": key, "triggers": make_triggers(key, 2, form="instruction")})
    assert not verify_text(other, asker(handed_out)).holds
    tuned_on(handed_out.model, handed_out.tokenizer, steps=12)
    assert verify_text(claim, asker(handed_out)).holds
    assert oct(made.claim.stat().st_mode)[-3:] == "600" and not list(made.model.glob("*claim*"))


def test_a_fingerprint_is_dated_by_a_stamp_and_needs_no_base(
    base: Path, made: Fingerprint, marked: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = made.claim.parent
    # Nothing says when the key was chosen; the answers are read, of a whole model without its base.
    (found,) = verify(made.model, Evidence([made.claim]))
    assert found.status == "rejected" and "2 of 2 answers" in found.sentence and "no log is given" in found.sentence
    stamp = tmp_path / "answer.tsr"
    stamp.write_bytes(b"of today: " + bytes.fromhex(made.commitment.digest))
    with pytest.raises(ConfigError, match="no claim on this model"):
        attach_stamp(made.model, stamp, claims=claims)
    path, commitment = attach_stamp(base, stamp, claims=claims)
    assert path == made.claim and commitment.stamp and stamp_file(path).read_bytes() == stamp.read_bytes()
    # What the authority's library says of it is for `tests/ownership/test_stamps.py`.
    monkeypatch.setattr("fedllm.runtime.ownership.read_certificates", lambda paths: list(paths))
    monkeypatch.setattr("fedllm.ownership.stamps._stamped_at", lambda *given: datetime(2026, 3, 1, tzinfo=UTC))
    (found,) = verify(made.model, Evidence([made.claim], authorities=[tmp_path / "tsa.pem"]))
    assert found.upheld and "before 2026-03-01T00:00:00+00:00, as a verified time stamp says" in found.sentence
    # The log of a run in which it is not does not take that away, so that it can be judged beside a claim of the run.
    beside = Evidence([made.claim], [marked.run], authorities=[tmp_path / "tsa.pem"])
    assert verify(made.model, beside)[0].upheld
    (found,) = verify(base, Evidence([made.claim], authorities=[tmp_path / "tsa.pem"]))
    assert found.status == "not shown"


def test_a_fingerprint_that_is_not_learnt_hands_nothing_out(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed) as refused:
        fingerprint(base, tmp_path / "out", claims=tmp_path / "claims", plan=Plan(count=4, max_steps=3))
    assert refused.value.code == "NO_PROGRESS"
    assert not (tmp_path / "out").exists() and not list((tmp_path / "claims").glob("*.claim.json"))
