"""What a party's answer to a round of training holds in FedHomoLLM, how it travels, and what is summed of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedllm.aggregate.lora import answered, sites, sketch_size
from fedllm.aggregate.slots import Spread, num_slots, own_manifest
from fedllm.scenarios.fedhomollm_settings import Settings, meets_drift, needs_each
from fedllm.wire.codecs import Codec
from fedllm.wire.payload import Manifest, TensorSpec


@dataclass(frozen=True)
class Answer:
    """One party's answer in one round.

    Args:
        settings: The scenario's.
        adapter: The tensors that are tuned.
        number: The round.
        party: The party.
    """

    settings: Settings
    adapter: Manifest
    number: int
    party: str

    def coded(self) -> Manifest:
        """Return what is encoded: the update, of the slots that the party owns."""
        sent = {name: self.adapter[name] for name in answered(self.settings.lora_rule, self.adapter, self.number)}
        if (rank := self.settings.ranks.get(self.party)) is not None:
            sent = own_manifest(sent, rank)
        fields = ("update", "control") if self.settings.strategy.name == "SCAFFOLD" else ("update",)
        return {f"{field}/{name}": spec for field in fields for name, spec in sent.items()}

    def manifest(self) -> Manifest:
        """Return what travels."""
        return Codec(self.settings.codec).manifest(self.coded()) | self._drift_vectors()

    def saved_bytes(self) -> int:
        """Return how many bytes fewer travel than without a codec."""
        raw = self.coded()
        coded = Codec(self.settings.codec).manifest(raw)
        return sum(spec.num_bytes for spec in raw.values()) - sum(spec.num_bytes for spec in coded.values())

    def decoded(self, tensors: Mapping[str, torch.Tensor], *, seed: int) -> Mapping[str, torch.Tensor]:
        """Return what is summed, each tensor decoded when it is looked at.

        Where parties differ in rank, a sum needs all of them in one shape. Who owns which slots follows from the job,
        so that the party need not say it.

        Args:
            tensors: As they came; their manifest has been checked.
            seed: The job's seed.
        """
        codec, whole = Codec(self.settings.codec), self.coded() | self._drift_vectors()
        found = codec.decode(tensors, manifest=whole, seed=seed, number=self.number)
        if not self.settings.ranks or needs_each(self.settings):
            return found
        size = num_slots(self.adapter)
        return Spread(found, self.settings.ranks.get(self.party, size), size)

    def _drift_vectors(self) -> Manifest:
        if not meets_drift(self.settings):
            return {}
        sizes = {site: sketch_size(self.adapter[left].shape[0]) for site, (left, _) in sites(self.adapter).items()}
        return {f"drift/{site}": TensorSpec(dtype="float32", shape=[size]) for site, size in sizes.items()}


def answer(settings: Settings, adapter: Manifest, number: int, party: str) -> Manifest:
    """Return what a party's answer to `Train` holds, as it travels.

    Args:
        settings: The scenario's.
        adapter: The tensors that are tuned.
        number: The round.
        party: The party.
    """
    return Answer(settings, adapter, number, party).manifest()
