"""Strategies and LoRA rules as settings of one conversation: through the wire, resumed, and what they promise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rounds import adapters, broken_and_resumed, bytes_of, changed, check_the_plan
from safetensors.torch import load_file
from tiny import TinyFederation, mostly_thorough, thorough

from fedllm.aggregate.lora import sites
from fedllm.aggregate.server import DEFAULTS
from fedllm.errors import ConfigError, RunFailed
from fedllm.privacy.settings import PrivacySettings
from fedllm.runtime.host import PartyHost
from fedllm.runtime.plan import rehearse
from fedllm.runtime.run import RunResult
from fedllm.runtime.validate import validate
from fedllm.scenarios.base import Summand
from fedllm.scenarios.fedhomollm import Client, Settings, Train
from fedllm.train.base import TrainSums
from fedllm.train.settings import TrainSettings
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.payload import manifest_of

Make = Callable[..., TinyFederation]
Adapter = dict[str, torch.Tensor]
SGD: dict[str, Any] = {"train.optim": "sgd", "train.learning_rate": 0.5, "train.lr_scheduler_type": "constant"}
PLAN: dict[str, Any] = {"federation.num_rounds": 3, "federation.keep": "last"}


def options_of(name: str, **strategy: Any) -> dict[str, Any]:
    plan = PLAN | {"federation.strategy": {"name": name, **strategy}}
    return plan | SGD if name == "SCAFFOLD" else plan


CASES = {name: options_of(name) for name in DEFAULTS} | {
    "decoupled": options_of("FedProx", proximal="decoupled"),
    "FFA-LoRA": PLAN | {"federation.lora_rule": "FFA-LoRA"},
    "RoLoRA": PLAN | {"federation.lora_rule": "RoLoRA", "federation.strategy": {"name": "FedAvgM"}},
    "FlexLoRA": PLAN | {"federation.lora_rule": "FlexLoRA", "train.optimizer_state": "reset"},
    "Median": PLAN
    | {"federation.lora_rule": "RoLoRA", "federation.robust": {"name": "Median", "num_malicious": 1}}
    | {"federation.min_parties": 3},
    "GeometricMedian": PLAN
    | {"federation.robust": {"name": "GeometricMedian", "num_malicious": 1}, "federation.min_parties": 3},
    "FLTrust": PLAN | {"federation.robust": {"name": "FLTrust", "root_party": "north"}},
    "int8": PLAN | {"federation.codec": {"name": "int8", "error_feedback": True}},
    "TopK": PLAN | {"federation.codec": {"name": "TopK", "density": 0.2, "error_feedback": True}},
    "RandomK": PLAN | {"federation.codec": {"name": "RandomK", "density": 0.5}},
    "Grid, RoLoRA": PLAN | {"federation.codec": {"name": "Grid", "limit": 0.5}, "federation.lora_rule": "RoLoRA"},
    "int4, Median": PLAN
    | {"federation.lora_rule": "RoLoRA", "federation.robust": {"name": "Median", "num_malicious": 1}}
    | {"federation.min_parties": 3, "federation.codec": {"name": "int4"}},
    "int8 down": PLAN | {"federation.codec_down": {"name": "int8", "block_size": 16}},
    "int4 down, RoLoRA, int8 up": PLAN
    | {"federation.codec_down": {"name": "int4"}, "federation.lora_rule": "RoLoRA"}
    | {"federation.codec": {"name": "int8", "error_feedback": True}, "federation.strategy": {"name": "FedAvgM"}},
    "bf16 down, FFA-LoRA, some": PLAN
    | {"federation.codec_down": {"name": "bf16"}, "federation.lora_rule": "FFA-LoRA"}
    | {"federation.fraction_train": 0.5, "federation.eval_every": 0},
    "RoLoRA, SCAFFOLD": options_of("SCAFFOLD") | {"federation.lora_rule": "RoLoRA"},
}


@pytest.mark.parametrize(
    "case",
    mostly_thorough(
        CASES,
        *("FedAvg", "SCAFFOLD", "FedAdam", "DiLoCo", "decoupled", "FLTrust", "FlexLoRA", "TopK", "int4, Median"),
        *("bf16 down, FFA-LoRA, some", "int4 down, RoLoRA, int8 up", "RoLoRA, SCAFFOLD"),
    ),
)
def test_a_run_that_is_resumed_ends_as_the_unbroken_one(case: str, make_federation: Make) -> None:
    federation = make_federation(job=CASES[case])
    expected = federation.run("unbroken")
    result = broken_and_resumed(federation, after=2)
    assert (result.status, result.rounds, result.adapter_sha256) == ("SUCCESS", 3, expected.adapter_sha256)


@thorough
def test_every_strategy_and_rule_goes_another_way(make_federation: Make) -> None:
    shas = {case: make_federation(case, job=plan).run().adapter_sha256 for case, plan in CASES.items()}
    assert len(set(shas.values())) == len(CASES), shas


def test_rolora_moves_b_in_odd_rounds_and_a_in_even_ones_and_sends_nothing_else(make_federation: Make) -> None:
    both = make_federation("both", job=PLAN | {"federation.drift_meter": False}).run()
    found = adapters(both)
    assert changed(found[2], found[3]) == {"A", "B"}
    for rounds, factor in ((2, "A"), (3, "B")):
        plan = PLAN | {"federation.lora_rule": "RoLoRA", "federation.num_rounds": rounds}
        result = make_federation(f"rolora{rounds}", job=plan).run()
        found = adapters(result)
        assert changed(found[rounds - 1], found[rounds]) == {factor}
    assert 0.3 < bytes_of(result, "up") / bytes_of(both, "up") < 0.75


def test_ffa_lora_keeps_the_first_a_and_never_sends_it(make_federation: Make) -> None:
    both = make_federation("both", job=PLAN | {"federation.drift_meter": False}).run()
    federation = make_federation("ffa", job=PLAN | {"federation.lora_rule": "FFA-LoRA"})
    result = federation.run()
    one_round = make_federation("first", job=PLAN | {"federation.num_rounds": 1}).run()
    first, last = adapters(one_round)[0], adapters(result)[3]
    assert changed(first, last) == {"B"}
    assert all(0.3 < bytes_of(result, way) / bytes_of(both, way) < 0.75 for way in ("up", "down"))
    # What is delivered has both factors.
    saved = load_file(result.path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".lora_")[1][0] for name in saved} == {"A", "B"}


def test_a_pull_keeps_the_parties_nearer_to_the_global_adapter(make_federation: Make) -> None:
    def norm(folder: str, **strategy: Any) -> float:
        plan = PLAN | SGD | {"federation.strategy": strategy, "federation.num_rounds": 1, "train.local_steps": 8}
        rows = make_federation(folder, job=plan).run().rows()
        return next(float(row["value"]) for row in rows if row["name"] == "update_norm")

    free = norm("free", name="FedAvg")
    assert norm("weak", name="FedProx", proximal_mu=0.1) < free
    for how in ("gradient", "decoupled"):
        assert norm(how, name="FedProx", proximal_mu=1.0, proximal=how) < 0.5 * free


def test_one_step_a_round_with_scaffold_is_fedavg(make_federation: Make) -> None:
    """The corrections c - c_i then cancel in the mean, with unequal weights too, if c is the mean of the c_i."""
    plan = PLAN | SGD | {"train.local_steps": 1, "train.per_device_train_batch_size": 16, "train.max_grad_norm": 0}
    plan |= {"federation.num_rounds": 4}
    ends = {}
    for name in ("FedAvg", "SCAFFOLD"):
        result = make_federation(name, job=plan | {"federation.strategy": {"name": name}}).run()
        ends[name] = adapters(result)[4]
    assert all((ends["FedAvg"][key] - ends["SCAFFOLD"][key]).abs().max() < 1e-6 for key in ends["FedAvg"])
    # With more steps it is not.
    several = plan | {"train.local_steps": 4}
    shas = {
        make_federation(f"{name}4", job=several | {"federation.strategy": {"name": name}}).run().adapter_sha256
        for name in ("FedAvg", "SCAFFOLD")
    }
    assert len(shas) == 2


FLEX = {"federation.lora_rule": "FlexLoRA", "train.optimizer_state": "reset"}
KRUM = {"federation.robust": {"name": "Krum", "num_malicious": 1}}
MEDIAN = {"federation.robust": {"name": "Median", "num_malicious": 1}, "federation.min_parties": 3}
TRUST = {"federation.robust": {"name": "FLTrust", "root_party": "north"}}


@pytest.mark.parametrize(
    ("plan", "key", "words"),
    [
        ({"federation.strategy": {"name": "SCAFFOLD"}}, "optim", "E17"),
        (SGD | FLEX | {"federation.strategy": {"name": "SCAFFOLD"}}, "strategy", "each update"),
        (SGD | TRUST | {"federation.strategy": {"name": "SCAFFOLD"}}, "strategy", "each update"),
        (FLEX | {"federation.strategy": {"name": "FedAvgM"}}, "lora_rule", "momentum"),
        (FLEX | {"federation.strategy": {"name": "FedAvg", "server_learning_rate": 0.5}}, "lora_rule", "step size"),
        (FLEX | {"train.optimizer_state": "keep"}, "lora_rule", "adamw_torch remembers"),
        (FLEX | {"peft.use_dora": True}, "lora_rule", "DoRA"),
        (FLEX | TRUST, "lora_rule", "FlexLoRA and FLTrust"),
        (FLEX | {"federation.codec": {"name": "int8", "error_feedback": True}}, "lora_rule", "lost"),
        (SGD | {"federation.strategy": {"name": "SCAFFOLD"}, "federation.codec": {"name": "int8"}}, "codec", "int8"),
        (KRUM, "min_parties", "5 answers to bear 1"),
        (KRUM | {"federation.min_parties": 3}, "min_parties", "E21"),
        (MEDIAN, "robust", "coordinates"),
        ({"federation.robust": {"name": "FLTrust", "root_party": "west"}}, "robust", "west"),
        (TRUST | {"federation.fraction_train": 0.5}, "fraction_train", "every round"),
    ],
)
def test_what_cannot_be_asked_together_is_refused_by_name(
    plan: dict[str, Any], key: str, words: str, make_federation: Make
) -> None:
    federation = make_federation(job=PLAN | plan)
    with pytest.raises(ConfigError, match=words) as caught:
        federation.run()
    assert caught.value.code == "BAD_COMBINATION"
    assert caught.value.fix
    assert not (federation.folder / "run").exists()


def test_flexlora_with_one_party_is_what_that_party_came_to(make_federation: Make) -> None:
    """A party's own product has the rank of the adapter, so nothing is cut off: the models agree to rounding."""
    sizes = {"north": 6, "east": 6}
    ends = {}
    for rule in ("FedIT", "FlexLoRA"):
        plan = PLAN | FLEX | {"federation.lora_rule": rule, "federation.num_rounds": 1, "federation.min_parties": 1}
        federation = make_federation(
            rule, sizes=sizes, job=plan | {"federation.fraction_train": 0.1}, party={"limits.min_parties": 1}
        )
        adapter = adapters(federation.run())[1]
        ends[rule] = {site: adapter[left] @ adapter[right] for site, (left, right) in sites(adapter).items()}
    for site, product in ends["FedIT"].items():
        assert torch.allclose(product, ends["FlexLoRA"][site], atol=1e-6)


