"""FedOST: what is tuned on an emulator is plugged into the whole model, and the whole model stays with its owner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounds import check_the_plan
from safetensors.torch import load, load_file
from tiny import TinyFederation, bits, records, save_base, write_jsonl, write_yaml

from fedllm.errors import ConfigError, ModelError
from fedllm.job.check import check_job
from fedllm.job.job import Job, load_parties
from fedllm.models.deliver import load_adapter
from fedllm.models.load import load_base
from fedllm.models.scan import matches, secret_tensors
from fedllm.models.settings import ModelSettings
from fedllm.runtime.compare import compare
from fedllm.runtime.emulator import Owner, check, make_package, owner_of
from fedllm.runtime.host import PartyHost
from fedllm.runtime.run import resume, run_local
from fedllm.wire.blob import whole
from fedllm.wire.codecs import Codec, CodecSettings
from fedllm.wire.frame import unpack

SIZES = {"north": 6, "east": 9, "south": 4, "boss": 5}
OST: dict[str, Any] = {
    "scenario": "FedOST",
    "federation.owner": "boss",
    "federation.keep": "last",
    "model.model_name_or_path": "package",
    "peft": {"peft_type": "LORA", "r": 2, "lora_alpha": 4},
}
EMULATOR: dict[str, Any] = {"full_model_name_or_path": "../full", "bottom": 1, "top": 1, "middle": 2}
Make = Callable[..., TinyFederation]


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's model: six random layers."""
    return save_base(tmp_path_factory.mktemp("full"), num_hidden_layers=6)


@pytest.fixture
def make_offsite(make_federation: Make, full: Path) -> Callable[..., TinyFederation]:
    """A function that writes a federation with an owner, and its package."""

    def make(
        name: str = "offsite", *, job: dict[str, Any] | None = None, emulator: dict[str, Any] | None = None
    ) -> TinyFederation:
        made: TinyFederation = make_federation(name, sizes=SIZES, job=OST | (job or {}))
        (made.folder / "full").symlink_to(full)
        write_jsonl(made.folder / "data" / "public.jsonl", records("public", 12))
        file = {"name": "boss", "data": {"train": "../data/boss.jsonl", "eval": "../data/boss-eval.jsonl"}}
        settings = EMULATOR | (emulator or {})
        settings = {key: value for key, value in settings.items() if value is not None}
        write_yaml(made.folder / "parties" / "boss.yaml", file | {"emulator": settings})
        make_package(owner(made), made.folder / "package")
        return made

    return make


def owner(made: TinyFederation) -> Owner:
    return owner_of(made.job())


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter" / "adapter_model.safetensors")


