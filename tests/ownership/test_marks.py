"""Marks by themselves: they are read alike from factors and merged weights, and pulled in with any optimiser."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from claims_made import drawn_of
from tiny import save_base

from fedllm.errors import ModelError
from fedllm.models.adapter import TunableModel, skeleton
from fedllm.models.deliver import merged, save_adapter
from fedllm.models.load import load_base
from fedllm.models.settings import ModelSettings, PeftSettings
from fedllm.ownership.claims import Claim
from fedllm.ownership.marks import Mark, mark_sites, num_free, unit_rows
from fedllm.ownership.settings import OwnershipSettings
from fedllm.ownership.statistics import corrected, p_value
from fedllm.ownership.suspect import READINGS, check_base, open_suspect
from fedllm.ownership.verify import mark_values, read_marks

LORA = PeftSettings(r=4, lora_alpha=8, target_modules="all-linear")
NORMS = PeftSettings(peft_type="LN_TUNING")
BESIDE = PeftSettings(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm", "post_attention_layernorm"])
ASKED = OwnershipSettings(carrier="product", claimants=["north"])


def tunable_of(folder: Path, peft: PeftSettings) -> TunableModel:
    """Return a base model with a tuning method on it, its first values random where they would be zero."""
    base = load_base(ModelSettings(model_name_or_path=str(folder)), folder=folder)
    tunable = TunableModel(base.model, peft)
    tunable.write(tunable.initial(3))
    return tunable


def pulled(tunable: TunableModel, claim: Claim, *, steps: int = 30) -> Mark:
    """Return a mark after so many steps towards its bits, from random factors."""
    first = tunable.initial(3)
    mark = Mark(claim, tunable, first)
    draw = torch.Generator().manual_seed(5)
    tunable.write({name: value + 0.02 * torch.randn(value.shape, generator=draw) for name, value in first.items()})
    for _ in range(steps):
        mark.pull(ASKED)(0.0)
    return mark


def saved(tunable: TunableModel, base: Path, folder: Path) -> tuple[Path, Path]:
    """Return the tuned model as an adapter and merged, in folders."""
    save_adapter(tunable.read(), folder=folder / "adapter", base=base, peft=tunable.peft, name="base")
    plain = load_base(ModelSettings(model_name_or_path=str(base)), folder=base).model
    merged(plain, folder / "adapter").save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.mark.parametrize(("peft", "carrier"), [(LORA, "product"), (NORMS, "norms"), (BESIDE, "norms")])
def test_a_mark_is_read_alike_from_the_model_the_adapter_and_merged_weights(
    peft: PeftSettings, carrier: Any, base: Path, tmp_path: Path
) -> None:
    tunable = tunable_of(base, peft)
    claim = drawn_of(carrier=carrier, sites=mark_sites(tunable, carrier))
    mark = pulled(tunable, claim)
    assert bool((mark.readings() * torch.tensor(claim.signs()) >= ASKED.margin).all())
    adapter, whole = saved(tunable, base, tmp_path)
    for suspect in (open_suspect(adapter, base), open_suspect(whole, base)):
        found = mark_values(claim, suspect, READINGS[0])
        assert torch.allclose(found, mark.readings(), atol=1e-4)
        assert all(reading.matches == 32 and reading.p < 1e-9 for reading in read_marks(claim, suspect))


def test_weights_that_stand_the_other_way_round_are_read_alike(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = save_base(tmp_path / "gpt2")
    tokenizer = {path.name: path.read_bytes() for path in folder.glob("tokenizer*")}
    shutil.rmtree(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)
    for name, data in tokenizer.items():
        (folder / name).write_bytes(data)
    tunable = tunable_of(folder, LORA)
    claim = drawn_of(sites=mark_sites(tunable, "product"))
    assert all(site.transposed for site in claim.sites) and any(site.rows == site.columns for site in claim.sites)
    mark = pulled(tunable, claim)
    _, whole = saved(tunable, folder, tmp_path)
    assert torch.allclose(mark_values(claim, open_suspect(whole, folder), READINGS[0]), mark.readings(), atol=1e-4)


def test_other_factors_of_the_same_product_read_the_same(base: Path) -> None:
    tunable = tunable_of(base, LORA)
    claim = drawn_of(sites=mark_sites(tunable, "product"))
    before = pulled(tunable, claim).readings()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0] * 3
    with torch.no_grad():
        for name, value in tunable.trainable.items():
            value.copy_(torch.linalg.inv(turn) @ value if "lora_A" in name else value @ turn)
    assert torch.allclose(Mark(claim, tunable, {}).readings(), before, atol=1e-4)


@pytest.mark.parametrize("moving", ["lora_A", "lora_B"])
def test_only_what_moves_in_a_round_is_pulled(moving: str, base: Path) -> None:
    tunable = tunable_of(base, LORA)
    claim = drawn_of(sites=mark_sites(tunable, "product"))
    mark = pulled(tunable, claim, steps=0)
    before = tunable.read()
    with tunable.only(name for name in tunable.manifest if moving in name):
        for _ in range(60):
            mark.pull(ASKED)(0.0)
    changed = {name for name, value in tunable.read().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in tunable.manifest if moving in name}
    assert bool((mark.readings() * torch.tensor(claim.signs()) > 0).all())


def test_a_step_makes_up_its_share_of_what_a_bit_lacks(base: Path) -> None:
    """Of one bit alone, exactly: t is linear in B, so a step of strength a closes that share of the gap."""
    tunable = tunable_of(base, LORA)
    claim = drawn_of(sites=mark_sites(tunable, "product"), bits="1")
    mark = Mark(claim, tunable, {})
    with tunable.only(name for name in tunable.manifest if "lora_B" in name):
        mark.pull(ASKED)(0.0)
    assert float(mark.readings()) == pytest.approx(ASKED.strength * ASKED.margin, rel=1e-4)


def test_marks_that_fill_a_carrier_do_not_drive_one_another_on(base: Path) -> None:
    """Bits are a part of the noise that their margin grows with: without a bound they would grow without end."""
    tunable = tunable_of(base, NORMS)
    claim = drawn_of(carrier="norms", sites=mark_sites(tunable, "norms"), bits="01" * 50)
    mark = Mark(claim, tunable, tunable.initial(3))
    pull = mark.pull(OwnershipSettings(carrier="norms", claimants=["north"], num_bits=100))
    for _ in range(200):
        pull(0.0)
    held = mark.readings() * torch.tensor(claim.signs())
    assert bool((held > ASKED.margin).all()) and float(held.mean()) < 4 * ASKED.margin


def test_a_random_key_reads_what_its_noise_says(base: Path) -> None:
    tunable = tunable_of(base, LORA)
    claim = drawn_of(sites=mark_sites(tunable, "product"), bits="1" * 1024)
    mark = pulled(tunable, claim, steps=0)
    assert float(mark.readings().std()) == pytest.approx(mark.noise(), rel=0.15)


def test_a_foreign_key_and_flipped_bits_prove_nothing(base: Path, tmp_path: Path) -> None:
    tunable = tunable_of(base, LORA)
    claim = drawn_of(sites=mark_sites(tunable, "product"), key_seed="7" * 64, bits="0110" * 8)
    pulled(tunable, claim)
    suspect = open_suspect(saved(tunable, base, tmp_path)[0], None)
    flipped = claim.bits.translate(str.maketrans("01", "10"))
    assert read_marks(claim.model_copy(update={"bits": flipped}), suspect)[0].p == 1.0
    keys = [claim.model_copy(update={"key_seed": f"{number:064x}"}) for number in range(20)]
    foreign = [read_marks(key, suspect)[0].p for key in keys]
    assert min(foreign) > 1e-4 and max(foreign) > 0.3


def test_a_model_that_changed_nothing_has_no_mark(base: Path) -> None:
    claim = drawn_of(sites=mark_sites(skeleton(base, LORA), "product"))
    assert [reading.matches for reading in read_marks(claim, open_suspect(base, base))] == [0, 0]


def test_a_model_with_other_names_is_refused_and_not_called_unmarked(base: Path) -> None:
    claim = drawn_of(sites=mark_sites(skeleton(base, LORA), "product"))
    renamed = tuple(site.model_copy(update={"name": f"other.{site.name}"}) for site in claim.sites)
    with pytest.raises(ModelError, match="none of the 14 weights"):
        read_marks(claim.model_copy(update={"sites": renamed}), open_suspect(base, base))


@pytest.mark.parametrize("kind", ["4 bits", "8 bits", "float8", "GPTQ", "another shape"])
def test_packed_weights_are_refused_and_not_called_unmarked(kind: str, base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    claim = drawn_of(sites=mark_sites(skeleton(base, LORA), "product"))
    packed = Path(shutil.copytree(base, tmp_path / "packed"))
    tensors = load_file(packed / "model.safetensors")
    name = f"{claim.sites[-1].name}.weight"
    codes = (tensors[name] / tensors[name].abs().max() * 7).round().to(torch.int8)
    pairs = (codes + 8).to(torch.uint8).reshape(-1)
    changed = {
        # As bitsandbytes and GPTQ lay them out.
        "4 bits": {name: (pairs[::2] << 4 | pairs[1::2]).reshape(-1, 1)},
        "8 bits": {name: codes},
        "float8": {name: tensors[name].to(torch.float8_e4m3fn)},
        "GPTQ": {name.replace("weight", "qweight"): codes.to(torch.int32)[::8].contiguous()},
        "another shape": {name: tensors[name][1:].contiguous()},
    }[kind]
    del tensors[name]
    save_file(tensors | changed, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="dequantise the model first") as refused:
        read_marks(claim, open_suspect(packed, base))
    assert refused.value.code == "MODEL_MISMATCH" and next(iter(changed)) in refused.value.what


def test_an_adapter_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tunable = tunable_of(base, LORA)
    claim = drawn_of(sites=mark_sites(tunable, "product"))
    adapter, _ = saved(tunable, base, tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: tensors[name][1:].contiguous()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="MODEL_MISMATCH"):
        read_marks(claim, open_suspect(adapter, None))


def _folded(whole: Path) -> None:
    """Fold the norms' scales of a saved Llama into what reads them; the model computes what it did."""
    from safetensors.torch import load_file, save_file

    path = whole / "model.safetensors"
    tensors = load_file(path)
    readers = {"input_layernorm": "self_attn.{}_proj", "post_attention_layernorm": "mlp.{}_proj"}
    for name in [name for name in tensors if "layernorm" in name]:
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        for letter in ("q", "k", "v", "gate", "up"):
            linear = f"{block}.{readers[norm].format(letter)}.weight"
            if linear in tensors:
                tensors[linear] = tensors[linear] * tensors[name]
        tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def _logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[5, 9, 40, 77]])).logits
    return found