def test_a_root_party_that_does_not_answer_stops_the_run_by_name(make_federation: Make) -> None:
    class Failing:
        def train(self, task: Any, optimizer: Any) -> TrainSums:
            if task.party == "north":
                raise RunFailed("NONFINITE", "it diverged")
            return SupervisedTrainer().train(task, optimizer)

    with pytest.raises(RunFailed, match="north, whose update is trusted") as caught:
        make_federation(job=PLAN | TRUST).run(trainer=Failing())
    assert caught.value.code == "QUORUM"


def drift_of(result: RunResult) -> list[float]:
    return [row["value"] for row in result.rows() if row["name"] == "lora_drift"]


def test_the_drift_is_reported_each_round_where_both_factors_are_averaged(make_federation: Make) -> None:
    found = drift_of(make_federation("both", job=PLAN).run())
    assert len(found) == 3
    assert all(0 < value < 1 for value in found)
    for name, plan in {"off": {"federation.drift_meter": False}, "ffa": {"federation.lora_rule": "FFA-LoRA"}}.items():
        assert drift_of(make_federation(name, job=PLAN | plan).run()) == []


def test_what_a_codec_loses_is_no_drift(make_federation: Make) -> None:
    """The mean of what arrived is compared with the products of what arrived."""
    plain = drift_of(make_federation("plain", job=PLAN).run())
    coded = drift_of(make_federation("coded", job=PLAN | {"federation.codec": {"name": "TopK", "density": 0.2}}).run())
    # A meter of what was meant read 0.9 here: most of the update had not arrived.
    assert max(coded) < 5 * max(plain) < 0.5


