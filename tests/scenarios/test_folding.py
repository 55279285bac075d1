"""FedEx-LoRA and FLoRA as runs: the product is exact through the wire, and one PEFT adapter holds the result.

So is the product of FFA-LoRA and RoLoRA, which move one factor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounds import adapters, broken_and_resumed, bytes_of, check_the_plan
from safetensors.torch import load_file
from tiny import TinyFederation, mostly_thorough, thorough

from fedllm.aggregate.folded import pairs, split
from fedllm.aggregate.lora import sites
from fedllm.aggregate.slots import own_slots
from fedllm.errors import ConfigError
from fedllm.models.fresh import fresh_factors
from fedllm.runtime import judge as judging
from fedllm.runtime.compare import compare
from fedllm.runtime.export import export
from fedllm.runtime.judge import evaluate_run, final_tensors, judge
from fedllm.runtime.run import RunResult
from fedllm.runtime.site import open_site
from fedllm.train.base import TrainSums
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.payload import manifest_of

Make = Callable[..., TinyFederation]
Tensors = dict[str, torch.Tensor]
PLAN: dict[str, Any] = {"federation.num_rounds": 3, "federation.keep": "last"}
FEDEX: dict[str, Any] = PLAN | {"federation.lora_rule": "FedEx-LoRA"}
FLORA: dict[str, Any] = PLAN | {"federation.lora_rule": "FLoRA", "train.optimizer_state": "reset"}
SGD: dict[str, Any] = {"train.optim": "sgd", "train.learning_rate": 0.5, "train.lr_scheduler_type": "constant"}
CASES: dict[str, dict[str, Any]] = {
    "FedEx": FEDEX,
    "FedEx, int8": FEDEX | {"federation.codec": {"name": "int8", "error_feedback": True}},
    "FedEx, part": FEDEX | {"federation.fraction_train": 0.6},
    "FedEx, best": FEDEX | {"federation.keep": "best", "train.learning_rate": 0.1, "train.local_steps": 6},
    "FLoRA": FLORA,
    "FLoRA, ranks": FLORA | {"federation.ranks": {"north": 1}},
    "FLoRA, part": FLORA | {"federation.fraction_train": 0.6},
    "FLoRA, saved modules": FLORA | {"peft.modules_to_save": ["lm_head"]},
    "FLoRA, FedProx": FLORA | {"federation.strategy": {"name": "FedProx"}},
    "FLoRA, rslora": FLORA | {"peft.use_rslora": True},
}


@pytest.mark.parametrize("case", mostly_thorough(CASES, "FedEx", "FedEx, best", "FLoRA, ranks", "FLoRA, part"))
def test_a_run_that_is_resumed_ends_as_the_unbroken_one(case: str, make_federation: Make) -> None:
    federation = make_federation(job=CASES[case])
    expected = federation.run("unbroken")
    result = broken_and_resumed(federation, after=2)
    assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256)


@pytest.mark.parametrize("rounds", [6, *(pytest.param(rounds, marks=thorough) for rounds in (2, 12))])
@pytest.mark.parametrize("case", ["FedEx", "FLoRA", "FLoRA, ranks", "FLoRA, saved modules"])
def test_the_plan_foretells_bytes_that_grow(case: str, rounds: int, make_federation: Make) -> None:
    check_the_plan(make_federation(job=CASES[case] | {"federation.num_rounds": rounds}))


@pytest.mark.parametrize("every", [0, 3])
def test_the_plan_foretells_them_however_often_is_evaluated(every: int, make_federation: Make) -> None:
    check_the_plan(make_federation(job=FEDEX | {"federation.num_rounds": 15, "federation.eval_every": every}))


class Looking:
    """Trains, and keeps what each party began and ended with, and the logits that it began with."""

    def __init__(self) -> None:
        self.starts: dict[tuple[str, int], Tensors] = {}
        self.ends: dict[tuple[str, int], Tensors] = {}
        self.logits: dict[tuple[str, int], torch.Tensor] = {}
        self.weights: dict[tuple[str, int], float] = {}

    def train(self, task: Any, optimizer: torch.optim.Optimizer) -> TrainSums:
        key = task.party, task.round
        self.starts[key] = task.model.read()
        with torch.no_grad():
            self.logits[key] = task.model.model(input_ids=torch.tensor([[5, 6, 7]])).logits
        sums = SupervisedTrainer().train(task, optimizer)
        self.ends[key] = task.model.read()
        bases = [parameter for parameter in task.model.model.parameters() if not parameter.requires_grad]
        self.weights[key] = sum(float(parameter.double().sum()) for parameter in bases)
        return sums


WEIGHTS = {"north": 6, "east": 9, "south": 4}
RANKS = {"north": 1}


def products(state: Tensors) -> dict[str, torch.Tensor]:
    plain, folded = split(state)
    beside = dict(pairs(folded))
    found = {}
    for site, (left, right) in sites(plain).items():
        found[site] = plain[left].double() @ plain[right].double()
        if site in beside:
            found[site] = found[site] + beside[site][0].double() @ beside[site][1].double()
    return found


def ideal(before: Tensors, looked: Looking, number: int) -> dict[str, torch.Tensor]:
    """Return what stood beside the adapter before the round, and the weighted mean of the parties' products."""
    _, folded = split(before)
    plain = {name: torch.zeros_like(tensor) for name, tensor in split(before)[0].items()}
    total = products(plain | folded)
    for party, weight in WEIGHTS.items():
        for site, product in products(looked.ends[party, number]).items():
            total[site] = total[site] + weight / sum(WEIGHTS.values()) * product
    return total


