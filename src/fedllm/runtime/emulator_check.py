"""What an emulator's package is worth to whom: the five models of offsite tuning, and what a thief makes of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm.data.batches import BatchOrder
from fedllm.data.settings import DataSettings
from fedllm.data.tokens import TokenisedExample
from fedllm.errors import ConfigError
from fedllm.evaluate.loss import evaluate_examples
from fedllm.job.job import Job
from fedllm.models.adapter import TunableModel
from fedllm.models.blocks import forget_cuts
from fedllm.models.emulator import middle_parameters
from fedllm.models.emulator_settings import EmulatorSettings, ExportPolicy
from fedllm.models.full import FullModel
from fedllm.models.load import Base
from fedllm.models.settings import PeftSettings
from fedllm.scenarios.base import TokenData
from fedllm.train.base import TrainTask
from fedllm.train.distil import Distillation, distil
from fedllm.train.optimizer import learning_rates, make_optimizer
from fedllm.train.settings import TrainSettings
from fedllm.train.supervised import SupervisedTrainer

_FOREVER_S = 10**9
# A thief stops where it is best: it is judged so often on its way.
_LOOKS = 4


@dataclass(frozen=True)
class Bench:
    """What models are measured with.

    Args:
        job: The job: `peft` and `train` say how the adapter layers are tuned.
        settings: The owner's `emulator` section.
        package: The package, loaded.
        full: Where the whole model is.
        probe: The owner's probe set: what is tuned on, and what losses are measured on.
        public: Public text to distil on.
        data_settings: The job's, with absolute paths.
        say: Told what is being done.
    """

    job: Job
    settings: EmulatorSettings
    package: Base
    full: FullModel
    probe: TokenData
    public: Sequence[TokenisedExample]
    data_settings: DataSettings
    say: Callable[[str], None] = lambda text: None

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return int(self.package.tokenizer.pad_token_id)

    def loss(self, model: Any) -> float:
        """Return a model's loss on the held-out part of the probe set, in nats per target.

        Args:
            model: A model of transformers, tuned or not.
        """
        size = self.job.evaluate.per_device_eval_batch_size
        sums = evaluate_examples(model, self.probe.held_out, pad_id=self.pad_id, batch_size=size)
        return sums.loss_nats

    def tune(self, tunable: TunableModel, *, steps: int, settings: TrainSettings, label: str) -> float:
        """Train what is tunable on the probe set, and return the lowest loss that was seen on its way.

        Args:
            tunable: The model; it is trained in place.
            steps: Optimiser steps.
            settings: How.
            label: Names the order of the examples.
        """
        settings = settings.model_copy(update={"local_steps": steps, "local_epochs": None})
        optimizer = make_optimizer(tunable.trainable, settings)
        rates = learning_rates(settings, total_steps=steps)
        order = BatchOrder(len(self.probe.train), settings.per_device_train_batch_size, seed=self.job.seed, party=label)
        best, done = float("inf"), 0
        for look in range(1, _LOOKS + 1):
            until = round(steps * look / _LOOKS)
            if until == done:
                continue
            task = TrainTask(
                party=label,
                round=look,
                seed=self.job.seed,
                model=tunable,
                examples=self.probe.train,
                order=order,
                pad_id=self.pad_id,
                settings=settings,
                data_settings=self.data_settings,
                first_step=done,
                num_steps=until - done,
                learning_rate=rates,
                deadline=time.monotonic() + _FOREVER_S,
            )
            SupervisedTrainer().train(task, optimizer)
            best, done = min(best, self.loss(tunable.model)), until
        return best

    def fresh(self, *, all_layers: bool = False) -> Any:
        """Return a copy of the package's model, frozen.

        Args:
            all_layers: Of which all layers can be tuned, as a thief would.
        """
        model = copy.deepcopy(self.package.model)
        if all_layers:
            forget_cuts(model.config)
        return model


@dataclass(frozen=True)
class Figures:
    """Losses in nats per target on the held-out part of the owner's probe set.

    Args:
        full_zs: The whole model as it is.
        emu_zs: The package as it is.
        ot_emu: The package with tuned adapter layers.
        plug: The whole model with the layers that were tuned on the package.
        ft: The whole model with the same layers tuned on itself.
        thieves: What a thief makes of the package, by what it does.
    """

    full_zs: float
    emu_zs: float
    ot_emu: float
    plug: float
    ft: float
    thieves: dict[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Return all of them by name."""
        five = {"Full-ZS": self.full_zs, "Emu-ZS": self.emu_zs, "OT-Emu": self.ot_emu, "Plug": self.plug, "FT": self.ft}
        return five | self.thieves

    @property
    def recovered(self) -> float | None:
        """Which share of what tuning the whole model gains is gained by plugging; None where that gains nothing."""
        gain = self.full_zs - self.ft
        return (self.full_zs - self.plug) / gain if gain > 0 else None


@dataclass(frozen=True)
class Verdict:
    """What an export policy says.

    Args:
        broken: A sentence for each rule that is broken.
    """

    broken: tuple[str, ...]

    @property
    def allowed(self) -> bool:
        """Whether the package may leave."""
        return not self.broken


