"""What a job and its parties may not ask together. Everything here is found before any training starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fedllm.errors import ConfigError, FedllmError
from fedllm.job.job import Job, LocatedParty
from fedllm.job.ownership import ownership_clashes
from fedllm.job.policy import check_policy
from fedllm.models.settings import PROMPT_TYPES
from fedllm.tasks import CLASSIFICATION


def check_job(job: Job, parties: list[LocatedParty], *, baseline: bool = False) -> None:
    """Raise the first thing that is wrong, with the others in `also`.

    Args:
        job: The job.
        parties: The party files of this machine.
        baseline: The job is a yardstick (one party alone, or pooled data), which a federation may not be.

    Raises:
        ConfigError: Settings that cannot hold together.
        PolicyError: A site's limits forbid the job.
    """
    rules = RULES if baseline else (_two_parties, *RULES)
    errors: list[FedllmError] = [error for rule in rules for error in rule(job)]
    for located in parties:
        errors += check_policy(job, located.party, baseline=baseline)
    if errors:
        errors[0].also = tuple(errors[1:])
        raise errors[0]


def _clash(job: Job, key: str, what: str, fix: str) -> ConfigError:
    return ConfigError("BAD_COMBINATION", what, where=job.origins.get(key, key), fix=fix)


def _two_parties(job: Job) -> Iterator[ConfigError]:
    if len(job.parties) < 2:
        yield ConfigError(
            "ONE_PARTY",
            f"the job names {len(job.parties)} party; a federation needs two at least",
            where=job.origins.get("parties", "parties"),
            fix="add a party; to train alone, use the numbers that `fedllm compare` gives for a single party",
        )


def _quorum(job: Job) -> Iterator[ConfigError]:
    least = job.federation.min_parties
    if least > len(job.trainers):
        trains = "" if len(job.trainers) == len(job.parties) else " that train"
        yield _clash(
            job,
            "federation.min_parties",
            f"min_parties is {least}, but the job names {len(job.trainers)} parties{trains}",
            f"set `min_parties` to {len(job.trainers)} or less",
        )


def _best_needs_evaluation(job: Job) -> Iterator[ConfigError]:
    federation = job.federation
    if getattr(federation, "keep", "last") == "best" and getattr(federation, "eval_every", 1) == 0:
        yield _clash(
            job,
            "federation.eval_every",
            "`keep: best` needs evaluation, and `eval_every: 0` switches it off",
            "set `keep: last`, or `eval_every: 1`",
        )


def _packing_means(job: Job) -> Iterator[ConfigError]:
    if job.data.packing and job.train.loss_normalization == "examples":
        yield _clash(
            job,
            "data.packing",
            "`packing: true` puts several examples in a row, so `loss_normalization: examples` has no meaning",
            "set `loss_normalization: tokens`, or `packing: false`",
        )


def _precision(job: Job) -> Iterator[ConfigError]:
    if job.model.dtype != "bfloat16":
        return
    fix = "set `model.dtype: float32`"
    if job.peft.modules_to_save:
        what = "`modules_to_save` would be trained in bfloat16, where small updates vanish"
        yield _clash(job, "peft.modules_to_save", what, fix)
    if job.peft.peft_type in ("LN_TUNING", "BITFIT", "FULL"):
        what = f"{job.peft.peft_type} trains the base model's own values, in bfloat16, where small updates vanish"
        yield _clash(job, "model.dtype", what, fix)
    if job.data.task == CLASSIFICATION:
        what = "the head of a classifier would be trained in bfloat16, where small updates vanish"
        yield _clash(job, "model.dtype", what, fix)
    if job.peft.peft_type == "ADALORA" or (job.peft.peft_type == "IA3" and job.model.quantization):
        what = f"PEFT's {job.peft.peft_type} mixes float32 and bfloat16 here, and fails"
        yield _clash(job, "model.dtype", what, fix)


def _quantised(job: Job) -> Iterator[ConfigError]:
    held = job.model.quantization
    if held and job.peft.peft_type == "FULL":
        what = f"weights held as {held} cannot be trained, and FULL trains them all"
        yield _clash(job, "peft.peft_type", what, "set another `peft_type`, such as LORA, or load the model whole")
    realigns = bool(getattr(job.federation, "realign_every", 0))
    if held and realigns:
        what = f"the owner looks for its blocks in the corrected emulator, and cannot in weights held as {held}"
        yield _clash(job, "federation.realign_every", what, "load the model whole, or leave `realign_every` out")
    if held == "int8" and job.peft.use_dora:
        what = "DoRA needs the norms of weights that bitsandbytes does not give back from 8 bits"
        yield _clash(job, "peft.use_dora", what, "set `load_in_4bit: true` instead, or `use_dora: false`")
    if held and job.model.dtype == "float32" and job.train.bf16:
        what = "`train.bf16` computes in bfloat16 and the quantised base model in float32"
        yield _clash(job, "model.dtype", what, "set `model.dtype: bfloat16`, or `train.bf16: false`")


def _method_fits(job: Job) -> Iterator[ConfigError]:
    """What a tuning method cannot have beside it, whatever the scenario."""
    method = job.peft.peft_type
    if method in PROMPT_TYPES and job.data.packing:
        what = f"{method} puts virtual tokens before a row, and `packing: true` puts several examples into one"
        yield _clash(job, "data.packing", what, "set `packing: false`")
    if method == "PREFIX_TUNING" and job.train.gradient_checkpointing:
        what = "prefix tuning feeds the attention's cache, which gradient checkpointing does not keep"
        yield _clash(job, "train.gradient_checkpointing", what, "set `gradient_checkpointing: false`")
    standing = 1 + (job.peft.tinit or 0) + (job.peft.tfinal or 0)
    if method == "ADALORA" and standing > job.federation.num_rounds:
        what = f"ranks stand in {standing} rounds (the first, tinit, tfinal) of {job.federation.num_rounds}"
        yield _clash(job, "peft.tinit", what, "lower `tinit` or `tfinal`, or raise `num_rounds`")


def _persons(job: Job) -> Iterator[ConfigError]:
    has_group = job.privacy.differential_privacy.unit == "group"
    if has_group and job.data.group_by is None:
        what = "`unit: group` hides all examples of a person, and no column names the person"
        yield _clash(job, "privacy.differential_privacy.unit", what, "set `data.group_by` to that column")
    if not has_group and job.data.group_by is not None:
        what = "`data.group_by` has no effect without `privacy.differential_privacy.unit: group`"
        yield _clash(job, "data.group_by", what, "set that unit, or leave `group_by` out")


def _private_training(job: Job) -> Iterator[ConfigError]:
    """What noise on each example's gradient does not go with (E07)."""
    if not job.privacy.differential_privacy.is_local:
        return
    if job.data.packing:
        what = "differential privacy hides one example, and `packing: true` puts several into one row (E07)"
        yield _clash(job, "data.packing", what, "set `packing: false`")
    if job.train.bf16:
        what = "the bound on each example's gradient is kept in float32, and `train.bf16` computes in bfloat16"
        yield _clash(job, "train.bf16", what, "set `bf16: false`")
    if job.train.gradient_checkpointing:
        what = "`gradient_checkpointing` and the gradients of single examples do not go together"
        fix = "set `gradient_checkpointing: false`, and a smaller `per_device_train_batch_size` to save memory"
        yield _clash(job, "train.gradient_checkpointing", what, fix)
    if job.train.max_grad_norm != type(job.train).model_fields["max_grad_norm"].default:
        what = "`train.max_grad_norm` has no effect on gradients that are cut one by one"
        fix = "leave it out; `privacy.differential_privacy.clip_norm` takes its place"
        yield _clash(job, "train.max_grad_norm", what, fix)