def error_of(plan: dict[str, Any], make_federation: Make) -> float:
    looked, worst = Looking(), 0.0
    found = adapters(make_federation(job=plan | {"train.local_steps": 6}).run(trainer=looked))
    # The last two rounds are in the folder.
    assert sorted(found) == [plan["federation.num_rounds"] - 1, plan["federation.num_rounds"]]
    for number in found:
        if number - 1 in found:
            wanted = ideal(found[number - 1], looked, number)
            errors = [(products(found[number])[site] - wanted[site]).norm() / wanted[site].norm() for site in wanted]
            worst = max(worst, *(float(error) for error in errors))
    return worst


# RoLoRA moves B in the third round and A in the fourth.
ONE_FACTOR: dict[str, dict[str, Any]] = {
    f"{rule}, {rounds} rounds": PLAN | {"federation.lora_rule": rule, "federation.num_rounds": rounds}
    for rule, rounds in (("FFA-LoRA", 3), ("RoLoRA", 3), ("RoLoRA", 4))
}


@pytest.mark.parametrize("case", ["FedEx", "FLoRA", "FLoRA, ranks", *ONE_FACTOR])
def test_the_product_through_the_wire_is_the_ideal_one(case: str, make_federation: Make) -> None:
    assert error_of((CASES | ONE_FACTOR)[case], make_federation) < 1e-6


def test_that_of_averaged_factors_is_not(make_federation: Make) -> None:
    assert error_of(PLAN, make_federation) > 1e-3


def logits_of(federation: TinyFederation, result: RunResult) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(federation.job().model.model_name_or_path)
    model = PeftModel.from_pretrained(base, str(result.adapter)).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    return logits


@pytest.mark.parametrize("case", ["FedEx", "FLoRA", "FLoRA, rslora", "FLoRA, saved modules"])
def test_after_a_sync_all_parties_compute_alike_and_as_the_delivered_adapter_does(
    case: str, make_federation: Make
) -> None:
    looked = Looking()
    plan = CASES[case] | {"train.learning_rate": 0.1, "train.lr_scheduler_type": "constant"}
    make_federation("long", job=plan).run(trainer=looked)
    first = looked.logits["north", 3]
    assert torch.equal(first, looked.logits["east", 3]) and torch.equal(first, looked.logits["south", 3])
    # A run of two rounds delivers what the third round begins with, as one ordinary adapter on the untouched base.
    short = make_federation("short", job=plan | {"federation.num_rounds": 2})
    result = short.run()
    assert (logits_of(short, result) - first).abs().max() < 1e-4
    # Nothing else would do: the second round began elsewhere.
    assert (logits_of(short, result) - looked.logits["north", 2]).abs().max() > 1e-2
    config = (result.adapter / "adapter_config.json").read_text()
    rank = next(
        iter(t.shape[0] for n, t in load_file(result.adapter / "adapter_model.safetensors").items() if "A" in n)
    )
    assert f'"r": {rank}' in config and rank > 2


