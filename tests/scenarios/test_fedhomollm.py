"""FedHomoLLM's two halves: cohorts, quorum, the best round, and what settings of local training do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny import TinyFederation

from fedllm.errors import FedllmError, RunFailed, RunPaused
from fedllm.runs.jsonl import Row
from fedllm.scenarios.base import Decode, Reply, State, Total, as_it_is
from fedllm.scenarios.fedhomollm import SCENARIO, Evaluate, Initial, SendInitial, Server, Settings, Train
from fedllm.train.base import TrainSums, TrainTask
from fedllm.train.supervised import SupervisedTrainer
from fedllm.wire.payload import Failure, Manifest, Payload

Make = Callable[..., TinyFederation]
ADAPTER = {"w": torch.zeros(2)}


class ScriptedFederation:
    """Parties whose updates are 1 and whose held-out losses are given per round."""

    def __init__(
        self, num_parties: int = 3, *, losses: Sequence[float] = (), failing: dict[str, str] | None = None
    ) -> None:
        self.parties = tuple(f"p{i}" for i in range(num_parties))
        self.losses, self.failing = list(losses), failing or {}
        self.asked: list[tuple[str, int, tuple[str, ...]]] = []

    def ask(self, request: Payload, *, round_: int, to: Sequence[str]) -> Iterator[Reply]:
        self.asked.append((type(request).__name__, round_, tuple(to)))
        for party in to:
            failed = self.failing.get(party)
            yield Reply(party, Failure(code=failed) if failed else Initial(adapter=ADAPTER))

    def total(
        self, request: Payload, *, round_: int, to: Sequence[str], manifest: Manifest, decode: Decode = as_it_is
    ) -> Total:
        name = type(request).__name__ + (f" {request.split}" if isinstance(request, Evaluate) else "")
        self.asked.append((name, round_, tuple(to)))
        failures = {party: self.failing[party] for party in to if party in self.failing}
        inside = tuple(party for party in to if party not in failures)
        if isinstance(request, Train):
            counts = {"loss_nats": 8.0, "tokens": 4.0, "examples": 2.0, "steps": 1.0}
            return Total(inside, {"update/w": torch.ones(2)} if inside else {}, len(inside), counts, failures)
        loss = self.losses[round_] if round_ < len(self.losses) else 1.0
        counts = {"nll_nats": 10 * loss, "tokens": 10.0, "bytes": 30.0, "examples": 2.0} if loss >= 0 else {}
        return Total(inside, {}, len(inside), counts, failures)


def server(*, seed: int = 1, common: bool = False, **settings: Any) -> Server:
    return Server(Settings.model_validate({"num_rounds": 4} | settings), seed=seed, common=common)


def driven(half: Server, federation: ScriptedFederation, rounds: int) -> list[State]:
    states = [half.start(federation).state]
    for _ in range(rounds):
        states.append(half.round(federation, states[-1]).state)
    return states


def cohorts(rounds: int, num_parties: int, **settings: Any) -> list[tuple[str, ...]]:
    federation = ScriptedFederation(num_parties)
    driven(server(**settings), federation, rounds)
    return [to for name, _, to in federation.asked if name == "Train"]


def test_all_parties_train_unless_a_share_is_named() -> None:
    assert cohorts(3, 4) == [("p0", "p1", "p2", "p3")] * 3


@pytest.mark.parametrize(
    ("fraction", "least", "size"), [(0.5, 2, 5), (0.3, 2, 3), (0.31, 2, 4), (0.01, 2, 2), (0.01, 7, 7), (0.1, 1, 1)]
)
def test_a_cohort_has_the_share_rounded_up_and_never_fewer_than_the_quorum(
    fraction: float, least: int, size: int
) -> None:
    found = cohorts(4, 10, fraction_train=fraction, min_parties=least)
    assert {len(cohort) for cohort in found} == {size}
    assert all(list(cohort) == sorted(cohort) for cohort in found)


def test_cohorts_follow_from_the_seed_and_the_round_and_reach_everybody() -> None:
    one = cohorts(30, 6, fraction_train=0.4, num_rounds=30)
    assert cohorts(30, 6, fraction_train=0.4, num_rounds=30) == one
    assert cohorts(30, 6, fraction_train=0.4, num_rounds=30, seed=2) != one
    assert len(set(one)) > 5
    times = [sum(party in cohort for cohort in one) for party in ("p0", "p1", "p2", "p3", "p4", "p5")]
    assert min(times) >= 5


def test_the_adapter_moves_by_the_mean_update_and_momentum_lives_in_the_state() -> None:
    half = server(strategy={"name": "FedAvgM", "server_momentum": 0.5})
    states = driven(half, ScriptedFederation(), 3)
    # m: 1, 1.5, 1.75; theta: 0, 1, 2.5, 4.25
    assert [state.tensors["adapter/w"].tolist() for state in states] == [[v, v] for v in (0.0, 1.0, 2.5, 4.25)]
    assert states[3].tensors["server/m/w"].tolist() == [1.75, 1.75]


def test_a_round_depends_on_its_state_alone() -> None:
    settings = {"strategy": {"name": "FedAvgM", "server_momentum": 0.5}, "fraction_train": 0.5, "min_parties": 1}
    losses = [3.0, 2.0, 2.5, 1.0, 2.0]
    unbroken = driven(server(**settings), ScriptedFederation(4, losses=losses), 4)
    for cut in range(4):
        half, federation = server(**settings), ScriptedFederation(4, losses=losses)
        state = unbroken[cut]
        for _ in range(cut, 4):
            state = half.round(federation, state).state
        assert state.fields == unbroken[4].fields
        assert state.tensors.keys() == unbroken[4].tensors.keys()
        assert all(torch.equal(tensor, unbroken[4].tensors[name]) for name, tensor in state.tensors.items())


@pytest.mark.parametrize(
    ("losses", "settings", "best"),
    [
        ([3.0, 2.0, 2.5, 1.5, 1.7], {}, 3),
        ([1.0, 2.0, 2.5, 1.5, 1.7], {}, 0),
        ([3.0, 2.0, 2.0, 2.0, 2.0], {}, 1),
        ([3.0, 2.0, 2.5, 1.5, 1.7], {"keep": "last"}, 4),
        ([3.0, 2.0, 2.5, 1.5, 1.7], {"eval_every": 2}, 4),
        ([3.0, 1.0, 2.5, 1.0, 2.7], {"eval_every": 2}, 2),
        ([-1.0] * 5, {}, 4),
        ([3.0, 2.0, 2.5, 1.5, 1.7], {"eval_every": 0, "keep": "last"}, 4),
    ],
)
def test_the_round_of_lowest_held_out_loss_is_delivered(
    losses: list[float], settings: dict[str, Any], best: int
) -> None:
    half = server(**settings)
    states = driven(half, ScriptedFederation(losses=losses), 4)
    tensors, number = half.final(states[-1])
    assert number == best
    assert tensors["w"].tolist() == [float(best)] * 2


def test_evaluation_comes_at_its_rounds_and_at_the_last_one() -> None:
    federation = ScriptedFederation()
    driven(server(eval_every=3, num_rounds=5), federation, 5)
    assert [number for name, number, _ in federation.asked if name == "Evaluate held_out"] == [0, 3, 5]
    federation = ScriptedFederation()
    driven(server(eval_every=0, keep="last"), federation, 4)
    assert not [name for name, *_ in federation.asked if name.startswith("Evaluate")]


def test_parties_take_turns_on_the_common_test_set() -> None:
    federation = ScriptedFederation(3)
    driven(server(common=True), federation, 4)
    asked = [to for name, _, to in federation.asked if name == "Evaluate common"]
    assert asked == [("p0",), ("p1",), ("p2",), ("p0",), ("p1",)]


def test_a_round_goes_on_with_the_quorum_and_names_who_failed() -> None:
    federation = ScriptedFederation(3, failing={"p1": "NONFINITE"})
    half = server()
    result = half.round(federation, State(0, {"adapter/w": torch.zeros(2)}, {"best": None, "best_loss": None}))
    assert result.failures == {"p1": "NONFINITE"}
    assert result.state.round == 1


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ({"p1": "NONFINITE", "p2": "NONFINITE"}, RunFailed),
        ({"p1": "ROUND_TIMEOUT", "p2": "NONFINITE"}, RunFailed),
        ({"p1": "ROUND_TIMEOUT", "p2": "ROUND_TIMEOUT"}, RunPaused),
    ],
)
def test_below_the_quorum_the_run_pauses_for_slow_parties_and_fails_for_others(
    failing: dict[str, str], error: type[FedllmError]
) -> None:
    federation = ScriptedFederation(3, failing=failing)
    with pytest.raises(error) as caught:
        server().round(federation, State(0, {"adapter/w": torch.zeros(2)}, {"best": None, "best_loss": None}))
    assert (caught.value.code, caught.value.where) == ("QUORUM", "round 1")
    assert "p1" in caught.value.what
    assert "p2" in caught.value.what
    assert caught.value.fix


def test_no_first_adapter_is_a_failure_by_its_code() -> None:
    with pytest.raises(RunFailed) as caught:
        server().start(ScriptedFederation(3, failing={"p0": "PEFT_TARGET"}))
    assert (caught.value.code, caught.value.where) == ("PEFT_TARGET", "party p0")


def test_missing_counts_are_null_and_do_not_stop_the_server() -> None:
    class Forgetful(ScriptedFederation):
        """Parties that count nothing."""

        def total(
            self, request: Payload, *, round_: int, to: Sequence[str], manifest: Manifest, decode: Decode = as_it_is
        ) -> Total:
            total = super().total(request, round_=round_, to=to, manifest=manifest)
            return Total(total.parties, total.means, total.weight, {}, {})

    half = server()
    result = half.round(Forgetful(), State(0, {"adapter/w": torch.zeros(2)}, {"best": None, "best_loss": None}))
    assert {row["name"]: row["value"] for row in result.rows if row["split"] == "train"} == {
        "tokens": None,
        "examples": None,
        "steps": None,
        "loss_nats": None,
    }


def test_the_schema_of_the_conversation_is_closed() -> None:
    asked, answered = {"SendInitial", "Train", "Evaluate", "Deliver"}, {"Initial", "Summand", "Delivered", "Failure"}
    assert set(SCENARIO.kinds()) == asked | answered
    assert [cls.__name__ for cls in SCENARIO.kinds().values() if cls.commits] == ["Train"]
    assert not SendInitial.tensor_fields()


def values(rows: list[Row], name: str, party: str) -> list[Any]:
    return [row["value"] for row in rows if (row["name"], row["party"]) == (name, party) and row["round"]]


def test_local_epochs_pass_over_all_examples_each_round(make_federation: Make) -> None:
    changes = {"train.local_steps": None, "train.local_epochs": 2, "train.per_device_train_batch_size": 4}
    rows = make_federation(job=changes, sizes={"north": 6, "south": 9}).run().rows()
    train = [row for row in rows if row["split"] == "train"]
    assert values(train, "examples", "north") == [12, 12]
    assert values(train, "steps", "north") == [4, 4]
    assert values(train, "examples", "south") == [18, 18]
    assert values(train, "steps", "south") == [6, 6]


def test_each_party_logs_the_learning_rate_of_its_last_step_over_the_whole_run(make_federation: Make) -> None:
    from fedllm.train.optimizer import learning_rates

    federation = make_federation(job={"federation.num_rounds": 3, "train.local_steps": 2})
    rate = learning_rates(federation.job().train, total_steps=6)
    assert values(federation.run().rows(), "learning_rate", "north") == [rate(1), rate(3), rate(5)]


def test_each_round_goes_on_in_the_data_where_the_round_before_ended(make_federation: Make) -> None:
    seen: list[tuple[str, int, int, int]] = []

    class Noting(SupervisedTrainer):
        """Keeps which steps of the run each round does."""

        def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
            seen.append((task.party, task.round, task.first_step, task.num_steps))
            return super().train(task, optimizer)

    make_federation(job={"federation.num_rounds": 3}, sizes={"north": 4, "south": 3}).run(trainer=Noting())
    assert sorted(seen) == [
        (party, number, 2 * (number - 1), 2) for party in ("north", "south") for number in (1, 2, 3)
    ]


def test_keeping_and_resetting_the_optimiser_state_differ_after_the_first_round_only(make_federation: Make) -> None:
    shas = {}
    for state in ("keep", "reset"):
        for rounds in (1, 2):
            # A constant rate, so that the number of rounds changes nothing else.
            changes = {"train.optimizer_state": state, "federation.num_rounds": rounds, "federation.keep": "last"}
            changes |= {"train.lr_scheduler_type": "constant"}
            shas[state, rounds] = make_federation(f"{state}{rounds}", job=changes).run().adapter_sha256
    assert shas["keep", 1] == shas["reset", 1]
    assert shas["keep", 2] != shas["reset", 2]


def test_a_party_without_held_out_examples_takes_no_part_in_the_evaluation(make_federation: Make) -> None:
    party = {"data.eval": None, "data.eval_share": 0.0}
    result = make_federation(party=party).run()
    assert result.status == "SUCCESS"
    assert result.best_round == 2
    assert not [row for row in result.rows() if row["split"] == "held_out"]
