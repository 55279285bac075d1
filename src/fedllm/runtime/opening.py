"""Open one party of a run on a site: its trainer, what its client half may use, and the host that answers for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fedllm.errors import ConfigError
from fedllm.job.job import Job
from fedllm.ownership.log import FOLDER
from fedllm.privacy.budget import PURSE_FOLDER, Budget, Purse
from fedllm.runs.folder import RunFolder
from fedllm.runs.plan_files import versions
from fedllm.runtime.base import Ready
from fedllm.runtime.delivery import deliver_own, write_copy
from fedllm.runtime.host import PartyHost
from fedllm.runtime.marks import pull_of
from fedllm.runtime.signatory import Signatory
from fedllm.runtime.site import Site, data_settings
from fedllm.runtime.triggers import trigger_pull
from fedllm.scenarios.base import ClientContext, ClientHalf, Log, TokenData
from fedllm.train.base import LocalTrainer
from fedllm.train.corrections import Correction, together
from fedllm.train.heeded import Heeded
from fedllm.train.private import PrivateTrainer
from fedllm.train.supervised import SupervisedTrainer

_MANY_ROUNDS = 10**9


def trainer_for(job: Job) -> LocalTrainer:
    """Return the trainer that a job asks for.

    Args:
        job: The job.
    """
    return PrivateTrainer() if job.privacy.differential_privacy.is_local else SupervisedTrainer()


def need_private(trainer: LocalTrainer) -> None:
    """Raise where a trainer would not keep to the terms of private training.

    Args:
        trainer: The trainer.

    Raises:
        ConfigError: `BAD_COMBINATION`.
    """
    if not getattr(trainer, "is_private", False):
        raise ConfigError(
            "BAD_COMBINATION",
            f"{type(trainer).__name__} does not bound the gradient of each example, so no epsilon would hold",
            where="privacy.differential_privacy",
            fix="leave the trainer out, or set `unit: none`",
        )


def _pull(site: Site, party: str, run: RunFolder) -> Correction | None:
    """Return what a claimant's marks add to each of its steps."""
    if party not in site.job.ownership.claimants or party not in site.claims:
        return None
    return together(
        pull_of(site, party, site.claims[party], run.path / "parties" / party / FOLDER), trigger_pull(site, party)
    )


def purse_of(site: Site, name: str, run: RunFolder) -> Purse:
    """Return where a party keeps what outlives a run: what was spent of its privacy, and the sums that it opened.

    Args:
        site: The party's site.
        name: The party.
        run: The run folder, beside which it is where the site does not say.
    """
    return site.purses.get(name) or Purse(run.path.parent / PURSE_FOLDER)


def _budget(site: Site, name: str, run: RunFolder) -> Budget | None:
    """Return what pays for a party's rounds with noise of its own; None where it adds none."""
    asked = site.job.privacy.differential_privacy
    if not asked.is_local and asked.placement != "distributed":
        return None
    purse, own = purse_of(site, name, run), run.path / "parties" / name
    return Budget(purse, party=name, run_id=run.run_id, folder=own, trained=run.party_states(name).present())


def _of_the_owner(site: Site, name: str) -> dict[str, Any]:
    """Return what only the owner of an emulator's whole model may use."""
    if name != getattr(site.job.federation, "owner", None):
        return {}
    return {"full": site.full, "emulator": site.emulator, "public": site.public}


def _ready(site: Site, rounds: list[int]) -> Ready:
    return Ready(
        base_digest=site.base.digest,
        tokenizer_digest=site.base.tokenizer_digest,
        template_digest=site.template_digest,
        common_digest=site.common_digest,
        manifest=site.model.manifest,
        beside=site.job.table_line().beside(site.job.federation, site.model),
        versions=versions(),
        rounds=rounds,
    )


def open_host(
    site: Site,
    name: str,
    data: TokenData,
    *,
    run: RunFolder,
    trainer: LocalTrainer,
    on_step: Callable[[int, int], None] = lambda step, num_steps: None,
) -> PartyHost:
    """Return one party of a run, ready to answer.

    Args:
        site: What the process shares.
        name: The party.
        data: Its tokens.
        run: The run folder.
        trainer: The local trainer.
        on_step: Called after each optimiser step with (steps done, steps of the round).

    Raises:
        ConfigError: `BAD_COMBINATION`, the trainer does not keep to the job's privacy; `OWNERSHIP_UNCOMMITTED`.
        StateLost: `LEDGER_BROKEN`.
    """
    job, line = site.job, site.job.table_line()
    if job.privacy.differential_privacy.is_local:
        need_private(trainer)
    budget, pull = _budget(site, name, run), _pull(site, name, run)

    def open_client(log: Log) -> ClientHalf:
        context = ClientContext(
            party=name,
            parties=job.trainers,
            seed=job.seed,
            settings=job.federation,
            model=site.model,
            pad_id=site.base.tokenizer.pad_token_id,
            data=data,
            data_settings=data_settings(job),
            train_settings=job.train,
            privacy=job.privacy,
            eval_batch_size=job.evaluate.per_device_eval_batch_size,
            trainer=Heeded(trainer),
            log=log,
            on_step=on_step,
            deliver=partial(site.deliver or deliver_own, site, run, name),
            budget=budget,
            pull=pull,
            **_of_the_owner(site, name),
        )
        return line.client(context)

    return PartyHost(
        party=name,
        job_digest=run.job_digest,
        kinds=line.kinds(),
        open_client=open_client,
        ready=partial(_ready, site),
        states=run.party_states(name),
        rows=run.party_rows(name),
        blobs=site.blobs,
        room=line.grown(job.federation, site.model.manifest, _MANY_ROUNDS, job.parties),
        take_copy=None if job.ownership.trace == "none" else partial(write_copy, site, run, name),
        codec_down=job.federation.codec_down.codec if hasattr(job.federation, "codec_down") else None,
        signatory=Signatory.of(job, run, name, site.claims[name]) if job.ownership.enabled and site.claims else None,
    )
