"""Re-alignment: between rounds the owner corrects the emulator, and nothing of its middle comes along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounds import adapters, check_the_plan
from safetensors.torch import load
from test_fedost import EMULATOR, OST, SIZES, owner, owners_files
from tiny import TinyFederation, bits, records, save_base, thorough, write_jsonl, write_yaml

from fedllm.aggregate.folded import FOLDED, added_sites, complete, pairs, split
from fedllm.errors import ConfigError, FedllmError, PayloadError
from fedllm.job.check import check_job
from fedllm.models.adapter import TunableModel
from fedllm.models.blocks import Cut, forget_cuts
from fedllm.models.branch import middle_layers, scale_of
from fedllm.models.deliver import load_adapter
from fedllm.models.emulator import choose, sliced
from fedllm.models.load import load_base
from fedllm.models.scan import matches, secret_tensors
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.runs.metrics import run_rows
from fedllm.runtime.delivery import of_rank
from fedllm.runtime.export import export
from fedllm.runtime.host import PartyHost
from fedllm.runtime.judge import evaluate_run, final_tensors
from fedllm.runtime.run import RunResult, resume
from fedllm.runtime.site import open_site
from fedllm.scenarios import fedost, fedost_realign
from fedllm.scenarios.fedost_realign import check_correction, first_correction
from fedllm.wire.blob import whole
from fedllm.wire.frame import unpack
from fedllm.wire.payload import Tensors

REALIGN: dict[str, Any] = {"federation.realign_every": 1, "federation.realign_steps": 2, "federation.realign_rank": 3}
THREE = REALIGN | {"federation.num_rounds": 3}
# An owner who accepts whatever comes out.
ANY = {"plug_margin": -99.0, "full_zs_margin": -99.0}
Make = Callable[..., TinyFederation]
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's model: six random layers."""
    return save_base(tmp_path_factory.mktemp("whole"), num_hidden_layers=6)


@pytest.fixture
def make(make_federation: Make, whole_model: Path) -> Make:
    """A function that writes a federation whose owner re-aligns, and its package."""
    from fedllm.runtime.emulator import make_package

    def made(
        name: str = "offsite", *, job: dict[str, Any] | None = None, emulator: dict[str, Any] | None = None
    ) -> TinyFederation:
        found: TinyFederation = make_federation(name, sizes=SIZES, job=OST | REALIGN | (job or {}))
        (found.folder / "full").symlink_to(whole_model)
        write_jsonl(found.folder / "data" / "public.jsonl", records("public", 8))
        file = {"name": "boss", "data": {"train": "../data/boss.jsonl", "eval": "../data/boss-eval.jsonl"}}
        own = {"public": "../data/public.jsonl", "distil_learning_rate": 0.02, "distil_batch_size": 4, "policy": ANY}
        settings = {key: value for key, value in (EMULATOR | own | (emulator or {})).items() if value is not None}
        write_yaml(found.folder / "parties" / "boss.yaml", file | {"emulator": settings})
        make_package(owner(found), found.folder / "package")
        return found

    return made


def values(result: RunResult, name: str, *, party: str | None = None, split: str | None = None) -> dict[int, float]:
    """Return a metric by round."""
    return {
        row["round"]: row["value"]
        for row in result.rows()
        if (row["name"], row["party"], row["split"]) == (name, party, split)
    }