def verdict(figures: Figures, policy: ExportPolicy) -> Verdict:
    """Return what a policy says of a package.

    Args:
        figures: From `measure`.
        policy: The owner's.
    """
    rules = [
        ("the emulator as it is", figures.emu_zs, "the whole model as it is", figures.full_zs, policy.full_zs_margin),
        ("the tuned emulator", figures.ot_emu, "the plugged model", figures.plug, policy.plug_margin),
        ("the whole model as it was", figures.full_zs, "the plugged model", figures.plug, policy.gain_margin),
        *(
            (f"a thief ({name})", loss, "the plugged model", figures.plug, policy.thief_margin)
            for name, loss in figures.thieves.items()
        ),
    ]
    return Verdict(
        tuple(
            f"{worse} has loss {high:.3f}, {better} {low:.3f}: that must be less by more than {margin:.3f}"
            for worse, high, better, low, margin in rules
            # A package as good as the whole model is the whole model, for all that can be told.
            if not high - low > margin
        )
    )


def measure(bench: Bench, *, direct: tuple[float, float] | None = None, thieves: bool = True) -> Figures:
    """Return the losses of the five models, and of what thieves make of the package.

    Args:
        bench: What to measure with.
        direct: Full-ZS and FT where they are known: they do not depend on the package.
        thieves: Whether thieves are let at it.

    Raises:
        ConfigError: `MISSING_KEY`, the owner's probe set holds nothing out.
    """
    if not bench.probe.held_out:
        what, fix = "the probe set holds no examples out to measure on", "set `data.eval` or `data.eval_share`"
        raise ConfigError("MISSING_KEY", what, where="the owner's party file, data", fix=fix)
    job, steps = bench.job, bench.settings.policy.check_steps
    bench.say(f"tuning the package, {steps} steps")
    emu_zs = bench.loss(bench.package.model)
    tuned = TunableModel(bench.fresh(), job.peft, job.task.name)
    tuned.write(tuned.initial(job.seed))
    bench.tune(tuned, steps=steps, settings=job.train, label="probe")
    ot_emu = bench.loss(tuned.model)
    with bench.full.plugged(tuned.read(), bench.package.model) as whole:
        plug = bench.loss(whole.model)
    full_zs, ft = direct or tuned_directly(bench)
    budgets = bench.settings.policy.thief_budgets if thieves else []
    found = {name: loss for times in budgets for name, loss in _thieves(bench, times)}
    return Figures(full_zs, emu_zs, ot_emu, plug, ft, found)


def tuned_directly(bench: Bench) -> tuple[float, float]:
    """Return the losses of the whole model as it is (Full-ZS), and with its own outer layers tuned on itself (FT).

    Args:
        bench: What to measure with.
    """
    job, steps = bench.job, bench.settings.policy.check_steps
    bench.say(f"tuning the whole model, {steps} steps")
    base = bench.full.load()
    full_zs = bench.loss(base.model)
    tunable = TunableModel(base.model, job.peft, job.task.name)
    tunable.write(tunable.initial(job.seed))
    bench.tune(tunable, steps=steps, settings=job.train, label="probe")
    return full_zs, bench.loss(tunable.model)


def _thieves(bench: Bench, times: int) -> list[tuple[str, float]]:
    return [
        (f"tunes all layers, {times}x", thief_tunes(bench, times)),
        (f"restores the middle, {times}x", thief_restores(bench, times)),
    ]


def thief_tunes(bench: Bench, times: int) -> float:
    """Return the lowest loss that a thief reaches who tunes all of the package on the whole probe set.

    Args:
        bench: What to measure with.
        times: Of the steps of the check.
    """
    steps = times * bench.settings.policy.check_steps
    bench.say(f"a thief tunes all layers, {steps} steps")
    tunable = TunableModel(bench.fresh(all_layers=True), PeftSettings(peft_type="FULL"), bench.job.task.name)
    return bench.tune(tunable, steps=steps, settings=_thief_train(bench), label="thief")


def thief_restores(bench: Bench, times: int) -> float:
    """Return the lowest loss of a thief who goes on distilling the middle, and then tunes the adapter layers.

    The thief has public text, and asks the whole model for its logits, as whoever may use it as a service can; unless
    the policy says that there is nobody to ask.

    Args:
        bench: What to measure with.
        times: Of the owner's own steps of distillation, or of those of the check where the owner did none.
    """
    settings, job = bench.settings, bench.job
    steps = times * (settings.distil_steps or settings.policy.check_steps)
    bench.say(f"a thief restores the middle, {steps} steps")
    model = bench.fresh()
    teacher = bench.full.load().model if settings.policy.thief_asks_model else None
    how = Distillation(
        steps, settings.distil_learning_rate, settings.distil_batch_size, 0.0, 1.0, bench.full.cut, job.seed + 1
    )
    tuned = list(middle_parameters(model, bench.full.cut).values())
    distil(model, teacher, bench.public, how=how, tuned=tuned, pad_id=bench.pad_id)
    del teacher
    tunable = TunableModel(model, job.peft, job.task.name)
    tunable.write(tunable.initial(job.seed))
    return bench.tune(tunable, steps=settings.policy.check_steps, settings=job.train, label="thief")


def _thief_train(bench: Bench) -> TrainSettings:
    changes = {"learning_rate": bench.settings.policy.thief_learning_rate, "optim": "adamw_torch"}
    return bench.job.train.model_copy(update=changes)
