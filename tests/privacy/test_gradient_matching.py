"""Whole texts rebuilt from a client's update of one step, and what stops that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from reference_dp import ReferenceDP
from tiny import thorough
from updates import tunable, update_of, warm_start

from fedllm.evaluate.text_metrics import score_texts
from fedllm.models.adapter import TunableModel
from fedllm.privacy.gradient_matching import Rebuilt, rebuild_text, update_mismatch
from fedllm.privacy.inversion import first_inputs, token_distances, token_distances_by_b
from fedllm.seeds import stream, torch_generator
from fedllm.wire.payload import Tensors

LENGTH = 6
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.0}


@dataclass(frozen=True)
class Spy:
    """A server that keeps what it sent and looks at what it gets."""

    model: TunableModel
    start: Tensors
    inputs: torch.Tensor

    def update(self, text: Sequence[int], **options: Any) -> Tensors:
        return update_of(self.model, self.start, [text], **options)

    def rebuild(
        self,
        update: Tensors,
        *,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        words: int = LENGTH + 4,
        cold: bool = False,
        most: int = 15_000,
    ) -> Rebuilt:
        """Return the text that fits best, of as many words as the span test ranks first."""
        self.model.model.eval()
        distances = (
            token_distances_by_b(self.inputs, update, self.start)
            if cold
            else token_distances(self.inputs, [update], directions=LENGTH)
        )
        found = update_mismatch(self.model.model, self.start, update, optimizer=optimizer)
        return rebuild_text(
            found,
            distances.argsort()[:words],
            last=torch.arange(300),
            length=LENGTH,
            generator=torch_generator(0, "test", "rebuild"),
            most=most,
        )


def spy(base: Path, *, cold: bool = False, **peft: Any) -> Spy:
    torch.set_num_threads(1)
    model = tunable(base, **({"target_modules": "all-linear"} if "peft_type" not in peft else {}) | peft)
    start = model.initial(3) if cold else warm_start(model, stream(0, "test", "warm"))
    return Spy(model, start, first_inputs(model.model))


def text_of(number: int, length: int = LENGTH) -> list[int]:
    return [int(word) for word in stream(0, "test", "text", number).integers(3, 300, length)]


def rouge(found: Rebuilt, text: Sequence[int]) -> float:
    """Return ROUGE-L of the words, 0 to 100."""
    prediction, reference = (" ".join(f"w{word}" for word in words) for words in (found.text, text))
    return score_texts([prediction], [reference]).rougeL


def test_a_text_fits_its_own_update(base: Path) -> None:
    found = spy(base)
    text = text_of(1)
    other = [*text[:3], text[3] + 1, *text[4:]]
    mismatch = update_mismatch(found.model.model, found.start, found.update(text))
    values = mismatch(torch.tensor([text, other, text[::-1]]))
    assert values[0] < 1e-3 < 0.01 < values[1:].min()


def test_a_text_is_rebuilt_word_for_word_from_lora_s_update(base: Path) -> None:
    server = spy(base)
    for number in range(2):
        found = server.rebuild(server.update(text_of(number)))
        assert list(found.text) == text_of(number) and found.mismatch < 1e-3


def test_a_text_is_rebuilt_from_the_update_of_all_parameters(base: Path) -> None:
    server = spy(base, peft_type="FULL")
    assert list(server.rebuild(server.update(text_of(3))).text) == text_of(3)


def test_a_text_is_rebuilt_in_the_first_round_from_factor_b(base: Path) -> None:
    server = spy(base, cold=True)
    assert list(server.rebuild(server.update(text_of(4)), cold=True).text) == text_of(4)


@thorough
def test_where_the_rank_is_below_the_words_a_text_is_still_rebuilt(base: Path) -> None:
    """The span test names no word for sure, so that a hundred are tried."""
    server = spy(base, r=2)
    found = server.rebuild(server.update(text_of(5)), words=100)
    assert rouge(found, text_of(5)) > 85


def test_adamw_does_not_hide_the_text(base: Path) -> None:
    server = spy(base)
    found = server.rebuild(server.update(text_of(6), train=ADAMW), optimizer="adamw", words=40, most=8_000)
    assert rouge(found, text_of(6)) > 85


def test_adamw_s_first_step_is_simulated_by_the_sign(base: Path) -> None:
    server = spy(base)
    text, update = torch.tensor([text_of(6)]), server.update(text_of(6), train=ADAMW)
    fits = {
        name: float(update_mismatch(server.model.model, server.start, update, optimizer=name)(text)[0])
        for name in ("sgd", "adamw")
    }
    assert fits["adamw"] < 0.05 < 0.3 < fits["sgd"]


def sum_of(server: Spy, number: int, *, each: int) -> tuple[Tensors, list[list[int]]]:
    """Return the mean of three parties' updates, and their texts."""
    texts = [[text_of(100 * number + 10 * party + place) for place in range(each)] for party in range(3)]
    updates = [update_of(server.model, server.start, own) for own in texts]
    mean = {name: sum(update[name] for update in updates) / 3 for name in updates[0]}
    return mean, [text for own in texts for text in own]


def test_a_sum_of_three_texts_may_give_one_of_them_away(base: Path) -> None:
    """Whose it is nobody can tell: had two parties each other's texts, the sum would be the same."""
    server, best = spy(base), []
    for number in range(3):
        mean, texts = sum_of(server, number, each=1)
        found = server.rebuild(mean, words=3 * LENGTH, most=4_000)
        assert found.mismatch > 0.1
        best.append(max(rouge(found, text) for text in texts))
    assert min(best) < 30 < 80 < sorted(best)[1] < max(best) == 100


def test_of_a_sum_of_twelve_texts_none_is_rebuilt(base: Path) -> None:
    server = spy(base)
    for number in range(2):
        mean, texts = sum_of(server, number, each=4)
        found = server.rebuild(mean, words=12 * LENGTH, most=4_000)
        assert max(rouge(found, text) for text in texts) < 70


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_noise_stops_it_and_clipping_alone_does_not(noise: float, base: Path) -> None:
    server = spy(base)
    update = server.update(text_of(10), trainer=ReferenceDP(clip_norm=0.1, noise_multiplier=noise))
    found = server.rebuild(update, most=3_000 if noise else 15_000)
    if noise:
        assert found.mismatch > 0.5 and rouge(found, text_of(10)) < 30
    else:
        assert list(found.text) == text_of(10)