def without(changes: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(changes)


def state_of(made: TinyFederation, result: RunResult) -> Tensors:
    return final_tensors(result.path, made.job())


def test_the_emulator_comes_closer_and_the_correction_goes_down_with_the_adapter(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it holds no block that is left out, however high its rank: looked at as a client can."""
    settings = {"federation.realign_steps": 8, "federation.realign_rank": 32}
    made = make(job=THREE | settings, emulator={"distil_learning_rate": 0.003})
    handle, received = PartyHost.handle, dict[str, torch.Tensor]()

    def noting(self: PartyHost, parcel: Any, *, timeout_s: float) -> Any:
        frame = unpack(parcel, max_bytes=2**40)
        if frame.blob and self.party != "boss":
            received.update({f"{frame.blob_digest}:{key}": t for key, t in load(bytes(whole(frame.blob))).items()})
        return handle(self, parcel, timeout_s=timeout_s)

    monkeypatch.setattr(PartyHost, "handle", noting)
    result = made.run()
    before, after = values(result, "distil_loss_before"), values(result, "distil_loss_after")
    # Not after the last round: nobody would train on it.
    assert set(before) == {1, 2} and values(result, "realigned") == {1: 1.0, 2: 1.0}
    assert all(after[number] < 0.95 * before[number] for number in before), (before, after)
    found = adapters(result)
    _, second = split(found[2])
    _, third = split(found[3])
    assert {name.split(".layers.")[1].split(".")[0] for name in second} == {"1", "2"}
    assert bits(second) == bits(third)
    # The second one went on from the first.
    assert before[2] < 0.97 * before[1]
    report = (result.path / "report.html").read_text(encoding="utf-8")
    assert "Re-aligned after rounds 1 and 2" in report
    assert (
        sum(FOLDED in name for name in received) > 2 * len(third)
        and matches(received, secret_of(made), allowed={}) == []
    )
    held = dict(third)
    for name, (weight, change) in corrected_middle(made, result).items():
        held |= {f"{name}, changed": weight + change, f"{name}, its change": change}
    assert len(held) == 4 * 14 and matches(held, secret_of(made), allowed={}) == []
    assert made.run("again").adapter_sha256 == result.adapter_sha256


def test_with_the_whole_middle_there_is_nothing_to_align_to_the_bit(make: Make) -> None:
    whole = {"way": "whole", "middle": None}
    aligned, plain = make("aligned", emulator=whole), make("plain", job=without(REALIGN), emulator=whole)
    results = [made.run() for made in (aligned, plain)]
    assert set(values(results[0], "distil_loss_before").values()) == {0.0}
    assert set(values(results[0], "distil_loss_after").values()) == {0.0}
    for split_ in ("plugged", "emulator"):
        one, other = (values(result, "loss_nats", split=split_) for result in results)
        assert one == other and len(one) == 3
    tuned, correction = split(state_of(aligned, results[0]))
    assert bits(tuned) == bits(state_of(plain, results[1]))
    assert all(not tensor.any() for name, tensor in correction.items() if name.endswith(".left"))
    assert owners_files(results[0].path) == owners_files(results[1].path)


def test_a_run_that_breaks_off_in_a_realignment_or_after_it_has_the_same_bits(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(job=THREE | {"federation.codec_down": {"name": "int8"}})
    expected = made.run("unbroken")
    realigned, handle, asked = fedost.realigned, PartyHost.handle, list[int]()
    moment = ""

    def noting(*args: Any, **options: Any) -> Any:
        asked.append(options["number"])
        if moment == "in it" and asked == [1, 2]:
            raise KeyboardInterrupt
        return realigned(*args, **options)

    def failing(self: PartyHost, parcel: Any, *, timeout_s: float) -> Any:
        if moment == "after it" and asked == [1, 2]:
            raise KeyboardInterrupt
        return handle(self, parcel, timeout_s=timeout_s)

    monkeypatch.setattr(fedost, "realigned", noting)
    monkeypatch.setattr(PartyHost, "handle", failing)
    for moment in ("in it", "after it"):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            made.run(moment)
        asked.append(0)
        result = resume(made.folder / moment)
        assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256)
        assert owners_files(result.path) == owners_files(expected.path)
        for name in ("distil_loss_after", "realigned"):
            assert values(result, name) == values(expected, name)
        assert asked == [1, 2, 0, 2]


def test_secure_sums_and_the_noise_of_parties_go_with_it_unchanged(make: Make) -> None:
    # All of a round's sums are masked; the correction is in none of them.
    found = {}
    for name, changes in {"plain": {}, "secure": {"privacy.secure_aggregation": {"enabled": True}}}.items():
        result = make(name, job=changes | {"train.local_steps": 1}).run()
        rows = [row for row in result.rows() if not row["name"].startswith(("seconds", "bytes"))]
        found[name] = result.status, result.adapter_sha256, rows
    assert found["plain"] == found["secure"]
    noise = {"unit": "example", "noise_multiplier": 1.0, "accountant": "RDP"}
    result = make("noise", job={"privacy.differential_privacy": noise, "train.local_steps": 1}).run()
    spent = {row["party"] for row in result.rows() if row["name"] == "epsilon_spent"}
    assert (result.status, spent) == ("SUCCESS", {"north", "east", "south"})
    assert values(result, "realigned") == {1: 1.0}


def test_plug_takes_the_adapter_alone_and_the_delivered_adapter_the_correction_too(make: Make) -> None:
    from transformers import AutoModelForCausalLM

    made = make(job={"evaluate.test": "data/north-eval.jsonl", "federation.realign_steps": 12})
    result = made.run()
    state = state_of(made, result)
    tuned, correction = split(state)
    assert correction
    site = open_site(made.job(), made.parties())
    package = made.folder / "package"
    rows = {split_: values(result, "loss_nats", split=split_)[2] for split_ in ("plugged_common", "emulator_common")}
    assert values(result, "loss_nats", split="common")[2] == pytest.approx(rows["emulator_common"], rel=1e-6)

    def loss(model: Any) -> float:
        from fedllm.evaluate.loss import evaluate_examples

        return evaluate_examples(model, site.common, pad_id=site.base.tokenizer.pad_token_id, batch_size=4).loss_nats

    with owner(made).full.plugged(tuned, site.model.model) as whole:
        assert loss(whole.model) == pytest.approx(rows["plugged_common"], rel=1e-6)
    delivered = load_adapter(load_base(ModelSettings(model_name_or_path="x"), folder=package).model, result.adapter)
    assert loss(delivered) == pytest.approx(rows["emulator_common"], rel=1e-5)
    site.model.write(tuned)
    assert abs(loss(site.model.model) - rows["emulator_common"]) > 1e-3
    for party in ("north", "east", "south"):
        own = result.path / "parties" / party / "adapter" / "adapter_model.safetensors"
        assert own.read_bytes() == (result.adapter / "adapter_model.safetensors").read_bytes()
    merged = AutoModelForCausalLM.from_pretrained(export(result.path, made.folder / "merged", merge=True)).eval()
    assert loss(merged) == pytest.approx(rows["emulator_common"], rel=1e-4)
    base, judged = evaluate_run(result.path)
    assert judged["loss_nats"] == pytest.approx(rows["emulator_common"], rel=1e-6)
    assert base["loss_nats"] != judged["loss_nats"]
    site.model.write(state)
    with torch.no_grad():
        ours = site.model.model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
        theirs = delivered.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, theirs)


def package_of(family: str) -> TunableModel:
    """Return a package of two middle blocks of a small random model."""
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=6, n_head=2, n_positions=16))
    else:
        sizes = {"d_model": 16, "d_ff": 24, "num_layers": 6, "num_decoder_layers": 6, "num_heads": 2, "d_kv": 8}
        model = T5ForConditionalGeneration(T5Config(vocab_size=30, decoder_start_token_id=0, **sizes))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    cut = Cut(1, 1)
    made = sliced(model.eval(), choose(model, cut, way="uniform", keep=2), cut)
    return TunableModel(made, PEFT, "seq2seq_lm" if family == "t5" else "causal_lm")


PEFT = PeftSettings(r=2, lora_alpha=6, use_rslora=True)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_corrected_middle_is_delivered_as_an_adapter_of_all_layers(family: str) -> None:
    model = package_of(family)
    draw = torch.Generator().manual_seed(2)
    state = {
        name: torch.randn(spec.shape, generator=draw) * 0.2
        for name, spec in {**model.manifest, **model.beside(5)}.items()
    }
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if family == "t5" else {})}
    with torch.no_grad():
        model.write(state)
        expected = model.model(**inputs).logits
        model.write(split(state)[0])
        assert (model.model(**inputs).logits - expected).abs().max() > 1e-2
        adapter = complete(state)
        bare = package_of(family).model.unload()
        forget_cuts(bare.config)
        bare.requires_grad_(False)
        names = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in adapter}
        peft = of_rank(PEFT, 5).model_copy(update={"target_modules": sorted(names)})
        wide = TunableModel(bare, peft, "seq2seq_lm" if family == "t5" else "causal_lm")
        wide.write(adapter)
        assert (wide.model(**inputs).logits - expected).abs().max() < 1e-3
    assert len(added_sites(state)) == {"gpt2": 2 * 4, "t5": 2 * 6 + 2 * 10}[family]


def test_a_client_refuses_all_but_a_correction_of_its_middle() -> None:
    model = package_of("gpt2")
    good = first_correction(model.beside(3), 7)
    check_correction(good, model, 3)
    check_correction({}, model, 3)
    site = next(site for site, _ in pairs(good))
    pair = {side: good[f"{FOLDED}{site}.{side}"] for side in ("left", "right")}

    def moved(block: int) -> Tensors:
        name = site.replace("transformer.h.1.", f"transformer.h.{block}.")
        return {f"{FOLDED}{name}.{side}": tensor for side, tensor in pair.items()}

    wide = first_correction(model.beside(4), 7)
    wrong = {
        "an outer layer": good | moved(0),
        "a block that the package has not": good | moved(5),
        "a part of it": {name: good[name] for name in list(good)[:-1]},
        "another rank": wide,
        "whole numbers": {name: tensor.int() for name, tensor in good.items()},
    }
    for tensors in wrong.values():
        with pytest.raises(PayloadError, match="tensor"):
            check_correction(tensors, model, 3)
    with pytest.raises(PayloadError, match="not expected"):
        check_correction(good, model, 0)


def test_a_server_that_sends_more_trains_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the defence off the same server's block arrives."""

    def more(self: Any, federation: Any, tensors: Tensors, number: int) -> Any:
        site = "base_model.model.model.layers.0.mlp.up_proj"
        planted = {f"{FOLDED}{site}.left": torch.ones(64, 3), f"{FOLDED}{site}.right": torch.ones(3, 32)}
        return fedost.Settled(tensors | planted)

    monkeypatch.setattr(fedost.Server, "_realigned", more)
    made = make()
    with pytest.raises(FedllmError, match="PAYLOAD_REFUSED"):
        made.run("refused")
    monkeypatch.setattr(fedost, "check_correction", lambda folded, model, rank: None)
    assert made.run("taken").status == "SUCCESS"


def test_what_would_break_the_owner_s_policy_is_not_sent(make: Make) -> None:
    """With the defence off, which the first margins are, it is."""
    found = {}
    for name, policy in {"off": ANY, "plug": ANY | {"plug_margin": 9.0}, "zs": ANY | {"full_zs_margin": 9.0}}.items():
        made = make(name, job={"train.local_steps": 1}, emulator={"policy": policy})
        result = made.run()
        assert result.status == "SUCCESS"
        assert values(result, "realigned") == {1: float(name == "off")}
        assert values(result, "realign_refused_by_policy") == ({} if name == "off" else {1: 1.0})
        found[name] = split(state_of(made, result))[1]
        known = values(result, "ot_emu_nats", party="boss", split="realigned")
        assert set(known) == {1} and known[1] > 0
    assert found["off"] and not found["plug"] and not found["zs"]
    report = (result.path / "report.html").read_text(encoding="utf-8")
    assert "kept the emulator as it was after round 1" in report


@pytest.mark.parametrize("way", ["crash", pytest.param("influence", marks=thorough)])
def test_blocks_that_were_chosen_by_measurement_are_chosen_again_for_the_look(way: str, make: Make) -> None:
    """With other blocks than the package's, those that it holds would be taken for secret ones."""
    settings = {"way": way, "distil_learning_rate": 0.002}
    result = make(job=THREE | {"train.learning_rate": 0.3, "train.local_steps": 1}, emulator=settings).run()
    assert values(result, "realigned") == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize("rate", [3.0, 1e30])
def test_a_correction_that_comes_no_closer_is_not_sent(rate: float, make: Make) -> None:
    made = make(job={"train.local_steps": 1}, emulator={"distil_learning_rate": rate})
    result = made.run()
    assert result.status == "SUCCESS" and not split(state_of(made, result))[1]
    assert values(result, "realign_refused_by_loss") == {1: 1.0} and values(result, "realigned") == {1: 0.0}


def planting(monkeypatch: pytest.MonkeyPatch, made: TinyFederation, share: float) -> None:
    """Let distillation end in a correction that makes one layer's weight that of a block that is left out."""
    theirs = owner(made).full.load().model.state_dict()["model.layers.3.mlp.up_proj.weight"]
    site = "base_model.model.model.layers.1.mlp.up_proj"

    def planted(student: Any, teacher: Any, examples: Any, *, how: Any, tuned: Any, pad_id: int) -> float:
        weight = middle_layers(student)[site].get_parameter("weight")
        u, s, v = torch.linalg.svd(share * (theirs - weight) / scale_of(student), full_matrices=False)
        branches = {branch.site: branch for branch, _ in student._fedllm_folded}
        with torch.no_grad():
            branches[site].left.copy_(u * s)
            branches[site].right.copy_(v)
        return 0.0

    monkeypatch.setattr(fedost_realign, "distil", planted)
    monkeypatch.setattr(fedost_realign, "distance", lambda *args, **options: 1.0)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_correction_that_carries_a_block_is_found_before_it_is_sent(
    share: float, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept block turned into one that is left out, or a good part of the way to it."""
    made = make(job={"federation.realign_rank": 32, "train.local_steps": 1})
    planting(monkeypatch, made, share)
    result = made.run("looked")
    assert values(result, "realigned") == {1: 0.0} and values(result, "realign_refused_by_scan") == {1: 1.0}
    assert not split(state_of(made, result))[1]


@pytest.mark.parametrize("share", [0.4, pytest.param(1.0, marks=thorough)])
def test_without_the_look_at_it_the_block_is_read_off(
    share: float, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the package and the correction does so."""
    made = make(job={"federation.realign_rank": 32, "train.local_steps": 1})
    planting(monkeypatch, made, share)
    monkeypatch.setattr(fedost_realign, "held_by", lambda *args, **options: [])
    middle = corrected_middle(made, made.run())
    weight, change = middle["base_model.model.model.layers.1.mlp.up_proj"]
    found = matches({"read off": weight + change / share}, secret_of(made), allowed={})
    assert {match.secret for match in found} == {"model.layers.3.mlp.up_proj.weight"}


def secret_of(made: TinyFederation) -> Tensors:
    return secret_tensors(owner(made).full.load().model, {"model.layers": [0, 1, 4, 5]}, Cut(1, 1))


def corrected_middle(made: TinyFederation, result: RunResult) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (weight, what it is changed by) of the middle, by site, as a client can compute them."""
    model = open_site(made.job(), made.parties()).model.model
    layers, scale = middle_layers(model), scale_of(model)
    found = dict(pairs(split(state_of(made, result))[1]))
    return {
        name: (layers[name].get_parameter("weight").detach(), scale * (left @ right))
        for name, (left, right) in found.items()
    }


PLANS: dict[str, dict[str, Any]] = {
    "long": {"federation.num_rounds": 8, "federation.realign_every": 2},
    "by changes": {
        "federation.num_rounds": 5,
        "federation.realign_every": 3,
        "federation.codec_down": {"name": "int8"},
    },
}


@pytest.mark.parametrize("case", PLANS)
def test_the_plan_foretells_the_bytes_of_corrections(case: str, make: Make) -> None:
    changes = {"train.local_steps": 1, "federation.realign_steps": 1, "federation.plug_every": 0}
    made = make(job=PLANS[case] | changes)
    check_the_plan(made)
    if case == "by changes":
        # With a codec what did not change stays where it is: a correction goes down once.
        rows = [row for row in run_rows(made.folder / "run") if row["party"] == "north"]
        down = {row["round"]: row["value"] for row in rows if row["name"] == "bytes_down"}
        assert down[4] < 0.5 * down[3]


OTHERS: dict[str, dict[str, Any]] = {
    "FFA-LoRA, by changes": {"federation.lora_rule": "FFA-LoRA", "federation.codec_down": {"name": "int4"}},
    "mixed ranks": {
        "federation.lora_rule": "FlexLoRA",
        "federation.ranks": {"north": 1},
        "train.optimizer_state": "reset",
    },
    "the best round": {"federation.keep": "best", "train.learning_rate": 0.3},
    "SCAFFOLD": {
        "federation.strategy": {"name": "SCAFFOLD"},
        "train.optim": "sgd",
        "train.learning_rate": 0.2,
    },
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=thorough if case != "FFA-LoRA, by changes" else []) for case in OTHERS]
)
def test_what_was_measured_is_what_is_delivered_with_other_rules_too(case: str, make: Make) -> None:
    made = make(job=THREE | OTHERS[case] | {"evaluate.test": "data/north-eval.jsonl"})
    result = made.run()
    assert result.status == "SUCCESS" and split(state_of(made, result))[1]
    _, judged = evaluate_run(result.path)
    measured = values(result, "loss_nats", split="common")[result.best_round or 3]
    assert judged["loss_nats"] == pytest.approx(measured, rel=1e-6)


def test_fedprox_s_pull_is_the_proximal_term(make: Make) -> None:
    """The stronger it is, the less the outer layers move away in a round."""
    norms = []
    for name, mu in {"weak": 1e-6, "strong": 100.0}.items():
        strategy = {"name": "FedProx", "proximal_mu": mu, "proximal": "decoupled"}
        changes = {"federation.strategy": strategy, "train.lr_scheduler_type": "constant", "train.local_steps": 4}
        norms.append(values(make(name, job=changes).run(), "update_norm")[2])
    assert norms[1] < 0.6 * norms[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a method without a branch": ({"peft": {"peft_type": "FULL"}}, "with FULL there is none"),
    "DoRA": ({"peft": {"r": 2, "use_dora": True}}, "scale the corrected middle"),
    "after the last round alone": ({"federation.realign_every": 2}, "no round would follow"),
    "a package in 4 bits": ({"model.load_in_4bit": True}, "cannot in weights held as nf4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_go_with_is_refused_with_a_sentence(case: str, make_federation: Make) -> None:
    changes, words = REFUSED[case]
    made = make_federation(sizes=SIZES, job=OST | REALIGN | changes)
    with pytest.raises(ConfigError) as caught:
        check_job(made.job(), made.parties())
    assert any(words in error.what and error.fix for error in [caught.value, *caught.value.also])


def test_settings_of_what_is_not_done_are_refused(make_federation: Make) -> None:
    made = make_federation(sizes=SIZES, job=OST | {"federation.realign_rank": 4})
    with pytest.raises(ConfigError, match="no effect without realign_every"):
        made.job()


def test_an_owner_needs_public_text_and_examples_held_out(make: Make) -> None:
    made = make(emulator={"public": None})
    with pytest.raises(ConfigError, match="names no public text"):
        made.run()
    file = {"name": "boss", "data": {"train": "../data/boss.jsonl", "eval_share": 0.0}}
    own = EMULATOR | {"public": "../data/public.jsonl"}
    write_yaml(made.folder / "parties" / "boss.yaml", file | {"emulator": own})
    with pytest.raises(ConfigError, match="holds no examples out"):
        made.run()


def test_an_owner_that_cannot_realign_is_missed_and_the_last_correction_stays(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(job=THREE)

    def late(context: Any, request: Any, *, deadline: float, **options: Any) -> Any:
        return realigned(context, request, deadline=0.0 if options["number"] == 2 else deadline, **options)

    realigned = fedost.realigned
    monkeypatch.setattr(fedost, "realigned", late)
    result = made.run()
    assert (result.status, values(result, "realigned")) == ("PARTIAL", {1: 1.0})
    events = [json.loads(line) for line in (result.path / "events.jsonl").read_text().splitlines()]
    failed = [(event["party"], event["code"]) for event in events if event["event"] == "party_failed"]
    assert failed == [("boss", "ROUND_TIMEOUT")]
    # It can only be that of round 1.
    assert split(adapters(result)[3])[1]


def test_who_learns_what_speaks_of_it(make: Make) -> None:
    job = make().job()
    said = " ".join(job.table_line().who_learns_what(job.federation, job.privacy))
    assert "After every round boss distils the emulator further" in said and "of rank 3" in said
    assert "Realign" in job.table_line().operations(job.federation)
    plain = job.federation.model_copy(update={"realign_every": 0, "realign_steps": None, "realign_rank": None})
    assert "Realign" not in job.table_line().operations(plain)