def test_the_weights_of_the_base_are_never_touched(make_federation: Make) -> None:
    looked = Looking()
    make_federation(job=FLORA).run(trainer=looked)
    assert len(set(looked.weights.values())) == 1


def test_flora_begins_each_round_with_factors_drawn_from_the_seed_and_the_round(make_federation: Make) -> None:
    looked = Looking()
    federation = make_federation(job=CASES["FLoRA, ranks"])
    federation.run(trainer=looked)
    manifest = manifest_of(looked.starts["east", 1])
    for number in (1, 2, 3):
        drawn = fresh_factors(manifest, 7, number - 1)
        for party in WEIGHTS:
            start = looked.starts[party, number]
            assert all(not start[name].any() for name in start if "lora_B" in name)
            rank = RANKS.get(party, 2)
            own, expected = own_slots(start, rank), own_slots(drawn, rank)
            assert all(torch.equal(own[name], expected[name]) for name in expected)
    one, two = looked.starts["east", 1], looked.starts["east", 2]
    assert all(not torch.equal(one[name], two[name]) for name in one if "lora_A" in name)


@thorough
def test_the_same_job_twice_and_by_workers_gives_the_same_bits(make_federation: Make) -> None:
    for case in ("FedEx", "FLoRA, ranks"):
        one = make_federation(f"{case} one", job=CASES[case]).run()
        two = make_federation(f"{case} two", job=CASES[case]).run(num_workers=2)
        assert one.adapter_sha256 == two.adapter_sha256


@pytest.mark.parametrize("changes", [{"train.gradient_checkpointing": True}, {"data.packing": True}])
def test_to_save_memory_or_padding_changes_nothing_but_rounding(changes: dict[str, Any], make_federation: Make) -> None:
    plan = FEDEX | {"train.loss_normalization": "tokens", "train.optim": "sgd", "train.learning_rate": 0.5}
    saved = []
    for name, other in {"plain": {}, "other": changes}.items():
        result = make_federation(name, job=plan | other).run()
        saved.append(adapters(result)[3])
    for site, product in products(saved[0]).items():
        assert torch.allclose(product, products(saved[1])[site], atol=1e-5)


def test_what_is_sent_down_grows_and_what_is_sent_up_does_not(make_federation: Make) -> None:
    result = make_federation(job=FEDEX | {"federation.drift_meter": False}).run()
    plain = make_federation("plain", job=PLAN | {"federation.drift_meter": False}).run()
    down = {
        row["round"]: row["value"] for row in result.rows() if row["name"] == "bytes_down" and row["party"] == "east"
    }
    assert down[1] < down[2] < down[3]
    assert bytes_of(result, "up") == pytest.approx(bytes_of(plain, "up"), rel=0.01)
    norms = [row["value"] for row in result.rows() if row["name"] == "folded_norm"]
    assert len(norms) == 3 and all(norm > 0 for norm in norms)