def _limits_of_tests(job: Job) -> Iterator[ConfigError]:
    if job.evaluate.test is None and job.evaluate.max_examples is not None:
        yield _clash(
            job,
            "evaluate.max_examples",
            "`max_examples` has no effect without `evaluate.test`",
            "name a common test set in `evaluate.test`, or take `max_examples` out",
        )


def _warmup_within_run(job: Job) -> Iterator[ConfigError]:
    steps = job.train.local_steps
    if steps and job.train.warmup_steps >= steps * job.federation.num_rounds:
        yield _clash(
            job,
            "train.warmup_steps",
            f"{job.train.warmup_steps:g} warm-up steps fill the whole run of {steps * job.federation.num_rounds} steps",
            "lower `warmup_steps`; below 1 it is a share of the run",
        )


def _of_the_scenario(job: Job) -> Iterator[ConfigError]:
    for key, what, fix in job.table_line().clashes(job.federation, job.train, job.peft, job.privacy, job.parties):
        yield _clash(job, key, what, fix)


def _of_the_marks(job: Job) -> Iterator[ConfigError]:
    for key, what, fix in ownership_clashes(job):
        yield _clash(job, key, what, fix)


def _files(job: Job) -> Iterator[ConfigError]:
    named = {"evaluate.test": job.evaluate.test, "data.chat_template_path": job.data.chat_template_path}
    for key, name in named.items():
        if name is not None and _is_path(name) and not job.path(name).exists():
            yield ConfigError(
                "FILE_NOT_FOUND",
                f"`{key}`: no file {job.path(name)}",
                where=job.origins.get(key, key),
                fix="paths in a job file start at its own folder",
            )


def _is_path(name: str) -> bool:
    # What is not a path may be a hub id, `org/name`.
    return bool(Path(name).suffix) or name.startswith((".", "/", "~"))


RULES: tuple[Callable[[Job], Iterator[ConfigError]], ...] = (
    _quorum,
    _best_needs_evaluation,
    _packing_means,
    _precision,
    _quantised,
    _method_fits,
    _persons,
    _private_training,
    _limits_of_tests,
    _warmup_within_run,
    _of_the_scenario,
    _of_the_marks,
    _files,
)