WHOLE = {"way": "whole", "middle": None}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "full": {"peft": {"peft_type": "FULL"}},
    "bottlenecks": {
        "peft": {"peft_type": "BOTTLENECK", "bottleneck_size": 4},
        "federation.deliver_to_owner": "adapter",
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_with_the_whole_middle_the_plugged_model_is_the_directly_tuned_one_bit_for_bit(
    method: str, make_offsite: Make, full: Path
) -> None:
    made = make_offsite(job=METHODS[method] | {"evaluate.test": "data/north-eval.jsonl"}, emulator=WHOLE)
    result = made.run()
    assert result.status == "SUCCESS"
    # The same layers tuned directly: the owner's model is the base, cut alike, and nobody plugs anything in.
    direct = make_offsite("direct", job=METHODS[method] | {"federation.plug_every": 0}, emulator=WHOLE)
    site = owner(direct)
    base = site.full.load()
    base.model.save_pretrained(direct.folder / "cut")
    base.tokenizer.save_pretrained(direct.folder / "cut")
    job = Job.from_yaml(direct.job_file, overrides=["model.model_name_or_path=cut"])
    tuned = run_local(job, parties=load_parties(job), output=direct.folder / "run")
    assert bits(weights(result.path)) == bits(weights(tuned.path))
    rows = {(row["round"], row["split"]): row["value"] for row in result.rows() if row["name"] == "loss_nats"}
    for number in (0, 1, 2):
        assert rows[number, "plugged"] == rows[number, "emulator"]
        assert rows[number, "plugged_common"] == rows[number, "emulator_common"]
    # What the owner got computes what the direct model computes.
    delivered = result.path / "parties" / "boss" / ("adapter" if method == "bottlenecks" else "model")
    text = torch.arange(5, 15).reshape(1, -1)
    reference = load_adapter(
        load_base(ModelSettings(model_name_or_path="cut"), folder=direct.folder / "cut").model, tuned.path / "adapter"
    )
    found = (
        load_adapter(load_base(ModelSettings(model_name_or_path="full"), folder=full).model, delivered)
        if method == "bottlenecks"
        else load_base(ModelSettings(model_name_or_path="model"), folder=delivered).model
    )
    with torch.no_grad():
        got, expected = found(text).logits, reference(text).logits
    if method == "LoRA":
        # Of its factors, which are what is tuned, no bit differs (above); here W + s B A is added up beforehand in the
        # one model and in each forward pass in the other, so sums are rounded in another order.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(got, expected)


def test_only_outer_layers_travel(make_offsite: Make) -> None:
    result = make_offsite().run()
    names = weights(result.path)
    assert {name.split("layers.")[1].split(".")[0] for name in names} == {"0", "3"}


def test_secure_sums_change_no_bit(make_offsite: Make) -> None:
    found = {}
    for name, changes in {"plain": {}, "secure": {"privacy.secure_aggregation": {"enabled": True}}}.items():
        result = make_offsite(name, job=changes).run()
        rows = [row for row in result.rows() if not row["name"].startswith(("seconds", "bytes"))]
        found[name] = result.status, result.adapter_sha256, rows
    assert found["plain"] == found["secure"]
    assert found["plain"][0] == "SUCCESS"


def test_noise_is_added_and_paid_for_by_those_who_train(make_offsite: Make) -> None:
    noise = {"unit": "example", "noise_multiplier": 1.0, "accountant": "RDP"}
    result = make_offsite(job={"privacy.differential_privacy": noise}).run()
    spent = {row["party"] for row in result.rows() if row["name"] == "epsilon_spent"}
    assert (result.status, spent) == ("SUCCESS", {"north", "east", "south"})


def test_a_run_that_stops_and_goes_on_has_the_same_bits(make_offsite: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_offsite(job={"federation.num_rounds": 3})
    expected = made.run("unbroken")
    handle, count = PartyHost.handle, [0]

    def failing(self: PartyHost, parcel: Any, *, timeout_s: float) -> Any:
        count[0] += 1
        if count[0] == 25:
            raise KeyboardInterrupt
        return handle(self, parcel, timeout_s=timeout_s)

    monkeypatch.setattr(PartyHost, "handle", failing)
    with pytest.raises(KeyboardInterrupt):
        made.run("broken")
    result = resume(made.folder / "broken")
    assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256)
    assert owners_files(result.path) == owners_files(expected.path)


def owners_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "parties" / "boss" / "model").iterdir()}


@pytest.mark.parametrize("to_clients", ["adapter", "service", "nothing"])
def test_each_side_gets_what_the_job_says_and_nothing_else(to_clients: str, make_offsite: Make) -> None:
    result = make_offsite(job={"federation.deliver_to_clients": to_clients}).run()
    got = {path.parent.name for path in result.path.glob("parties/*/adapter")}
    assert got == (set(SIZES) - {"boss"} if to_clients == "adapter" else set())
    assert result.adapter.is_dir() == (to_clients == "adapter")
    assert (result.path / "parties" / "boss" / "model" / "config.json").is_file()
    assert not list(result.path.glob("parties/[!b]*/model"))
    reason = json.loads((result.path / "result.json").read_text())["reason"]
    assert {"adapter": "adapter for their emulator", "service": "as a service", "nothing": "get nothing"}[
        to_clients
    ] in reason


def held_by(
    made: TinyFederation, run: Path, received: dict[str, list[dict[str, torch.Tensor]]], party: str
) -> dict[str, torch.Tensor]:
    """Return every tensor that a client got or has: the package, each message, and its files of the run."""
    files = [*(made.folder / "package").rglob("*.safetensors"), *(run / "parties" / party).rglob("*.safetensors")]
    found = {f"{path.name}:{name}": tensor for path in files for name, tensor in load_file(path).items()}
    for number, tensors in enumerate(received[party]):
        found |= {f"message {number}:{name}": tensor for name, tensor in tensors.items()}
    return found


