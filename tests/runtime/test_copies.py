"""Each party's own copy of the adapter: delivered, traced, and the same after a crash."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import bits

from fedllm.errors import ConfigError, PayloadError, StateLost
from fedllm.job.check import check_job
from fedllm.models.deliver import WEIGHTS, merged
from fedllm.models.load import load_base
from fedllm.models.settings import ModelSettings
from fedllm.runs.folder import attach, run_identity
from fedllm.runtime.copies import TRACE_KEY, trace_run
from fedllm.runtime.delivery import write_copy
from fedllm.runtime.export import export
from fedllm.runtime.run import resume
from fedllm.runtime.site import open_site
from fedllm.wire.payload import Tensors

TRACED: dict[str, Any] = {"ownership.trace": "delivered", "peft.target_modules": "all-linear", "peft.r": 4}


def line_of(error: ConfigError) -> int:
    return int(error.where.rpartition(":")[2])


def copy_of(run: Path, party: str) -> Path:
    return run / "parties" / party / "copy"


def tensors(folder: Path) -> Tensors:
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"privacy.secure_aggregation.enabled": True},
        {"federation.lora_rule": "FedEx-LoRA"},
        {"federation.codec_down.name": "int8", "federation.keep": "last"},
    ],
    ids=["plain", "secure sums", "a higher rank", "changes travel down"],
)
def test_each_party_gets_its_own_copy_and_a_leaked_one_is_traced(make_federation: Any, more: dict[str, Any]) -> None:
    federation = make_federation(job=TRACED | more)
    run = federation.run().path
    found = {party: tensors(copy_of(run, party)) for party in ("north", "east", "south")}
    plain = tensors(run / "adapter")
    for party, copy in found.items():
        assert copy.keys() == plain.keys()
        assert {name for name in plain if bits(copy)[name] != bits(plain)[name]} == {
            name for name in plain if ".lora_B." in name and plain[name].any()
        }
        assert trace_run(copy_of(run, party), run).named == (party,)
    assert trace_run(run, run).named == ()


def test_a_leak_is_traced_in_a_whole_model_too(make_federation: Any, base: Path, tmp_path: Path) -> None:
    run = make_federation(job=TRACED).run().path
    whole = load_base(ModelSettings(model_name_or_path=str(base)), folder=base)
    merged(whole.model, copy_of(run, "east")).save_pretrained(tmp_path / "whole")
    assert trace_run(tmp_path / "whole", run).named == ("east",)
    export(run, tmp_path / "mine", merge=False, party="north")
    assert trace_run(tmp_path / "mine", run).named == ("north",)


def test_without_the_setting_all_hold_the_same_and_nothing_can_be_traced(make_federation: Any) -> None:
    federation = make_federation(job={"peft.target_modules": "all-linear"})
    run = federation.run().path
    assert not list(run.glob("parties/*/copy")) and not (run / TRACE_KEY).exists()
    with pytest.raises(ConfigError) as refused:
        trace_run(run, run)
    assert refused.value.code == "BAD_COMBINATION"


def test_copies_that_are_handed_out_again_after_a_crash_have_the_same_bits(make_federation: Any) -> None:
    run = make_federation(job=TRACED).run().path
    before = {party: bits(tensors(copy_of(run, party))) for party in ("north", "east", "south")}
    shutil.rmtree(copy_of(run, "east"))
    for name in ("result.json", "digests.json"):
        (run / name).unlink()
    resume(run)
    assert {party: bits(tensors(copy_of(run, party))) for party in before} == before


def test_a_run_whose_adapter_was_changed_accuses_nobody(make_federation: Any) -> None:
    run = make_federation(job=TRACED).run().path
    shutil.copy(copy_of(run, "east") / WEIGHTS, run / "adapter" / WEIGHTS)
    with pytest.raises(StateLost) as refused:
        trace_run(copy_of(run, "east"), run)
    assert refused.value.code == "RUN_ALTERED"


def test_a_party_takes_no_other_tensors_for_its_copy(make_federation: Any) -> None:
    federation = make_federation(job=TRACED)
    run = federation.run().path
    site, identity = open_site(federation.job(), federation.parties()), run_identity(run)
    folder = attach(run, run_id=identity["run_id"], job_digest=identity["job_digest"])
    good = site.model.initial(1)
    name = next(name for name in good if ".lora_B." in name)
    for bad in ({}, {name: good[name]}, good | {name: good[name][:-1]}):
        with pytest.raises(PayloadError) as refused:
            write_copy(site, folder, "east", bad)
        assert refused.value.code == "PAYLOAD_REFUSED"
    with pytest.raises(PayloadError) as refused:
        write_copy(site, folder, "east", good | {name: good[name] * float("nan")})
    assert refused.value.code == "NONFINITE"


@pytest.mark.parametrize(
    "more",
    [
        {"federation.lora_rule": "FedSA-LoRA"},
        {"peft.use_dora": True},
        {"peft": {"peft_type": "BITFIT"}},
    ],
    ids=["own factors", "DoRA", "no product"],
)
def test_what_has_no_copies_that_could_be_told_apart_is_refused(make_federation: Any, more: dict[str, Any]) -> None:
    federation = make_federation(job={"ownership.trace": "delivered"} | more)
    with pytest.raises(ConfigError) as refused:
        check_job(federation.job(), federation.parties())
    assert refused.value.code == "BAD_COMBINATION"
    assert (federation.folder / "job.yaml").read_text().splitlines()[line_of(refused.value) - 1].strip() == (
        "trace: delivered"
    )
