"""FedSA-LoRA: factor A is shared, factor B never leaves its party, and each party gets an adapter of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rounds import adapters, broken_and_resumed, bytes_up, check_the_plan, own_adapters
from safetensors.torch import load, load_file
from tiny import TinyFederation, mostly_thorough, thorough

from fedllm.aggregate.lora import sites
from fedllm.data.settings import DataSettings
from fedllm.errors import ConfigError, ResourceError, RunFailed
from fedllm.privacy.settings import PrivacySettings
from fedllm.runs.jsonl import read_rows
from fedllm.runtime import delivery
from fedllm.runtime import run as run_module
from fedllm.runtime.compare import compare
from fedllm.runtime.export import export
from fedllm.runtime.judge import evaluate_run
from fedllm.runtime.local import InProcessLink
from fedllm.runtime.run import RunResult, resume
from fedllm.scenarios.base import Summand
from fedllm.scenarios.fedhomollm import Client, Settings
from fedllm.scenarios.fedhomollm_messages import Deliver, Evaluate, Train
from fedllm.train.base import TrainSums
from fedllm.train.settings import TrainSettings
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.frame import Parcel
from fedllm.wire.payload import manifest_of
from fedllm.wire.stored import table_of

Make = Callable[..., TinyFederation]
Tensors = dict[str, torch.Tensor]
PLAN: dict[str, Any] = {"federation.num_rounds": 3, "federation.keep": "last", "federation.lora_rule": "FedSA-LoRA"}
SGD: dict[str, Any] = {"train.optim": "sgd", "train.learning_rate": 0.5, "train.lr_scheduler_type": "constant"}
CASES: dict[str, dict[str, Any]] = {
    "plain": PLAN,
    "reset": PLAN | {"train.optimizer_state": "reset"},
    # It overshoots: round 3 is the best.
    "best": PLAN
    | {"federation.keep": "best", "federation.num_rounds": 5, "train.local_steps": 6, "train.learning_rate": 0.1}
    | {"train.lr_scheduler_type": "constant"},
    "FedAvgM": PLAN | {"federation.strategy": {"name": "FedAvgM"}},
    "FedProx": PLAN | {"federation.strategy": {"name": "FedProx"}},
    "int8": PLAN | {"federation.codec": {"name": "int8", "error_feedback": True}},
    "ranks": PLAN | {"federation.ranks": {"north": 1}},
    "saved modules": PLAN | {"peft.modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", mostly_thorough(CASES, "plain", "best", "ranks", "int8"))
def test_a_run_that_is_resumed_ends_as_the_unbroken_one(case: str, make_federation: Make) -> None:
    federation = make_federation(job=CASES[case])
    expected = federation.run("unbroken")
    result = broken_and_resumed(federation, after=2)
    assert (
        (result.status, result.best_round) == (expected.status, expected.best_round) == ("SUCCESS", result.best_round)
    )
    assert own_adapters(result) == own_adapters(expected)
    assert len(set(own_adapters(result).values())) == 3


@pytest.mark.parametrize("case", ["plain", "ranks", "saved modules"])
def test_the_plan_foretells_the_bytes(case: str, make_federation: Make) -> None:
    check_the_plan(make_federation(job=CASES[case] | {"federation.num_rounds": 6}))


@thorough
def test_the_same_job_by_worker_processes_gives_the_same_adapters(make_federation: Make) -> None:
    one = make_federation("one", job=PLAN).run()
    two = make_federation("two", job=PLAN).run(num_workers=2)
    assert own_adapters(one) == own_adapters(two)


class Listening(InProcessLink):
    """Keeps every message that goes to the server."""

    heard: list[Parcel]

    def exchange(
        self, messages: Mapping[str, Parcel], *, timeout_s: float, wanted: Any
    ) -> Iterator[tuple[str, Parcel | None]]:
        for party, answer in super().exchange(messages, timeout_s=timeout_s, wanted=wanted):
            assert answer is not None
            Listening.heard.append(answer)
            yield party, answer


def heard_of(federation: TinyFederation, monkeypatch: pytest.MonkeyPatch) -> tuple[RunResult, list[Parcel]]:
    Listening.heard = []
    monkeypatch.setattr(run_module, "InProcessLink", Listening)
    return federation.run(), Listening.heard


def values_in(parcel: Parcel) -> Iterator[torch.Tensor]:
    if parcel.blob:
        yield from load(bytes(parcel.blob.data)).values()  # type: ignore[attr-defined]


def test_no_message_holds_a_party_s_own_factor(make_federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    result, heard = heard_of(make_federation(job=PLAN), monkeypatch)
    names = {name for parcel in heard if parcel.blob for name in table_of(parcel.blob)}
    # The first adapter follows from the seed: its B is zero. Of what is trained only A travels.
    assert any("lora_B" in name for name in names if name.startswith("adapter/"))
    assert {"A" if "lora_A" in name else "B" for name in names if name.startswith("tensors/update/")} == {"A"}
    sent = [value for parcel in heard for value in values_in(parcel)]
    # Neither the factor nor its change from round to round (it starts at zero) is among what was sent, by any name.
    for party, file in own_adapters(result).items():
        for name, tensor in load(file).items():
            if "lora_B" in name:
                assert tensor.any(), party
                same = [value for value in sent if value.shape == tensor.shape and value.any()]
                assert not any(torch.allclose(value, tensor, atol=1e-4) for value in same)
    # The server's own state has no B but the zeros of the start.
    assert not any(tensor.any() for name, tensor in adapters(result)[3].items() if "lora_B" in name)


def test_that_scan_would_find_a_factor_that_travels(make_federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, heard = heard_of(make_federation(job=PLAN | {"federation.lora_rule": "FedIT"}), monkeypatch)
    names = {name for parcel in heard if parcel.blob for name in table_of(parcel.blob)}
    assert any("lora_B" in name for name in names if name.startswith("tensors/update/"))


def test_only_the_shared_factor_travels(make_federation: Make) -> None:
    plan = PLAN | {"peft.r": 32, "federation.drift_meter": False}
    both = bytes_up(make_federation("both", job=plan | {"federation.lora_rule": "FedIT"}).run())
    shared = bytes_up(make_federation("shared", job=plan).run())
    for party in both:
        assert 0.3 < shared[party] / both[party] < 0.75


def test_each_party_gets_a_whole_adapter_that_peft_loads(make_federation: Make) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    federation = make_federation(job=PLAN)
    result = federation.run()
    assert not result.adapter.exists()
    assert result.adapter_sha256 is None
    assert "each party has its own" in json.loads((result.path / "result.json").read_text())["reason"]
    base = federation.job().model.model_name_or_path
    logits = []
    for party in ("north", "east", "south"):
        folder = result.path / "parties" / party / "adapter"
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {"A" if "lora_A" in name else "B" for name in tensors} == {"A", "B"}
        assert "one party's own adapter" in (folder / "README.md").read_text()
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([[5, 6, 7]])).logits)
    assert not torch.equal(logits[0], logits[1])
    shared = [load_file(file) for file in result.path.glob("parties/*/adapter/*.safetensors")]
    assert all(torch.equal(shared[0][name], other[name]) for other in shared for name in other if "lora_A" in name)


def test_held_out_data_are_judged_with_each_party_s_own_model(make_federation: Make, base: Path) -> None:
    result = make_federation(job=PLAN).run()
    rows = {(row["party"], row["split"], row["name"]): row["value"] for row in result.rows() if row["round"] == 3}
    scored = {row["party"]: row["loss_nats"] for row in judged_on_own(result)}
    for party in ("north", "east", "south"):
        assert rows[party, "held_out", "loss_nats"] == pytest.approx(scored[party], rel=1e-5)


def judged_on_own(result: RunResult) -> Iterator[dict[str, Any]]:
    for party in ("north", "east", "south"):
        data = result.path.parent / "data" / f"{party}-eval.jsonl"
        yield next(row for row in evaluate_run(result.path, data=data) if row["party"] == party)


def test_eval_and_compare_show_each_party_s_model(make_federation: Make) -> None:
    federation = make_federation(job=PLAN | {"federation.num_rounds": 1, "evaluate.max_new_tokens": 2})
    found = compare(federation.job(), output=federation.folder / "run")
    federated = [row for row in found.rows if row["kind"] == "federated"]
    assert [row["party"] for row in federated] == ["north", "east", "south"]
    assert len({row["loss_nats"] for row in federated}) == 3
    page = (federation.folder / "run" / "report.html").read_text()
    assert "each party has its own" in page


def test_export_asks_whose_adapter(make_federation: Make) -> None:
    federation = make_federation(job=PLAN)
    result = federation.run()
    with pytest.raises(ConfigError, match="each party has its own"):
        export(result.path, federation.folder / "none", merge=False)
    with pytest.raises(ConfigError, match="'west' has none"):
        export(result.path, federation.folder / "none", merge=False, party="west")
    out = export(result.path, federation.folder / "north", merge=False, party="north")
    assert (out / "adapter_model.safetensors").read_bytes() == own_adapters(result)["north"]
    merged = export(result.path, federation.folder / "merged", merge=True, party="north")
    assert (merged / "config.json").is_file() and (merged / "README.md").is_file()


def test_a_run_with_one_adapter_for_all_has_no_party_s_own(make_federation: Make) -> None:
    result = make_federation(job=PLAN | {"federation.lora_rule": "FedIT"}).run()
    assert own_adapters(result) == {}
    with pytest.raises(ConfigError, match="one adapter for all"):
        export(result.path, result.path.parent / "north", merge=False, party="north")


def test_where_no_party_is_there_is_nothing_to_judge(make_federation: Make, tmp_path: Path) -> None:
    federation = make_federation(job=PLAN)
    result = federation.run()
    for folder in result.path.glob("parties/*/adapter"):
        folder.rename(tmp_path / folder.parent.name)
    with pytest.raises(ConfigError, match="none of them is on this machine") as caught:
        evaluate_run(result.path, data=federation.folder / "data" / "north-eval.jsonl")
    assert caught.value.code == "RUN_UNFINISHED"


def test_the_best_round_has_the_factor_of_that_round(make_federation: Make) -> None:
    """The best round is not the last; its adapters are those of a shorter run."""
    plan = CASES["best"]
    result = make_federation("long", job=plan).run()
    assert result.best_round is not None and 0 < result.best_round < 5
    short = make_federation("short", job=plan | {"federation.num_rounds": result.best_round, "federation.keep": "last"})
    assert own_adapters(short.run()) == own_adapters(result)


def test_a_party_that_fails_in_a_round_goes_on_with_what_it_had(make_federation: Make) -> None:
    class Failing:
        def __init__(self) -> None:
            self.starts: dict[tuple[str, int], Tensors] = {}
            self.ends: dict[tuple[str, int], Tensors] = {}

        def train(self, task: Any, optimizer: Any) -> TrainSums:
            self.starts[task.party, task.round] = task.model.read()
            sums = SupervisedTrainer().train(task, optimizer)
            if (task.party, task.round) == ("north", 2):
                raise RunFailed("NONFINITE", "it diverged")
            self.ends[task.party, task.round] = task.model.read()
            return sums

    trainer = Failing()
    result = make_federation(job=PLAN).run(trainer=trainer)
    assert result.status == "PARTIAL"
    for left, right in sites(trainer.starts["north", 3]).values():
        assert torch.equal(trainer.starts["north", 3][left], trainer.ends["north", 1][left])
        assert not torch.equal(trainer.starts["north", 3][right], trainer.ends["north", 1][right])
    assert resume(result.path).status == "PARTIAL"


def test_a_party_that_cannot_take_its_adapter_is_named_and_the_others_have_theirs(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = delivery.write_adapter

    def failing(tensors: Tensors, folder: Path, **options: Any) -> Path:
        if "north" in folder.parts:
            raise ResourceError("DISK_FULL", "no space is left", where=str(folder))
        return write(tensors, folder, **options)

    monkeypatch.setattr(delivery, "write_adapter", failing)
    result = make_federation(job=PLAN).run()
    assert result.status == "PARTIAL" and set(own_adapters(result)) == {"east", "south"}
    failed = [row for row in read_rows(result.path / "events.jsonl") if row["event"] == "party_failed"]
    assert [(row["party"], row["round"], row["code"]) for row in failed] == [("north", 3, "DISK_FULL")]


class TwoNumbers:
    """A model of one slot, whose training adds 1 to both factors."""

    def __init__(self) -> None:
        self.trainable = {f"x.lora_{factor}.w": torch.nn.Parameter(torch.zeros(1, 1)) for factor in "AB"}
        self.manifest = manifest_of(self.trainable)
        self.model = torch.nn.Linear(1, 1)

    def read(self) -> Tensors:
        return {name: parameter.detach().clone() for name, parameter in self.trainable.items()}

    def initial(self, seed: int) -> Tensors:
        return {name: spec.zeros() for name, spec in self.manifest.items()}

    def write(self, tensors: Any) -> None:
        for name, parameter in self.trainable.items():
            parameter.data.copy_(tensors[name])

    def only(self, names: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def shrunk(self, number: int, num_rounds: int) -> Any:
        return self.only([])

    def train(self, task: Any, optimizer: torch.optim.Optimizer) -> TrainSums:
        for parameter in self.trainable.values():
            parameter.data += 1
        return TrainSums(1.0, 1, 1, 1)


class Half:
    """A party's half by itself, told by hand what was counted."""

    def __init__(self) -> None:
        self.model, self.given = TwoNumbers(), list[float]()
        settings = {"local_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
        context: Any = SimpleNamespace(
            party="north",
            parties=("north", "east"),
            privacy=PrivacySettings(),
            seed=1,
            settings=Settings.model_validate({"num_rounds": 9, "lora_rule": "FedSA-LoRA"}),
            model=self.model,
            trainer=self.model,
            pad_id=0,
            pull=None,
            data=SimpleNamespace(train=[object()], held_out=[], common=[]),
            data_settings=DataSettings(),
            train_settings=TrainSettings.model_validate(settings),
            eval_batch_size=1,
            log=lambda *args: None,
            on_step=lambda step, steps: None,
            deliver=lambda tensors: self.given.append(float(tensors["x.lora_B.w"])),
        )
        self.client = Client(context)

    def train(self, number: int, *, counted: int, best: int | None = None) -> None:
        request = Train(adapter={"x.lora_A.w": torch.zeros(1, 1)}, counted={"north": counted}, best=best)
        answer = self.client.handle(request, round_=number, deadline=1e9)
        assert isinstance(answer, Summand) and set(answer.tensors) == {"update/x.lora_A.w"}

    def evaluated(self, number: int, *, counted: int) -> float:
        request = Evaluate(adapter={"x.lora_A.w": torch.zeros(1, 1)}, split="held_out", counted={"north": counted})
        self.client.handle(request, round_=number, deadline=1e9)
        return float(self.model.read()["x.lora_B.w"])

    def delivered(self, number: int, *, counted: int) -> float:
        request = Deliver(adapter={"x.lora_A.w": torch.zeros(1, 1)}, counted={"north": counted}, delivered=number)
        self.client.handle(request, round_=number, deadline=1e9)
        return self.given[-1]

    def again(self) -> Half:
        other = Half()
        other.client.restore(self.client.state())
        return other


def test_what_was_not_counted_is_taken_back() -> None:
    half = Half()
    half.train(1, counted=0)
    assert half.evaluated(1, counted=1) == 1.0
    half.train(2, counted=1)
    # The answer of round 2 came too late: its B is not used, neither here nor after a restart.
    assert half.evaluated(2, counted=1) == half.again().evaluated(2, counted=1) == 1.0
    # To be judged without is not to be taken back for good: what counts is what the next request says.
    assert half.evaluated(2, counted=2) == 2.0
    for one in (half.again(), half):
        one.train(3, counted=1)
        assert one.evaluated(3, counted=3) == 2.0
        assert one.delivered(3, counted=3) == 2.0


def test_the_factor_of_the_best_round_is_kept_until_a_better_one() -> None:
    half = Half()
    half.train(1, counted=0, best=0)
    half.train(2, counted=1, best=1)
    half.train(3, counted=2, best=1)
    assert half.delivered(1, counted=3) == half.again().delivered(1, counted=3) == 1.0
    assert half.delivered(3, counted=3) == 3.0
    # Round 3 was the best, and round 4 was not counted.
    half.train(4, counted=3, best=3)
    half.train(5, counted=3, best=3)
    assert half.delivered(3, counted=5) == 3.0
    assert half.delivered(5, counted=5) == 4.0


def test_to_deliver_is_asked_only_where_there_is_something_to_deliver(make_federation: Make) -> None:
    own, plain = (make_federation(rule, job=PLAN | {"federation.lora_rule": rule}).job() for rule in RULES)
    assert "Deliver" in own.table_line().operations(own.federation)
    assert "Deliver" not in plain.table_line().operations(plain.federation)


RULES = ("FedSA-LoRA", "FedIT")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"federation.fraction_train": 0.5}, "left out .*E16"),
        (SGD | {"federation.strategy": {"name": "SCAFFOLD"}}, "no mean of the factor"),
        ({"federation.robust": {"name": "NormClipping", "clip_norm": 1.0}}, "sends one factor"),
        ({"peft.use_dora": True}, "DoRA's magnitudes"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(plan: dict[str, Any], words: str, make_federation: Make) -> None:
    federation = make_federation(job=PLAN | plan)
    with pytest.raises(ConfigError, match=words) as caught:
        federation.run()
    assert caught.value.code == "BAD_COMBINATION" and caught.value.fix