@pytest.mark.parametrize("storage", ["float32", "int8", "int4"])
def test_no_client_ever_holds_a_block_that_was_left_out(
    storage: str, make_offsite: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_offsite(job={"federation.num_rounds": 1}, emulator={"storage": storage})
    received: dict[str, list[Any]] = {party: [] for party in SIZES}
    handle = PartyHost.handle

    def noting(self: PartyHost, parcel: Any, *, timeout_s: float) -> Any:
        frame = unpack(parcel, max_bytes=2**40)
        if frame.blob:
            received[self.party].append(load(bytes(whole(frame.blob))))
        return handle(self, parcel, timeout_s=timeout_s)

    monkeypatch.setattr(PartyHost, "handle", noting)
    result = made.run()
    site = owner(made)
    model = site.full.load().model
    slots = {"model.layers": [0, 1, 4, 5]}
    secret = secret_tensors(model, slots, site.full.cut)
    assert {name.split(".")[2] for name in secret} == {"2", "3"}
    allowed = {name: tensor for name, tensor in model.state_dict().items() if name not in secret}
    for party in set(SIZES) - {"boss"}:
        held = held_by(made, result.path, received, party)
        assert received[party] and len(held) > 40
        assert matches(held, secret, allowed=allowed) == []
    # The search does find such a block: planted whole, and in the precision that the package has.
    planted = model.state_dict()["model.layers.3.mlp.up_proj.weight"]
    copy = (
        {"x": planted}
        if storage == "float32"
        else Codec(CodecSettings(name=storage, error_feedback=True)).encode({"x": planted}, seed=0, party="", number=0)
    )
    found = matches(copy | {"turned": planted.t().contiguous()}, secret, allowed=allowed)
    assert {match.secret for match in found} == {"model.layers.3.mlp.up_proj.weight"}
    assert len({match.held for match in found}) == 2


def test_the_owner_is_asked_for_no_update_and_trains_nothing(make_offsite: Make) -> None:
    result = make_offsite().run()
    rows = [row for row in result.rows() if row["party"] == "boss" and row["split"] == "train"]
    assert rows == []
    assert not list((result.path / "parties" / "boss").glob("states/*"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the owner is no party": ({"federation.owner": "nobody"}, "'nobody' is no party of the job"),
    "virtual tokens": ({"peft": {"peft_type": "PREFIX_TUNING"}}, "PREFIX_TUNING works on the whole model"),
    "whole modules": ({"peft": {"r": 2, "modules_to_save": ["lm_head"]}}, "`modules_to_save` are modules"),
    "a rule that folds": ({"federation.lora_rule": "FLoRA"}, "FLoRA leaves more behind"),
    "a model of bottlenecks": ({"peft": {"peft_type": "BOTTLENECK"}}, "what BOTTLENECK adds cannot be written"),
    "a service of nothing": (
        {"federation.deliver_to_owner": "nothing", "federation.deliver_to_clients": "service"},
        "has no tuned model to serve",
    ),
    "more parties than train": ({"federation.min_parties": 4}, "3 parties that train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_is_refused_before_anything_starts(case: str, make_federation: Make) -> None:
    changes, words = REFUSED[case]
    made = make_federation(sizes=SIZES, job=OST | changes)
    with pytest.raises(ConfigError) as caught:
        check_job(made.job(), made.parties())
    assert any(words in error.what for error in [caught.value, *caught.value.also])


def test_an_owner_without_its_model_is_told_so(make_federation: Make, full: Path) -> None:
    made = make_federation(sizes=SIZES, job=OST | {"model.model_name_or_path": str(full)})
    with pytest.raises(ConfigError, match="does not say where the whole model is"):
        made.run()


def test_a_package_of_another_model_is_refused(make_offsite: Make, tmp_path: Path) -> None:
    made = make_offsite()
    (made.folder / "full").unlink()
    save_base(made.folder / "full", num_hidden_layers=6, seed=1)
    with pytest.raises(ModelError, match="differ outside of the middle"):
        check(owner(made))


def test_the_plan_foretells_the_bytes(make_offsite: Make) -> None:
    check_the_plan(make_offsite(job={"federation.num_rounds": 3}))


def test_the_report_shows_plug_beside_the_emulator(make_offsite: Make) -> None:
    report = (make_offsite().run().path / "report.html").read_text(encoding="utf-8")
    assert "The owner&#39;s model and its emulator" in report
    assert "boss, the owner, gets the whole tuned model" in report


def test_a_comparison_leaves_the_owner_s_data_out(make_offsite: Make) -> None:
    made = make_offsite(job={"federation.num_rounds": 1, "train.local_steps": 1})
    found = compare(made.job(), output=made.folder / "run")
    assert [row["party"] for row in found.rows if row["kind"] == "alone"] == ["north", "east", "south"]