@pytest.fixture(scope="module")
def scaled_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose norms have scales of their own, as pretrained ones have."""
    from safetensors.torch import load_file, save_file

    folder = save_base(tmp_path_factory.mktemp("scaled") / "base")
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(2)
    for name in [name for name in tensors if "norm" in name]:
        tensors[name] = torch.exp(torch.randn(tensors[name].shape, generator=draw))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_folding_takes_bits_out_of_norms(scaled_base: Path, tmp_path: Path) -> None:
    tunable = tunable_of(scaled_base, NORMS)
    sites = tuple(site for site in mark_sites(tunable, "norms") if site.name != "model.norm")
    claim = drawn_of(carrier="norms", sites=sites, key_seed="7" * 64, bits="01" * 16)
    pulled(tunable, claim)
    _, whole = saved(tunable, scaled_base, tmp_path)
    before = _logits(whole)
    assert read_marks(claim, open_suspect(whole, scaled_base))[0].p < 1e-9
    _folded(whole)
    assert torch.allclose(_logits(whole), before, atol=1e-4)
    assert read_marks(claim, open_suspect(whole, scaled_base))[0].p > 1e-3


def test_folding_hides_bits_in_the_product_until_scales_are_taken_out(scaled_base: Path, tmp_path: Path) -> None:
    tunable = tunable_of(scaled_base, LORA)
    claim = drawn_of(sites=mark_sites(tunable, "product"), key_seed="7" * 64, bits="01" * 16)
    pulled(tunable, claim)
    _, whole = saved(tunable, scaled_base, tmp_path)
    _folded(whole)
    as_it_is, rescaled = read_marks(claim, open_suspect(whole, scaled_base))
    assert as_it_is.p > 1e-6 > 1e-9 > rescaled.p


def test_a_whole_model_needs_its_own_base(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="read against its base"):
        open_suspect(base, None)
    with pytest.raises(ModelError, match="MODEL_MISMATCH"):
        check_base(save_base(tmp_path / "other", seed=9), drawn_of().base_digest)


def test_keys_are_unit_vectors_that_follow_from_the_seed(base: Path) -> None:
    claim = drawn_of(sites=mark_sites(skeleton(base, LORA), "product"))
    rows = unit_rows(claim, claim.sites[0], "rows")
    assert torch.allclose(rows.norm(dim=1), torch.ones(32), atol=1e-5)
    assert torch.equal(rows, unit_rows(claim, claim.sites[0], "rows"))
    assert not torch.equal(rows, unit_rows(drawn_of(sites=claim.sites), claim.sites[0], "rows"))


def test_room_is_the_number_of_what_moves_freely(base: Path) -> None:
    sites = mark_sites(skeleton(base, PeftSettings(r=4, target_modules=["q_proj"])), "product")
    # Two layers of 32 x 32, rank 4: a matrix of that rank has r (R + K - r) numbers to choose.
    assert num_free(sites, rank=4) == 2 * 4 * (32 + 32 - 4)
    assert num_free(sites, rank=4, only_b=True) == 2 * 4 * 32
    assert num_free(mark_sites(skeleton(base, NORMS), "norms")) == 5 * 32


@pytest.mark.parametrize(
    ("matches", "bits", "p"), [(32, 32, 2.3283e-10), (48, 64, 3.8665e-05), (60, 64, 3.7018e-14), (110, 128, 1.2669e-17)]
)
def test_p_values_are_those_of_a_fair_coin(matches: int, bits: int, p: float) -> None:
    assert p_value(matches, bits) == pytest.approx(p, rel=1e-3)
    assert (p_value(0, bits), corrected(0.6, 2)) == (1.0, 1.0)
