"""Emulators of every family with blocks: the right layers, one cache as without it, the same after saving."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.errors import ConfigError, ModelError
from fedllm.models.adapter import TunableModel
from fedllm.models.blocks import Cut, stacks, tuned_prefixes
from fedllm.models.deliver import load_adapter, save_adapter
from fedllm.models.emulator import Profile, choose, crash, influence, profile, share_repeated, sliced, uniform
from fedllm.models.load import load_base
from fedllm.models.package import MIDDLE, Made, read_note, write_package
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.tasks import Task

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
import families

CUT = Cut(1, 1)
_SIX = {
    "gpt2": {"n_layer": 6},
    "bloom": {"n_layer": 6},
    "t5": {"num_layers": 6, "num_decoder_layers": 5},
    "bart": {"encoder_layers": 6, "decoder_layers": 5},
}
NAMES = (*families.DECODERS, *families.ENCODER_DECODERS)


def deep_model(family: str) -> Any:
    """Return a random model of six blocks, or six and five."""
    import transformers

    from fedllm.seeds import global_generators_kept

    config = families.config_of(family)
    for key, value in _SIX.get(family, {"num_hidden_layers": 6}).items():
        setattr(config, key, value)
    values = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    config = type(config).from_dict(values)
    auto = transformers.AutoModelForSeq2SeqLM if is_pair(family) else transformers.AutoModelForCausalLM
    with global_generators_kept():
        model = auto.from_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model.requires_grad_(False).eval()


def is_pair(family: str) -> bool:
    return family in families.ENCODER_DECODERS


def text() -> torch.Tensor:
    return torch.arange(5, 17).reshape(2, 6)


def logits(model: Any, family: str, **more: Any) -> torch.Tensor:
    more |= {"decoder_input_ids": text()[:, :3]} if is_pair(family) else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=text(), **more).logits
    return found


def written(model: Any, tmp_path: Path, *, cut: Cut = CUT, storage: Any = "float32") -> Path:
    from tiny import make_tokenizer

    return write_package(Made(model, make_tokenizer(), cut, "uniform", False), tmp_path / "package", storage=storage)


def loaded(folder: Path, family: str = "llama") -> Any:
    task = Task("seq2seq_lm" if is_pair(family) else "causal_lm", ())
    return load_base(ModelSettings(model_name_or_path="package"), folder=folder, task=task).model


@pytest.mark.parametrize("family", NAMES)
def test_an_emulator_computes_what_the_kept_layers_compute_and_is_the_same_after_saving(
    family: str, tmp_path: Path
) -> None:
    model = deep_model(family)
    slots = choose(model, CUT, way="uniform", keep=2)
    emulator = sliced(model, slots, CUT)
    before = logits(emulator, family)
    assert torch.isfinite(before).all()
    # Without the layers that are left out the whole model computes the same: each of them put out of action by hand.
    for path, blocks in stacks(model).items():
        skipped(model, path, [blocks[index] for index in slots[path]])
        if types := getattr(model.config, "layer_types", None):
            model.config.layer_types = [types[index] for index in slots[path]]
    torch.testing.assert_close(logits(model, family, use_cache=False), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(emulator, family, use_cache=False), before, rtol=1e-4, atol=1e-5)
    generated = [
        emulator.generate(text()[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*generated)
    again = loaded(written(emulator, tmp_path), family)
    assert torch.equal(logits(again, family), before)
    assert {path: len(blocks) for path, blocks in stacks(again).items()} == {path: len(s) for path, s in slots.items()}


def skipped(model: Any, path: str, kept: list[Any]) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.ModuleList(kept))
    for name in ("layers", "num_layers"):
        if isinstance(getattr(model.get_submodule(owner), name, None), int):
            setattr(model.get_submodule(owner), name, len(kept))


def test_uniform_keeps_the_blocks_of_the_paper_s_formula() -> None:
    assert uniform(range(2, 6), 3, None) == [2, 4, 5]
    assert uniform(range(2, 6), 2, None) == [2, 5]
    assert uniform(range(2, 22), 8, None) == [2, 5, 7, 10, 13, 16, 18, 21]
    assert uniform(range(1, 4), 1, None) == [2]
    assert [len(set(uniform(range(20), keep, None))) for keep in range(1, 21)] == list(range(1, 21))


def test_influence_keeps_the_blocks_that_change_most_in_their_order() -> None:
    found = Profile(torch.tensor([9.0, 0.1, 0.5, 0.3, 0.4, 9.0]), torch.eye(6))
    assert influence(range(1, 5), 2, found) == [2, 4]


def test_crash_repeats_each_cluster_s_central_block_in_all_of_its_places() -> None:
    likeness = torch.eye(6)
    for one, other, value in ((1, 2, 0.9), (2, 3, 0.8), (1, 3, 0.7), (3, 4, 0.1), (2, 4, 0.1), (1, 4, 0.1)):
        likeness[one, other] = likeness[other, one] = value
    assert crash(range(1, 5), 2, Profile(torch.zeros(6), likeness)) == [2, 2, 2, 4]


def test_a_profile_measures_what_blocks_do_by_hand() -> None:
    model = deep_model("llama")
    ids = text()
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found = profile(model, [batch])["model.layers"]
    # The last of transformers' states is behind the final norm.
    by_hand = [1 - torch.cosine_similarity(states[i], states[i + 1], dim=-1).mean() for i in range(5)]
    torch.testing.assert_close(found.influence[:5], torch.stack(by_hand), rtol=1e-4, atol=1e-5)
    alike = torch.cosine_similarity(states[2], states[4], dim=-1).mean()
    torch.testing.assert_close(found.likeness[1, 3], alike, rtol=1e-4, atol=1e-5)


def test_repeated_blocks_are_trained_as_one_and_saved_as_several(tmp_path: Path) -> None:
    model = deep_model("llama")
    slots = {"model.layers": [0, 2, 2, 4, 4, 5]}
    emulator = sliced(model, slots, CUT)
    before = logits(emulator, "llama")
    share_repeated(emulator, slots)
    assert torch.equal(logits(emulator, "llama"), before)
    with torch.no_grad():
        emulator.model.layers[1].mlp.up_proj.weight.add_(0.1)
    assert torch.equal(emulator.model.layers[1].mlp.up_proj.weight, emulator.model.layers[2].mlp.up_proj.weight)
    assert torch.equal(logits(loaded(written(emulator, tmp_path)), "llama"), logits(emulator, "llama"))


@pytest.mark.parametrize(("storage", "step"), [("int8", 127), ("int4", 7)])
def test_a_package_in_few_bits_is_smaller_and_off_by_half_a_step_at_most(
    storage: str, step: int, tmp_path: Path
) -> None:
    model = sliced(deep_model("llama"), {"model.layers": [0, 2, 3, 5]}, CUT)
    folder = written(model, tmp_path, storage=storage)
    again = loaded(folder).state_dict()
    for name, tensor in model.state_dict().items():
        is_middle = name.startswith(("model.layers.1.", "model.layers.2.")) and tensor.dim() > 1
        bound = float(tensor.abs().max()) / step * 0.51 if is_middle else 0.0
        assert float((again[name] - tensor).abs().max()) <= bound
        assert not is_middle or not torch.equal(again[name], tensor)
    assert read_note(folder)["storage"] == storage
    # A damaged file is found, not loaded as noise.
    (folder / MIDDLE).write_bytes((folder / MIDDLE).read_bytes()[:-8])
    with pytest.raises(ModelError, match="damaged"):
        loaded(folder)


LINEAR: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2},
    "ADALORA": {"init_r": 2, "target_r": 1},
    "VERA": {"r": 4},
    "IA3": {},
    "LN_TUNING": {},
    "BOTTLENECK": {"bottleneck_size": 2},
    "FULL": {},
}


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_only_outer_layers_are_tuned_by_any_method(method: str, family: str, tmp_path: Path) -> None:
    model = deep_model(family)
    emulator = sliced(model, choose(model, CUT, way="uniform", keep=2), CUT)
    task = "seq2seq_lm" if is_pair(family) else "causal_lm"
    folder = written(emulator, tmp_path)
    prefixes = tuned_prefixes(emulator)
    tunable = TunableModel(emulator, PeftSettings.model_validate({"peft_type": method} | LINEAR[method]), task)
    names = [name.removeprefix("base_model.model.") for name in tunable.trainable]
    assert prefixes and names and all(name.startswith(prefixes) for name in names)
    # Each of the layers is tuned, and what is delivered loads on the package.
    assert {prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)} == set(prefixes)
    tensors = {name: tensor + 0.01 for name, tensor in tunable.initial(1).items()}
    tunable.write(tensors)
    expected = logits(tunable.model, family)
    save_adapter(tensors, folder=tmp_path / "a", base=folder, peft=tunable.peft, name="x", task=Task(task, ()))
    again = load_adapter(loaded(folder, family), tmp_path / "a")
    torch.testing.assert_close(logits(again, family), expected, rtol=1e-4, atol=1e-5)


def test_virtual_tokens_are_refused_on_a_package() -> None:
    model = deep_model("llama")
    emulator = sliced(model, choose(model, CUT, way="uniform", keep=2), CUT)
    with pytest.raises(ModelError, match="only the outer layers"):
        TunableModel(emulator, PeftSettings(peft_type="PREFIX_TUNING"))


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 6 blocks"):
        choose(deep_model("llama"), Cut(3, 3), way="uniform")
    with pytest.raises(ModelError, match="positions"):
        sliced(deep_model("t5"), {"encoder.block": [1, 5], "decoder.block": [0, 4]}, Cut(0, 1))
