"""Base models: found, refused where they could run code or are not whole, and named by their digest."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm.errors import FedllmError, ModelError
from fedllm.models.digest import base_digest, tokenizer_digest
from fedllm.models.load import find_base, load_base, load_tokenizer
from fedllm.models.settings import ModelSettings


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A copy of the base model that a test may spoil."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def find_and_load(folder: Path) -> Any:
    settings = ModelSettings(model_name_or_path=str(folder))
    return load_base(settings, folder=find_base(settings, base_dir=folder.parent))


def refused(folder: Path) -> FedllmError:
    with pytest.raises(ModelError) as caught:
        find_and_load(folder)
    assert caught.value.fix
    return caught.value


def test_a_whole_folder_is_loaded_frozen_and_in_evaluation_mode(copy: Path) -> None:
    base = find_and_load(copy)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.digest == base_digest(copy)


def test_loading_leaves_the_global_generators_as_they_were(copy: Path) -> None:
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    find_and_load(copy)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_relative_folder_starts_at_the_job_file(copy: Path) -> None:
    assert find_base(ModelSettings(model_name_or_path="copy"), base_dir=copy.parent) == copy.resolve()
    override = find_base(ModelSettings(model_name_or_path="org/name"), base_dir=copy.parent, override="./copy")
    assert override == copy.resolve()


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "../a/b/c"])
def test_a_folder_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        find_base(ModelSettings(model_name_or_path=name), base_dir=tmp_path)
    assert caught.value.code == "MODEL_NOT_FOUND"
    assert "absent" in caught.value.what or "a/b/c" in caught.value.what


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def _only_pickle(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))


def _index_to_pickle(folder: Path, canary: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model-2.bin").write_bytes(pickle.dumps(Canary(canary)))
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-2.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_to_elsewhere(folder: Path, canary: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder.parent / "elsewhere.safetensors", {"format": "pt"})
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickle_named_safetensors(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))


def _adapter_config(folder: Path, canary: Path) -> None:
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    change_json(other / "config.json", num_hidden_layers=1)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(other), "target_modules": ["q_proj"]})
    )
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary)))


def _code(where: str, value: Any) -> Callable[[Path, Path], None]:
    def change(folder: Path, canary: Path) -> None:
        (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
        change_json(folder / where, **value)

    return change


AUTO = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": "evil.T"}}


@pytest.mark.parametrize(
    "spoil",
    [
        _only_pickle,
        _index_to_pickle,
        _index_to_elsewhere,
        _pickle_named_safetensors,
        _adapter_config,
        _code("config.json", AUTO),
        _code("config.json", AUTO | {"model_type": "evil"}),
        _code("config.json", {"text_config": AUTO}),
        _code("tokenizer_config.json", AUTO),
        _code("config.json", {"_attn_implementation": "org/kernel"}),
        _code("config.json", {"attn_implementation": "org/kernel"}),
        _code("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
    ],
)
def test_a_folder_that_could_run_code_or_points_elsewhere_is_refused_and_nothing_of_it_runs(
    spoil: Callable[[Path, Path], None], copy: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    spoil(copy, canary)
    assert refused(copy).code in ("MODEL_UNSAFE", "MODEL_NOT_FOUND")
    assert not canary.exists()


def test_a_pickle_beside_the_weights_is_never_opened(copy: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "training_args.bin", "rng_state.pth"):
        (copy / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    find_and_load(copy)
    assert not (tmp_path / "canary").exists()


def test_the_canary_can_sing(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))  # noqa: S301
    assert (tmp_path / "canary").exists()


def test_missing_weights_are_refused_and_not_drawn_at_random(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    error = refused(copy)
    assert error.code == "MODEL_NOT_FOUND"
    assert "lm_head.weight" in error.what


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), str),
        (lambda folder: change_json(folder / "config.json", model_type="nothing_known"), str),
        (lambda folder: change_json(folder / "config.json", hidden_size=64), str),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
        (lambda folder: change_json(folder / "tokenizer_config.json", eos_token=None), "eos_token"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), str),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), str),
    ],
)
def test_a_broken_folder_is_refused_with_the_file_or_field(spoil: Any, word: Any, copy: Path) -> None:
    spoil(copy)
    error = refused(copy)
    assert error.code == "MODEL_NOT_FOUND"
    assert (str(copy) if word is str else word) in error.what


def test_the_digest_changes_with_weights_and_with_what_the_config_computes(copy: Path) -> None:
    first = base_digest(copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    second = base_digest(copy)
    change_json(copy / "config.json", rms_norm_eps=1e-3)
    assert len({first, second, base_digest(copy)}) == 3


def test_the_digest_does_not_change_with_what_tools_rewrite(copy: Path, tmp_path: Path) -> None:
    first = base_digest(copy)
    change_json(copy / "config.json", transformers_version="9.9", _name_or_path="else", dtype="float16")
    (copy / "README.md").write_text("x")
    assert base_digest(copy) == first
    assert base_digest(copy.rename(tmp_path / "renamed")) == first


def test_the_tokenizer_digest_is_of_what_it_does(copy: Path) -> None:
    first = load_tokenizer(copy)
    digest = tokenizer_digest(first)
    first(["a", "a longer one"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(first) == digest
    assert tokenizer_digest(load_tokenizer(copy)) == digest
    rules = json.loads((copy / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(rules))
    assert tokenizer_digest(load_tokenizer(copy)) != digest


def test_another_base_than_the_job_names_is_refused(copy: Path) -> None:
    right = ModelSettings(model_name_or_path=str(copy), base_digest=base_digest(copy))
    load_base(right, folder=copy)
    wrong = ModelSettings(model_name_or_path=str(copy), base_digest="0" * 64)
    with pytest.raises(ModelError) as caught:
        load_base(wrong, folder=copy)
    assert (caught.value.code, caught.value.where) == ("MODEL_MISMATCH", "model.base_digest")


def test_a_device_that_is_not_there_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FedllmError) as caught:
        load_base(ModelSettings(model_name_or_path=str(copy)), folder=copy, device="cuda:3")
    assert caught.value.code == "DEVICE_MISSING"