def test_merge_export_and_eval_take_what_is_beside_the_adapter(make_federation: Make) -> None:
    from transformers import AutoModelForCausalLM

    federation = make_federation(job=FEDEX | {"train.learning_rate": 0.1})
    result = federation.run()
    merged = export(result.path, federation.folder / "merged", merge=True)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(merged)(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert (logits - logits_of(federation, result)).abs().max() < 1e-4
    data = federation.folder / "data" / "north-eval.jsonl"
    base, tuned = evaluate_run(result.path, data=data)
    last = {row["party"]: row["value"] for row in result.rows() if held_out(row)}
    assert tuned["loss_nats"] == pytest.approx(last["north"], rel=1e-5)
    assert base["loss_nats"] != pytest.approx(last["north"], rel=1e-2)


def held_out(row: dict[str, Any]) -> bool:
    return (row["round"], row["split"], row["name"]) == (3, "held_out", "loss_nats")


def test_nothing_is_left_beside_the_model_for_who_comes_next(make_federation: Make) -> None:
    """The yardsticks of a comparison train on the same model in the same process."""
    federation = make_federation(job=FLORA | {"federation.num_rounds": 1, "evaluate.max_new_tokens": 2})
    rows = {row["model"]: row for row in compare(federation.job(), output=federation.folder / "run").rows}
    plain = make_federation("plain", job=PLAN | {"federation.num_rounds": 1, "evaluate.max_new_tokens": 2})
    other = {row["model"]: row for row in compare(plain.job(), output=plain.folder / "run").rows}
    assert rows["base model"]["loss_nats"] == other["base model"]["loss_nats"]
    assert rows["federated"]["loss_nats"] != other["federated"]["loss_nats"]
    # The base model after the tuned one, on one site.
    site = open_site(federation.job(), federation.parties())
    test = judging.test_set(site, examples_of(federation))
    first = judge(site, test, None)["loss_nats"]
    judge(site, test, final_tensors(federation.folder / "run", federation.job()))
    assert judge(site, test, None)["loss_nats"] == first


def examples_of(federation: TinyFederation) -> Any:
    from fedllm.data.read import read_examples

    return read_examples(str(federation.folder / "data" / "north-eval.jsonl"), base_dir=Path.cwd())


def test_how_much_requests_grow_by_hand(make_federation: Make) -> None:
    """Two layers with a query of 32 x 32 and a value of 16 x 32; three parties of rank 2."""

    def grown(plan: dict[str, Any], number: int) -> int:
        federation = make_federation(str((plan.get("federation.lora_rule"), number, len(plan))), job=plan)
        job, tunable = federation.job(), open_site(federation.job(), federation.parties()).model
        return job.table_line().grown(job.federation, tunable.manifest, number, job.parties)

    # FedEx-LoRA adds 4 columns a round, FLoRA 6, and no site gets more than 16 or 32.
    assert grown(FEDEX, 1) == 2 * 4 * (4 * 64 + 4 * 48)
    assert grown(FEDEX, 5) == 2 * 4 * (20 * 64 + 16 * 48)
    assert grown(FLORA, 1) == 2 * 4 * (6 * 64 + 6 * 48)
    assert grown(CASES["FLoRA, ranks"], 2) == 2 * 4 * (10 * 64 + 10 * 48)
    assert grown(FLORA, 10**9) == grown(FEDEX, 10**9) == 2 * 4 * (32 * 64 + 16 * 48)
    assert grown(PLAN, 5) == 0


@pytest.mark.parametrize("rule", [FEDEX, FLORA])
@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (SGD | {"federation.strategy": {"name": "SCAFFOLD"}}, "each update"),
        ({"federation.strategy": {"name": "FedAvgM"}}, "momentum"),
        ({"federation.robust": {"name": "NormClipping", "clip_norm": 1.0}}, "the mean's place"),
        ({"peft.use_dora": True}, "DoRA"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(
    rule: dict[str, Any], plan: dict[str, Any], words: str, make_federation: Make
) -> None:
    refused(make_federation(job=rule | plan), words)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (FLORA | {"train.optimizer_state": "keep"}, "remembers"),
        (FLORA | {"federation.codec": {"name": "int8", "error_feedback": True}}, "lost of the last"),
        (FEDEX | {"federation.ranks": {"north": 1}}, r"(?s)FedEx-LoRA .*E12.*FLoRA"),
    ],
)
def test_what_one_of_them_cannot_is_refused_by_name(plan: dict[str, Any], words: str, make_federation: Make) -> None:
    refused(make_federation(job=plan), words)


def refused(federation: TinyFederation, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        federation.run()
    assert caught.value.code == "BAD_COMBINATION" and caught.value.fix
