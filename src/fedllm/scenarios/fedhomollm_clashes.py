"""What cannot be asked together of FedHomoLLM, as (key, what, fix)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedllm.aggregate.robust import COORDINATEWISE
from fedllm.models.settings import PeftSettings
from fedllm.privacy.settings import PrivacySettings
from fedllm.scenarios.base import Clash
from fedllm.scenarios.fedhomollm_privacy import clashes_of_noise, clashes_of_shares, clashes_of_sums
from fedllm.scenarios.fedhomollm_settings import Settings, needs_each, rule_of
from fedllm.train.settings import TrainSettings


def clashes(
    settings: Settings, train: TrainSettings, peft: PeftSettings, privacy: PrivacySettings, parties: Sequence[str]
) -> Iterator[Clash]:
    """Yield what cannot be asked together, as (key, what, fix).

    Args:
        settings: The scenario's.
        train: The job's `train` section.
        peft: Its `peft` section.
        privacy: Its `privacy` section.
        parties: Its parties.
    """
    if settings.strategy.name == "SCAFFOLD":
        yield from _clashes_of_scaffold(settings, train)
    yield from _clashes_of_rule(settings, train, peft)
    if settings.codec_down.name != "fp32":
        yield from _clashes_of_codec_down(settings)
    if settings.ranks:
        yield from _clashes_of_ranks(settings, peft, parties)
    yield from _clashes_of_robust(settings, peft, parties)
    if privacy.secure_aggregation.enabled:
        name = settings.robust.name if settings.robust.name != "none" else settings.lora_rule
        rule = name if needs_each(settings) else ""
        yield from clashes_of_sums(settings, privacy.secure_aggregation, parties, needs_each=rule)
    yield from clashes_of_noise(settings, privacy.differential_privacy)
    yield from clashes_of_shares(settings, privacy.differential_privacy, privacy.secure_aggregation, parties)


def _clashes_of_scaffold(settings: Settings, train: TrainSettings) -> Iterator[Clash]:
    if train.optim != "sgd":
        what = f"SCAFFOLD's control variates are mean gradients under plain SGD only, not under {train.optim} (E17)"
        yield "train.optim", what, "set `optim: sgd` (with a higher learning_rate), or another `federation.strategy`"
    if needs_each(settings):
        what = "SCAFFOLD's control variates are means, which the rule that looks at each update does not make"
        yield "federation.strategy", what, f"set another `strategy`, or leave `robust` and {settings.lora_rule} out"
    if settings.codec.name != "fp32":
        what = f"control variates must arrive whole, not as {settings.codec.name}, or their mean is not the server's"
        yield "federation.codec", what, "set `codec: {name: fp32}`, or another `strategy`"


def _clashes_of_rule(settings: Settings, train: TrainSettings, peft: PeftSettings) -> Iterator[Clash]:
    """Yield what a rule for LoRA's factors does not go with, by what the table says of it."""
    key, name, rule = "federation.lora_rule", settings.lora_rule, rule_of(settings)
    another = "set another `lora_rule`"
    if peft.peft_type != "LORA" and name != "FedIT":
        yield key, f"{name} is about LoRA's factors, and {peft.peft_type} has none", "leave `lora_rule` out"
    if rule.needs_each:
        if not _is_plain_step(settings):
            what = f"{name} makes the next factors itself, so a server's momentum or step size has no meaning"
            yield key, what, "set `strategy: {name: FedAvg}`, or another `lora_rule`"
        if settings.robust.name != "none":
            what = f"{name} and {settings.robust.name} would both take the mean's place"
            yield key, what, f"{another}, or leave `robust` out"
        if peft.use_dora:
            what = f"with DoRA the model is not linear in the product that {name} keeps"
            yield key, what, "set `use_dora: false`"
    if rule.keeps_state:
        yield from _clashes_of_own_factor(settings, peft)
    if rule.new_axes:
        new = f"{name} takes new axes for the factors in every round"
        if train.optim != "sgd" and train.optimizer_state == "keep":
            what = f"{new}, so what {train.optim} remembers of the last one does not fit"
            yield key, what, "set `train.optimizer_state: reset`"
        if settings.codec.error_feedback:
            what = f"{new}, so what a codec lost of the last update does not fit"
            yield key, what, "set `codec.error_feedback: false`"


