"""Bad job, party, data and model files: a clear error that names the place and the mend, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TinyFederation, records, write_jsonl

from fedllm.errors import FedllmError, RunFailed
from fedllm.models.digest import base_digest
from fedllm.runtime.validate import validate
from fedllm.train import supervised
from fedllm.train.base import TrainSums, TrainTask

Make = Callable[..., TinyFederation]
Spoil = Callable[[TinyFederation], Any]


@dataclass(frozen=True)
class Case:
    """One bad input: what is wrong, the error's code, and words that the error must contain."""

    code: str
    words: tuple[str, ...]
    job: Mapping[str, Any] = field(default_factory=dict)
    party: Mapping[str, Any] = field(default_factory=dict)
    spoil: Spoil = lambda federation: None
    sizes: Mapping[str, int] | None = None


def text(name: str, old: str, new: str) -> Spoil:
    """Replace a piece of a file."""

    def spoil(federation: TinyFederation) -> None:
        path = federation.folder / name
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new, 1))

    return spoil


def content(name: str, data: str | bytes) -> Spoil:
    return lambda federation: (federation.folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def rows(name: str, *lines: Any) -> Spoil:
    return lambda federation: write_jsonl(federation.folder / "data" / name, list(lines))


def model(change: Callable[[Path], Any]) -> Spoil:
    """Change a copy of the base model."""

    def spoil(federation: TinyFederation) -> None:
        folder = Path(federation.job().model.model_name_or_path)
        copy = Path(shutil.copytree(folder, federation.folder / "base"))
        change(copy)
        text("job.yaml", str(folder), "base")(federation)

    return spoil


def json_file(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def directory_instead(federation: TinyFederation) -> None:
    federation.job_file.unlink()
    federation.job_file.mkdir()


def other_copy_for_one(federation: TinyFederation) -> None:
    shutil.copytree(federation.job().model.model_name_or_path, federation.folder / "copy")
    text("parties/south.yaml", "name: south", "name: south\nmodel_name_or_path: ../copy")(federation)


def no_bf16(federation: TinyFederation) -> None:
    assert not supervised.has_bf16(torch.device("cpu")), "switched off by the test"


ALONE = {"north": 4}
TWO = {"north": 4, "south": 3}
CASES: dict[str, Case] = {
    # The job file as a file.
    "no job file": Case("FILE_NOT_FOUND", ("job.yaml",), spoil=lambda f: f.job_file.unlink()),
    "a folder for a job file": Case("FILE_NOT_FOUND", ("job.yaml",), spoil=directory_instead),
    "not YAML": Case("BAD_YAML", ("job.yaml:2",), spoil=content("job.yaml", "name: x\n  seed: 1\n")),
    "tab": Case("BAD_YAML", ("job.yaml:2",), spoil=content("job.yaml", "train:\n\tlocal_steps: 1\n")),
    "a Python object": Case("BAD_YAML", ("tags", "job.yaml:1"), spoil=content("job.yaml", "name: !!python/none x\n")),
    "an alias": Case("BAD_YAML", ("anchors", "job.yaml:1"), spoil=content("job.yaml", "a: &x 1\nb: *x\n")),
    "UTF-16": Case("BAD_YAML", ("UTF-8",), spoil=content("job.yaml", "name: x".encode("utf-16"))),
    "a list": Case("BAD_YAML", ("mapping",), spoil=content("job.yaml", "- name\n")),
    "empty": Case("BAD_YAML", ("mapping",), spoil=content("job.yaml", "")),
    "a key twice": Case("DUPLICATE_KEY", ("seed", "job.yaml"), spoil=text("job.yaml", "seed: 7", "seed: 7\nseed: 8")),
    # Keys and values.
    "a typo": Case("UNKNOWN_KEY", ("learning_rat", "learning_rate", "job.yaml:"), job={"train.learning_rat": 1e-3}),
    "a typo in a section": Case("UNKNOWN_KEY", ("trian", "train"), job={"trian": {"local_steps": 1}}),
    "a typo at the strategy": Case("UNKNOWN_KEY", ("momentum",), job={"federation.strategy.momentum": 0.5}),
    "max_steps": Case("UNKNOWN_KEY", ("max_steps", "local_steps", "num_rounds"), job={"train.max_steps": 10}),
    "num_train_epochs": Case("UNKNOWN_KEY", ("local_epochs",), job={"train.num_train_epochs": 1}),
    "words for a number": Case("BAD_VALUE", ("train.learning_rate", "fast"), job={"train.learning_rate": "fast"}),
    "true for a number": Case("BAD_VALUE", ("seed",), job={"seed": True}),
    "no for false": Case("BAD_VALUE", ("train.bf16", "'no'"), spoil=text("job.yaml", "train:", "train:\n  bf16: no")),
    "a number too large": Case("BAD_VALUE", ("learning_rate",), spoil=text("job.yaml", "0.01", "1e999")),
    "below its range": Case("BAD_VALUE", ("peft.r",), job={"peft.r": 0}),
    "above its range": Case("BAD_VALUE", ("fraction_train",), job={"federation.fraction_train": 1.5}),
    "no such choice": Case("BAD_VALUE", ("train.optim", "adamw_torch"), job={"train.optim": "adamw"}),
    "no such scenario": Case("BAD_VALUE", ("scenario", "FedHomoLLM"), job={"scenario": "FedHomo"}),
    "no model": Case("MISSING_KEY", ("model",), job={"model": None}),
    "no number of rounds": Case("MISSING_KEY", ("federation.num_rounds",), job={"federation": {}}),
    "a path as a name": Case("BAD_VALUE", ("name",), job={"name": "../outside"}),
    "the same party twice": Case("BAD_VALUE", ("parties",), job={"parties": ["north", "north"]}),
    # Settings that cannot hold together.
    "steps and epochs": Case("BAD_COMBINATION", ("local_steps", "local_epochs"), job={"train.local_epochs": 1}),
    "momentum of FedAvg": Case("BAD_COMBINATION", ("momentum",), job={"federation.strategy.server_momentum": 0.5}),
    "Adam's constants for SGD": Case(
        "BAD_COMBINATION", ("adam_beta1",), job={"train.optim": "sgd", "train.adam_beta1": 0.5}
    ),
    "one party only": Case("ONE_PARTY", ("two",), sizes=ALONE),
    "a quorum out of reach": Case("BAD_COMBINATION", ("min_parties",), job={"federation.min_parties": 3}, sizes=TWO),
    "best without evaluation": Case("BAD_COMBINATION", ("eval_every",), job={"federation.eval_every": 0}),
    "packed examples' means": Case(
        "BAD_COMBINATION", ("packing",), job={"data.packing": True, "train.loss_normalization": "examples"}
    ),
    "modules in bfloat16": Case(
        "BAD_COMBINATION", ("modules_to_save",), job={"model.dtype": "bfloat16", "peft.modules_to_save": ["lm_head"]}
    ),
    "a limit of no test": Case("BAD_COMBINATION", ("max_examples",), job={"evaluate.max_examples": 3}),
    "warm-up only": Case("BAD_COMBINATION", ("warmup_steps",), job={"train.warmup_steps": 4}),
    # Files that the job names.
    "no test set": Case("FILE_NOT_FOUND", ("test.jsonl", "evaluate.test"), job={"evaluate.test": "test.jsonl"}),
    "no template": Case("FILE_NOT_FOUND", ("chat.jinja",), job={"data.chat_template_path": "chat.jinja"}),
    "a broken test set": Case(
        "DATA_BROKEN_LINE", ("test.jsonl", "2"), job={"evaluate.test": "data/test.jsonl"},
        spoil=rows("test.jsonl", records("x", 1)[0], "{"),
    ),
    # Party files.
    "no party file": Case("PARTY_UNKNOWN", ("south.yaml",), spoil=lambda f: (f.folder / "parties/south.yaml").unlink()),
    "another party's file": Case(
        "PARTY_UNKNOWN", ("south.yaml", "east"), spoil=text("parties/south.yaml", "name: south", "name: east")
    ),
    "a typo at a party": Case("UNKNOWN_KEY", ("trian", "train", ".yaml:"), party={"data.trian": "x"}),
    "a column of no layout": Case("BAD_COMBINATION", ("columns",), party={"data.columns": {"prmpt": "x"}}),
    "too many rounds": Case("POLICY_REFUSED", ("max_rounds", "party north"), party={"limits.max_rounds": 1}),
    "too few parties": Case("POLICY_REFUSED", ("min_parties",), party={"limits.min_parties": 9}),
    "scenario not allowed": Case("POLICY_REFUSED", ("allowed_scenarios",), party={"limits.allowed_scenarios": ["X"]}),
    "upload too large": Case(
        "POLICY_REFUSED", ("max_upload_bytes_per_round", "party north"), party={"limits.max_upload_bytes_per_round": 99}
    ),
    "two folders of models": Case("BAD_COMBINATION", ("2 folders",), spoil=other_copy_for_one),
    "a party's model missing": Case("MODEL_NOT_FOUND", ("absent",), party={"model_name_or_path": "./absent"}),
    "no such device": Case("BAD_VALUE", ("device",), party={"device": "gpu"}),
    "a device that is not there": Case("DEVICE_MISSING", ("cuda:7",), party={"device": "cuda:7"}),
    # Data.
    "no data": Case("DATA_NOT_FOUND", ("absent.jsonl",), party={"data.train": "absent.jsonl"}),
    "no held-out data": Case("DATA_NOT_FOUND", ("absent.jsonl",), party={"data.eval": "absent.jsonl"}),
    "an empty party": Case("DATA_EMPTY", ("south.jsonl",), spoil=rows("south.jsonl")),
    "one example to split": Case(
        "DATA_EMPTY", ("party south",), party={"data.eval": None}, spoil=rows("south.jsonl", records("x", 1)[0])
    ),
    "a broken line": Case(
        "DATA_BROKEN_LINE", ("south.jsonl:2",), spoil=rows("south.jsonl", records("x", 1)[0], '{"prompt": "x"')
    ),
    "a line of another kind": Case(
        "DATA_BROKEN_LINE", ("south.jsonl:2",), spoil=rows("south.jsonl", records("x", 1)[0], "[1, 2]")
    ),
    "no known layout": Case("DATA_FORMAT_UNKNOWN", ("south.jsonl", "frage"), spoil=rows("south.jsonl", {"frage": "x"})),
    "a mapped column missing": Case(
        "DATA_COLUMN_MISSING", ("north.jsonl", "question"), party={"data.columns": {"prompt": "question"}}
    ),
    "nothing left to train": Case("DATA_NO_TARGET", ("max_length", "party north"), job={"data.max_length": 2}),
    "chats without a template": Case(
        "DATA_NO_TEMPLATE", ("template",),
        spoil=rows("south.jsonl", {"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}),
    ),
    # The base model.
    "no model folder": Case("MODEL_NOT_FOUND", ("absent",), job={"model.model_name_or_path": "./absent"}),
    "no config": Case("MODEL_NOT_FOUND", ("config.json",), spoil=model(lambda m: (m / "config.json").unlink())),
    "pickled weights": Case(
        "MODEL_UNSAFE", ("safetensors",),
        spoil=model(lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin")),
    ),
    "code in the model": Case(
        "MODEL_UNSAFE", ("auto_map",),
        spoil=model(lambda m: json_file(m / "config.json", auto_map={"AutoConfig": "x.Y"})),
    ),
    "an adapter for a model": Case(
        "MODEL_UNSAFE", ("adapter",), spoil=model(lambda m: (m / "adapter_config.json").write_text("{}"))
    ),
    "a foreign model": Case("MODEL_MISMATCH", ("digest", "base"), job={"model.base_digest": "0" * 64}),
    "no tokenizer": Case("MODEL_NOT_FOUND", ("tokenizer",), spoil=model(lambda m: (m / "tokenizer.json").unlink())),
    "no stop token": Case(
        "MODEL_NOT_FOUND", ("eos_token",), spoil=model(lambda m: json_file(m / "tokenizer_config.json", eos_token=None))
    ),
    "attention that is not installed": Case(
        "DEVICE_MISSING", ("flash_attention_2", "attn_implementation"),
        job={"model.attn_implementation": "flash_attention_2"},
    ),
    "no such module": Case("PEFT_TARGET", ("q_prj", "q_proj"), job={"peft.target_modules": ["q_prj"]}),
    "one such module": Case("PEFT_TARGET", ("v_prj",), job={"peft.target_modules": ["q_proj", "v_prj"]}),
    "no such module in full": Case("PEFT_TARGET", ("lm_hed",), job={"peft.modules_to_save": ["lm_hed"]}),
}  # fmt: skip
# What only those find out who load the weights: `fedllm validate` does not.
AT_LOADING: dict[str, Case] = {
    "weights missing": Case("MODEL_NOT_FOUND", ("up_proj",), spoil=model(without_a_weight)),
    "no bfloat16": Case("DEVICE_MISSING", ("bfloat16", "train.bf16"), job={"train.bf16": True}, spoil=no_bf16),
}


class Untouched:
    """A trainer that must not be asked."""

    def train(self, task: TrainTask, optimizer: torch.optim.Optimizer) -> TrainSums:
        raise AssertionError("training began")


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(supervised, "has_bf16", lambda device: False)


def check(error: FedllmError, case: Case) -> None:
    told = f"{error.where} {error.what} {error.fix}"
    assert error.code == case.code, error
    for word in case.words:
        assert word in told, (word, told)
    assert error.fix, error
    assert error.where, error
    assert "Traceback" not in told
    for other in error.also:
        assert other.what


def made(make_federation: Make, case: Case) -> TinyFederation:
    federation = make_federation(sizes=case.sizes, job=case.job, party=case.party)
    case.spoil(federation)
    return federation


@pytest.mark.parametrize("name", [*CASES, *AT_LOADING])
def test_a_run_is_refused_before_there_is_a_run_folder(name: str, make_federation: Make) -> None:
    case = (CASES | AT_LOADING)[name]
    federation = made(make_federation, case)
    with pytest.raises(FedllmError) as caught:
        federation.run(trainer=Untouched())
    check(caught.value, case)
    assert not (federation.folder / "run").exists()


@pytest.mark.parametrize("name", CASES)
def test_validate_says_the_same(name: str, make_federation: Make) -> None:
    case = CASES[name]
    federation = made(make_federation, case)
    with pytest.raises(FedllmError) as caught:
        validate(federation.job(), federation.parties())
    check(caught.value, case)


@pytest.mark.parametrize("name", ["an empty party", "a foreign model", "no such module", "nothing left to train"])
def test_with_workers_it_is_refused_as_early(name: str, make_federation: Make) -> None:
    case = CASES[name]
    federation = made(make_federation, case)
    with pytest.raises(FedllmError) as caught:
        federation.run(num_workers=2)
    check(caught.value, case)
    assert not (federation.folder / "run").exists()


def test_the_federation_of_the_cases_is_sound_itself(make_federation: Make) -> None:
    federation = make_federation()
    validate(federation.job(), federation.parties())
    assert federation.run().status == "SUCCESS"


def test_the_right_digest_is_accepted(make_federation: Make, base: Path) -> None:
    federation = make_federation(job={"model.base_digest": base_digest(base)})
    validate(federation.job(), federation.parties())
    assert federation.run().status == "SUCCESS"


def test_a_run_folder_in_use_is_refused_and_left_alone(make_federation: Make) -> None:
    federation = make_federation()
    (federation.folder / "run").mkdir()
    (federation.folder / "run" / "diary.txt").write_text("mine")
    with pytest.raises(FedllmError) as caught:
        federation.run(trainer=Untouched())
    assert (caught.value.code, caught.value.where) == ("RUN_EXISTS", str(federation.folder / "run"))
    assert [path.name for path in (federation.folder / "run").iterdir()] == ["diary.txt"]


def test_a_file_where_the_run_folder_should_be_is_refused(make_federation: Make) -> None:
    federation = make_federation()
    (federation.folder / "run").write_text("mine")
    with pytest.raises(FedllmError, match="RUN_EXISTS"):
        federation.run(trainer=Untouched())


def test_training_that_diverges_fails_by_name_and_round(make_federation: Make) -> None:
    changes = {"train.learning_rate": 1e30, "train.optim": "sgd", "train.local_steps": 3, "train.max_grad_norm": 0}
    # Gate and up are multiplied: two numbers of 1e28 are inf on any machine, and inf of both signs is added up.
    federation = make_federation(job=changes | {"peft.target_modules": "all-linear"})
    with pytest.raises(RunFailed) as caught:
        federation.run()
    assert (caught.value.code, caught.value.where) == ("QUORUM", "round 1")
    assert "north: NONFINITE" in caught.value.what
    verdict = json.loads((federation.folder / "run" / "result.json").read_text())
    assert verdict["status"] == "FAILED"
    assert "NONFINITE" in verdict["reason"]


def test_no_error_tells_of_the_data_s_content(make_federation: Make) -> None:
    federation = make_federation()
    write_jsonl(federation.folder / "data" / "south.jsonl", [records("x", 1)[0], '{"prompt": "Alice pays 300'])
    with pytest.raises(FedllmError) as caught:
        federation.run()
    assert "Alice" not in str(caught.value)


def test_there_are_enough_cases() -> None:
    assert len(CASES) + len(AT_LOADING) >= 40
