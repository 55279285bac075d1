"""The span test against real updates of a client, and against what defends: sums, and noise.

Every update is what the server reads of `fedllm.scenarios.fedhomollm_client.Client`, over the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_dp import ReferenceDP
from tiny import bits
from updates import random_texts, tunable, update_of, warm_start

from fedllm.aggregate.total import GridSum
from fedllm.errors import ModelError
from fedllm.models.adapter import TunableModel
from fedllm.privacy.inversion import first_inputs, nearest_words, share_found, token_distances, token_distances_by_b
from fedllm.privacy.membership import area_under_curve
from fedllm.seeds import stream
from fedllm.wire.payload import Tensors

Texts = Sequence[Sequence[int]]
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3}


def words_of(texts: Texts) -> set[int]:
    """Return the words that something is predicted from: the last one of a text never is, and leaves no trace."""
    return {word for text in texts for word in text[:-1]}


def told_apart(distances: torch.Tensor, words: set[int], others: set[int] | None = None) -> float:
    """Return the AUC with which distances tell the words from others: 1 = always, 0.5 = not at all."""
    others = set(range(len(distances))) - words if others is None else others
    return area_under_curve(-distances[sorted(words)].numpy(), -distances[sorted(others)].numpy())


@dataclass(frozen=True)
class Target:
    """A party to attack: rank 8 on queries, keys and values, so 24 rows of factor A."""

    model: TunableModel
    inputs: torch.Tensor
    cold: Tensors
    warm: Tensors

    def update(self, texts: Texts, *, start: Tensors | None = None, **options: Any) -> Tensors:
        return update_of(self.model, self.warm if start is None else start, texts, **options)


@pytest.fixture(scope="module")
def target(base: Path) -> Target:
    model = tunable(base)
    warm = warm_start(model, stream(0, "test", "warm"))
    return Target(model, first_inputs(model.model), model.initial(3), warm)


def draws(*labels: str | int) -> np.random.Generator:
    return stream(0, "test", "inversion", *labels)


def test_inputs_are_what_the_first_block_reads(target: Target) -> None:
    seen: list[torch.Tensor] = []
    layer = dict(target.model.model.named_modules())["base_model.model.model.layers.0.self_attn.q_proj"]
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    target.model.model(torch.tensor([[5, 9, 5]]))
    handle.remove()
    torch.testing.assert_close(seen[0][0].double(), target.inputs[[5, 9, 5]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("train", [{}, {"local_steps": 4}, {"local_steps": 4, "per_device_train_batch_size": 1}])
@pytest.mark.parametrize("distinct", [5, 12])
def test_factor_a_gives_every_word_away_under_sgd(target: Target, distinct: int, train: dict[str, Any]) -> None:
    texts = random_texts(draws(distinct), distinct=distinct)
    distances = token_distances(target.inputs, [target.update(texts, train=train)])
    words = words_of(texts)
    assert share_found(distances, words) == 1.0
    # Not only ranked first: they lie in the span, and no other word does.
    others = sorted(set(range(300)) - words)
    assert distances[sorted(words)].max() < 1e-2 < 0.1 < distances[others].min()


def test_more_words_than_rows_are_not_found_exactly(base: Path) -> None:
    model = tunable(base, r=2)
    inputs, warm = first_inputs(model.model), warm_start(model, stream(0, "test", "warm"))
    texts = random_texts(draws("many"), distinct=20)
    distances = token_distances(inputs, [update_of(model, warm, texts)])
    assert share_found(distances, words_of(texts)) < 0.7
    assert distances[sorted(words_of(texts))].min() > 1e-2


def test_several_rounds_on_the_same_texts_add_rows(target: Target) -> None:
    texts = random_texts(draws("rounds"), distinct=28, length=16, count=3)
    starts = [warm_start(target.model, stream(0, "test", "round", number)) for number in range(3)]
    updates = [target.update(texts, start=start) for start in starts]
    assert share_found(token_distances(target.inputs, updates[:1]), words_of(texts)) < 1.0
    assert share_found(token_distances(target.inputs, updates), words_of(texts)) == 1.0


def test_full_tuning_gives_the_span_directly(base: Path) -> None:
    model = tunable(base, peft_type="FULL")
    texts = random_texts(draws("full"), distinct=15)
    update = update_of(model, model.initial(3), texts)
    assert share_found(token_distances(first_inputs(model.model), [update]), words_of(texts)) == 1.0


def test_in_the_first_step_factor_a_gives_nothing_and_factor_b_gives_all(target: Target) -> None:
    """B = 0, so dA = s B^T dY^T X = 0; dB = s dY^T X A^T shows R numbers of each input."""
    texts = random_texts(draws("first"), distinct=7)
    words, update = words_of(texts), target.update(texts, start=target.cold)
    assert all(not value.any() for name, value in update.items() if "lora_A" in name)
    assert told_apart(token_distances(target.inputs, [update]), words) == 0.5
    assert share_found(token_distances_by_b(target.inputs, update, target.cold), words) == 1.0


def test_factor_b_gives_nothing_certain_once_the_words_reach_the_rank(target: Target) -> None:
    texts = random_texts(draws("rank"), distinct=12)
    update = target.update(texts, start=target.cold)
    assert share_found(token_distances_by_b(target.inputs, update, target.cold), words_of(texts)) < 0.5


def test_after_four_steps_of_the_first_round_factor_a_speaks_too(target: Target) -> None:
    texts = random_texts(draws("four"), distinct=7)
    update = target.update(texts, start=target.cold, train={"local_steps": 4})
    assert share_found(token_distances(target.inputs, [update]), words_of(texts)) == 1.0


def test_adamw_breaks_the_span_and_does_not_hide_the_words(target: Target) -> None:
    """The sign-like step makes every direction count, yet the strongest ones still rank the words first."""
    exact, ranked, found = [], [], []
    for number in range(4):
        texts = random_texts(draws("adamw", number), distinct=8)
        update = target.update(texts, train=ADAMW | {"local_steps": 1 + 2 * number})
        words = words_of(texts)
        exact.append(float(token_distances(target.inputs, [update])[sorted(words)].max()))
        distances = token_distances(target.inputs, [update], directions=12)
        ranked.append(told_apart(distances, words))
        found.append(share_found(distances, words))
    assert min(exact) > 0.05
    assert np.mean(ranked) > 0.95 and np.mean(found) > 0.7


def mean_of(updates: Sequence[Tensors]) -> Tensors:
    """Return what the server is left with where it sees no more than the sum."""
    total = GridSum()
    for number, update in enumerate(updates):
        total.add(update, weight=1, counts={}, sender=f"party-{number}")
    return total.means()


def three_parties(number: int, *, distinct: int) -> list[list[list[int]]]:
    """Return the texts of three parties that share no word."""
    pool = draws("parties", number, distinct).permutation(np.arange(3, 300))
    parts = []
    for party in range(3):
        texts = random_texts(draws("texts", number, party, distinct), distinct=distinct)
        places = {word: i for i, word in enumerate(sorted({word for text in texts for word in text}))}
        parts.append([[int(pool[party * distinct + places[word]]) for word in text] for text in texts])
    return parts


def test_a_sum_does_not_tell_which_party_said_what(target: Target) -> None:
    """Alone, an update tells its party's words from the others'. In the sum all words look alike."""
    alone, together = [], []
    for number in range(5):
        parts = three_parties(number, distinct=7)
        updates = [target.update(texts) for texts in parts]
        mine, others = words_of(parts[0]), words_of(parts[1]) | words_of(parts[2])
        alone.append(told_apart(token_distances(target.inputs, updates[:1]), mine, others))
        together.append(told_apart(token_distances(target.inputs, [mean_of(updates)]), mine, others))
        # Had the parties each other's texts, the sum would have the same bits: no attack on it can attribute.
        assert bits(mean_of(updates)) == bits(mean_of(updates[1:] + updates[:1]))
    assert min(alone) == 1.0
    assert 0.25 < np.mean(together) < 0.75


def test_a_sum_of_few_small_parties_still_gives_the_words_away(target: Target) -> None:
    """Secure aggregation hides whose, not what: 21 words are below the 24 rows; 48 are not."""
    found = {}
    for distinct in (7, 16):
        parts = three_parties(0, distinct=distinct)
        distances = token_distances(target.inputs, [mean_of([target.update(texts) for texts in parts])])
        everyone = words_of([text for texts in parts for text in texts])
        found[distinct] = [len(words_of(t) & nearest_words(distances, len(everyone))) / len(words_of(t)) for t in parts]
    assert min(found[7]) == 1.0
    assert max(found[16]) < 0.9


def test_clipping_alone_hides_nothing_and_noise_hides_the_words(target: Target) -> None:
    ranked: dict[float, list[float]] = {0.0: [], 1.0: []}
    for noise, found in ranked.items():
        for number in range(6):
            texts = random_texts(draws("noise", number), distinct=8)
            update = target.update(texts, trainer=ReferenceDP(clip_norm=0.1, noise_multiplier=noise))
            found += [told_apart(token_distances(target.inputs, [update], directions=k), words_of(texts))
                      for k in (4, 12, None)]  # fmt: skip
    assert np.mean(ranked[0.0]) > 0.95
    # The standard error of 18 AUCs of 8 words among 300 is below 0.03.
    assert np.mean(ranked[1.0]) == pytest.approx(0.5, abs=0.1)


def test_a_model_with_absolute_positions_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8))
    with pytest.raises(ModelError, match="PEFT_TARGET"):
        first_inputs(model)
