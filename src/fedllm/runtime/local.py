"""The link within one process: parties take turns on one base model. Everything still travels as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from fedllm.runs.folder import RunFolder
from fedllm.runtime.base import Link, Wanted
from fedllm.runtime.host import PartyHost
from fedllm.runtime.opening import open_host, purse_of, trainer_for
from fedllm.runtime.package_party import package_desk
from fedllm.runtime.party_data import check_data_unchanged
from fedllm.runtime.site import Site
from fedllm.runtime.sum_keys import SignaturesOf, local_signatures, make_sum_keys, sums_of
from fedllm.scenarios.base import TokenData
from fedllm.train.base import LocalTrainer
from fedllm.wire.frame import Parcel


class InProcessLink(Link):
    """Hands each message to its party's host, one after another. See `fedllm.runtime.base.Link`."""

    def __init__(self, hosts: Mapping[str, PartyHost], *, order: tuple[str, ...] | None = None) -> None:
        self._hosts = dict(hosts)
        self._order = order or tuple(hosts)

    @property
    def parties(self) -> tuple[str, ...]:
        """The parties, in the job's order."""
        return tuple(self._hosts)

    def exchange(
        self, messages: Mapping[str, Parcel], *, timeout_s: float, wanted: Wanted
    ) -> Iterator[tuple[str, Parcel | None]]:
        """Yield each party's answer in turn.

        Args:
            messages: One message per party.
            timeout_s: How long a party may work; the party itself gives up then.
            wanted: Not asked: tensors come along.
        """
        for party in self._order:
            if party in messages:
                yield party, self._hosts[party].handle(messages[party], timeout_s=timeout_s)

    def close(self) -> None:
        """Let go of packages that are under way."""
        for host in self._hosts.values():
            if host.package:
                host.package.close()


def local_hosts(
    site: Site,
    data: Mapping[str, TokenData],
    run: RunFolder,
    *,
    trainer: LocalTrainer | None = None,
    on_step: Callable[[str, int, int], None] = lambda party, step, num_steps: None,
    signatures: SignaturesOf | None = None,
) -> dict[str, PartyHost]:
    """Return the hosts of parties in this process, by name.

    Args:
        site: What the process shares.
        data: Each party's tokens.
        run: The run folder.
        trainer: The local trainer; by default the one that the job asks for.
        on_step: Called after each step of a party's training.
        signatures: How parties sign in secure sums; by default with keys that are made for the run.
    """
    trainer = trainer or trainer_for(site.job)
    for party, tokens in data.items():
        run.hold_party(party)
        check_data_unchanged(run, party, tokens)
    hosts = {
        party: open_host(site, party, data[party], run=run, trainer=trainer, on_step=partial(on_step, party))
        for party in data
    }
    if signatures is None:
        make_sum_keys(site.job, run)
    signatures = signatures or partial(local_signatures, run)
    for party, host in hosts.items():
        purse = purse_of(site, party, run)
        host.sums = sums_of(site.job, run, party, signatures=signatures, purse=purse)
        host.package = package_desk(site, run, party, signatures)
    return hosts