def test_more_local_steps_drift_further(make_federation: Make) -> None:
    few, many = (
        drift_of(make_federation(f"steps{steps}", job=PLAN | {"train.local_steps": steps}).run()) for steps in (1, 8)
    )
    assert many[0] > few[0]


@pytest.mark.parametrize("case", ["FedAvg", "SCAFFOLD", "FFA-LoRA", "RoLoRA", "TopK", "int4, Median", "int8 down"])
def test_the_plan_foretells_the_bytes(case: str, make_federation: Make) -> None:
    check_the_plan(make_federation(job=CASES[case] | {"federation.num_rounds": 6}))


def test_what_a_codec_saves_is_told(make_federation: Make) -> None:
    plain = make_federation("plain", job=PLAN | {"peft.r": 64}).run()
    coded = make_federation("coded", job=CASES["int8"] | {"peft.r": 64}).run()
    saved = sum(row["value"] for row in coded.rows() if row["name"] == "bytes_saved" and row["round"] == 3)
    # The headers name each tensor twice as often; on an adapter this small that shows.
    assert bytes_of(plain, "up") == pytest.approx(bytes_of(coded, "up") + saved, rel=0.1)
    assert saved > 0
    assert not any(row["name"] == "bytes_saved" for row in plain.rows())


def later(result: RunResult, name: str) -> float:
    """Return a sum over the rounds after the first, in which somebody may hold nothing yet."""
    return sum(row["value"] for row in result.rows() if row["name"] == name and row["round"] > 1)


