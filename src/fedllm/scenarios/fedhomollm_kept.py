"""What a party of FedHomoLLM keeps of its own from round to round, and how it takes it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedllm.scenarios.fedhomollm_messages import prefixed, select
from fedllm.wire.payload import Tensors

_PARTS = ("control", "lost", "own")


@dataclass
class Kept:
    """What is kept now, and what that was before the last round trained in.

    A party hears with the next request whether its last answer was counted. Where it was not, what the round had
    changed is taken back, so that a party and the server never differ in what has happened.

    Args:
        now: `control`: SCAFFOLD's control variate. `lost`: what a codec lost. `own`: the factor that never travels.
        before: The same, before the last round.
        best: The factor that never travels, as of the best round, where that is not the last one.
    """

    now: dict[str, Tensors] = field(default_factory=dict)
    before: dict[str, Tensors] = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)

    def part(self, name: str, *, was_counted: bool = True) -> Tensors:
        """Return one part as it is, or as it was where the last answer was not counted.

        Args:
            name: The part.
            was_counted: Whether the last answer was.
        """
        return (self.now if was_counted else self.before).get(name, {})

    def begin(self, *, was_counted: bool) -> None:
        """Begin a round of training, after taking back what was not counted.

        Args:
            was_counted: Whether the last answer was.
        """
        if not was_counted:
            self.now = self.before
        self.before = dict(self.now)
        self.now = dict(self.now)

    def tensors(self) -> Tensors:
        """Return all of it, to be saved."""
        found = prefixed("best", self.best)
        for name in _PARTS:
            found |= prefixed(name, self.now.get(name, {})) | prefixed(f"{name}_before", self.before.get(name, {}))
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, object]) -> Kept:
        """Return what `tensors` returned.

        Args:
            tensors: As they were saved, among others.
        """
        now = {name: select(name, tensors) for name in _PARTS}
        before = {name: select(f"{name}_before", tensors) for name in _PARTS}
        return cls(now, before, select("best", tensors))