def _clashes_of_own_factor(settings: Settings, peft: PeftSettings) -> Iterator[Clash]:
    key, name = "federation.lora_rule", settings.lora_rule
    another = "set another `lora_rule`"
    if settings.fraction_train < 1:
        what = f"with {name} a party that is left out keeps a factor that no longer fits the shared one (E16)"
        yield "federation.fraction_train", what, f"set `fraction_train: 1.0`, or {another[4:]}"
    if settings.strategy.name == "SCAFFOLD":
        yield key, f"with {name} there is no mean of the factor that stays, which SCAFFOLD's correction needs", another
    if settings.robust.name != "none":
        what = f"{settings.robust.name} measures updates by LoRA's product, of which {name} sends one factor"
        yield key, what, f"{another}, or leave `robust` out"
    if peft.use_dora:
        what = f"DoRA's magnitudes belong to the whole product, of which {name} shares one factor"
        yield key, what, "set `use_dora: false`"


def _clashes_of_codec_down(settings: Settings) -> Iterator[Clash]:
    key, name, rule = "federation.codec_down", settings.codec_down.name, rule_of(settings)
    if rule.needs_each or rule.keeps_state:
        what = (
            f"{settings.lora_rule} takes new factors in every round, to which what {name} lost of a change is no part"
            if rule.needs_each
            else f"with {settings.lora_rule} a party's own factor fits the shared one, not what {name} makes of it"
        )
        yield key, what, "set `codec_down: {name: fp32}`, or another `lora_rule`"
    if settings.strategy.name == "SCAFFOLD":
        what = "SCAFFOLD's control variate goes down beside the adapter, and must arrive whole"
        yield key, what, "set `codec_down: {name: fp32}`, or another `strategy`"


def _is_plain_step(settings: Settings) -> bool:
    return settings.strategy.name in ("FedAvg", "FedProx", "SCAFFOLD") and settings.strategy.server_learning_rate == 1


def _clashes_of_ranks(settings: Settings, peft: PeftSettings, parties: Sequence[str]) -> Iterator[Clash]:
    key, ranks, highest = "federation.ranks", settings.ranks, peft.r or 0
    if peft.peft_type != "LORA":
        yield key, f"{peft.peft_type} has no ranks to mix", "leave `ranks` out"
        return
    for party, rank in ranks.items():
        if party not in parties:
            yield key, f"{party!r} is no party of the job", "name parties of the job"
        if rank > highest:
            yield key, f"{party} would have rank {rank}, and `peft.r`, the largest, is {highest}", "raise `peft.r`"
    if max(ranks.get(party, highest) for party in parties) < highest:
        what = f"`peft.r` is {highest}, and no party has that rank"
        yield key, what, f"set `peft.r: {max(ranks.values())}`, with lora_alpha so that the scale is what you want"
    if not rule_of(settings).mixed_ranks:
        what = f"{settings.lora_rule} has no meaning with parties of different ranks (E12)"
        yield key, what, "set `lora_rule: FLoRA`, which is exact too, FlexLoRA, FedIT or RoLoRA, or leave `ranks` out"
    if settings.robust.name != "none":
        what = f"{settings.robust.name} compares updates, and with mixed ranks they have not the same slots (E12)"
        yield key, what, "leave `robust` or `ranks` out"
    if settings.strategy.name == "SCAFFOLD":
        what = "SCAFFOLD's correction would move the slots that a party does not own (E12)"
        yield key, what, "set another `strategy`, or leave `ranks` out"
    if peft.use_dora:
        what = "with DoRA a party of lower rank would train a magnitude for another product than the others (E12)"
        yield key, what, "set `use_dora: false`, or leave `ranks` out"


def _clashes_of_robust(settings: Settings, peft: PeftSettings, parties: Sequence[str]) -> Iterator[Clash]:
    robust, least = settings.robust, settings.robust.least_parties()
    if settings.min_parties < least:
        bears = f" to bear {robust.num_malicious} of them" if robust.num_malicious else ""
        what = f"{robust.name} needs {least} answers{bears}, and min_parties is {settings.min_parties} (E21)"
        yield "federation.min_parties", what, f"set `min_parties` to {least} or more, or lower num_malicious"
    if robust.root_party is not None and robust.root_party not in parties:
        yield "federation.robust", f"the root party {robust.root_party!r} is no party of the job", "name one of them"
    if robust.root_party is not None and settings.fraction_train < 1:
        what = "FLTrust needs its root party in every round, and fraction_train draws some of the parties"
        yield "federation.fraction_train", what, "set `fraction_train: 1.0`"
    if robust.name in COORDINATEWISE and settings.lora_rule == "FedIT" and peft.peft_type in ("LORA", "ADALORA"):
        what = f"{robust.name} compares coordinates, and LoRA's product has none in common while both factors move"
        yield "federation.robust", what, "set `lora_rule: RoLoRA` or FFA-LoRA, or a rule such as MultiKrum"