WIDE = {"peft.r": 64, "peft.target_modules": "all-linear", "federation.num_rounds": 4}


@pytest.mark.parametrize("every", [0, 2])
def test_the_change_goes_down_in_a_third_of_the_bytes_and_the_plan_knows(every: int, make_federation: Make) -> None:
    plan = PLAN | WIDE | {"federation.eval_every": every, "federation.num_rounds": 8}
    plain = make_federation("plain", job=plan).run()
    coded = make_federation("coded", job=plan | {"federation.codec_down": {"name": "int8"}})
    result = coded.run()
    rows = [row for row in result.rows() if row["name"] in ("bytes_up", "bytes_down")]
    foretold = rehearse(coded.job(), validate(coded.job(), coded.parties()))
    assert foretold.total == pytest.approx(sum(row["value"] for row in rows), rel=0.02)
    saved = later(result, "bytes_saved_down")
    assert later(result, "bytes_down") < 0.35 * later(plain, "bytes_down")
    assert later(plain, "bytes_down") == pytest.approx(later(result, "bytes_down") + saved, rel=0.02)


@thorough
def test_whoever_loses_what_it_was_sent_gets_the_whole_and_the_run_ends_the_same(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLAN | WIDE | {"federation.codec_down": {"name": "int8"}}
    expected = make_federation("expected", job=plan).run()
    in_workers = make_federation("workers", job=plan).run(num_workers=2)
    asked = PartyHost.handle

    def forgetful(self: PartyHost, parcel: Any, *, timeout_s: float) -> Any:
        if self.party == "east":
            self.blobs.forget()
        return asked(self, parcel, timeout_s=timeout_s)

    monkeypatch.setattr(PartyHost, "handle", forgetful)
    forgot = make_federation("forgot", job=plan).run()
    assert expected.adapter_sha256 == in_workers.adapter_sha256 == forgot.adapter_sha256
    assert bytes_of(forgot, "down") > 1.5 * bytes_of(expected, "down")
    assert bytes_of(in_workers, "down") == bytes_of(expected, "down")


@pytest.mark.parametrize(
    "options",
    [
        {"federation.lora_rule": "FlexLoRA", "train.optimizer_state": "reset"},
        {"federation.strategy": {"name": "SCAFFOLD"}} | SGD,
    ],
)
def test_what_must_go_down_whole_goes_with_no_codec(options: dict[str, Any], make_federation: Make) -> None:
    federation = make_federation(job=PLAN | options | {"federation.codec_down": {"name": "int8"}})
    with pytest.raises(ConfigError, match="codec_down"):
        validate(federation.job(), federation.parties())


class OneNumber:
    """A model of one number, whose training moves it by what the control variates leave of a gradient of 1."""

    def __init__(self) -> None:
        self.trainable = {"w": torch.nn.Parameter(torch.zeros(1))}
        self.manifest = manifest_of(self.trainable)

    def read(self) -> Adapter:
        return {"w": self.trainable["w"].detach().clone()}

    def write(self, tensors: Any) -> None:
        self.trainable["w"].data.copy_(tensors["w"])

    def only(self, names: Any) -> Any:
        return nullcontext()

    def shrunk(self, number: int, num_rounds: int) -> Any:
        return nullcontext()

    def train(self, task: Any, optimizer: torch.optim.Optimizer) -> TrainSums:
        self.trainable["w"].grad = torch.ones(1)
        for correct in task.corrections:
            correct(0.1)
        self.trainable["w"].data -= 0.1 * self.trainable["w"].grad
        return TrainSums(1.0, 1, 1, 1)


def client() -> Client:
    model = OneNumber()
    context: Any = SimpleNamespace(
        party="north",
        seed=1,
        settings=Settings.model_validate({"num_rounds": 4, "strategy": {"name": "SCAFFOLD"}}),
        model=model,
        trainer=model,
        pad_id=0,
        pull=None,
        data=SimpleNamespace(train=[object()], held_out=[], common=[]),
        data_settings=None,
        privacy=PrivacySettings(),
        train_settings=TrainSettings.model_validate(
            {"local_steps": 1, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"}
        ),
        eval_batch_size=1,
        log=lambda *args: None,
        on_step=lambda step, steps: None,
    )
    return Client(context)


def control_of(half: Client, number: int, counted: dict[str, int]) -> float:
    """Return the change of the control variate that a party answers with."""
    zero = {"w": torch.zeros(1)}
    answer = half.handle(Train(adapter=zero, control=zero, counted=counted), round_=number, deadline=1e9)
    assert isinstance(answer, Summand)
    return float(answer.tensors["control/w"])


def test_a_control_variate_whose_change_was_not_counted_is_taken_back() -> None:
    # A gradient of 1 makes c_i = 1 in the first round; the server's c stays 0 here.
    counted, lost = client(), client()
    assert control_of(counted, 1, {}) == pytest.approx(1.0)
    assert control_of(lost, 1, {}) == pytest.approx(1.0)
    # Counted: c_i is 1 already, and a second round finds a corrected gradient of 0 and leaves it there.
    assert control_of(counted, 2, {"north": 1}) == pytest.approx(0.0)
    # Not counted: it begins from 0 again, and says the whole change once more.
    assert control_of(lost, 2, {}) == pytest.approx(1.0)
    # A state that was restored knows as much.
    again = client()
    again.restore(lost.state())
    assert control_of(again, 3, {}) == pytest.approx(1.0)
