"""Cost of federation: a run against a bare loop that does the same optimiser steps on the same tensors.

Run: python benchmarks/overhead.py   (about 2 minutes on 2 cores)
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import machine, make_job, random_base, write_parties

from fedllm.data.batches import BatchOrder, collate
from fedllm.runs.folder import RunFolder
from fedllm.runtime.local import InProcessLink, local_hosts
from fedllm.runtime.run import drive
from fedllm.runtime.site import Site, open_site, party_tokens
from fedllm.scenarios.base import TokenData
from fedllm.train.optimizer import make_optimizer

PARTIES = ["north", "east"]


def bare_loop(site: Site, data: dict[str, TokenData], *, steps: int) -> float:
    """Return the seconds that the optimiser steps of all parties take without a federation.

    Args:
        site: The loaded base model.
        data: Each party's tokens.
        steps: Optimiser steps of each party.
    """
    settings, model = site.job.train, site.model.model
    size = settings.per_device_train_batch_size
    batches = {
        party: [
            collate([tokens.train[i] for i in order.batch(step)], pad_id=site.base.tokenizer.pad_token_id)
            for step in range(steps)
        ]
        for party, tokens in data.items()
        for order in [BatchOrder(len(tokens.train), size, seed=site.job.seed, party=party)]
    }
    site.model.write(site.model.initial(site.job.seed))
    started = time.perf_counter()
    for party_batches in batches.values():
        optimizer = make_optimizer(site.model.trainable, settings)
        model.train()
        for batch in party_batches:
            model(**batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(site.model.trainable.values(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return time.perf_counter() - started


def federated(site: Site, data: dict[str, TokenData], folder: Path) -> float:
    """Return the seconds that the rounds of a run take, everything from handshake to last checkpoint included.

    Args:
        site: The loaded base model.
        data: Each party's tokens.
        folder: The run folder.
    """
    run = RunFolder.create(folder, job_digest=site.job.digest)
    link = InProcessLink(local_hosts(site, data, run))
    started = time.perf_counter()
    drive(run, site.job, link)
    spent = time.perf_counter() - started
    run.close()
    return spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = random_base(folder / "base", hidden=args.hidden, layers=6)
        parties = write_parties(folder / "data", names=PARTIES, examples=160, words=24)
        job = make_job(
            base,
            PARTIES,
            federation={"num_rounds": args.rounds},
            train={"local_steps": 10, "per_device_train_batch_size": 16, "learning_rate": 1e-3},
            runtime={"num_threads": args.threads},
        )
        site = open_site(job, parties)
        data = {located.party.name: party_tokens(site, located) for located in parties}
        steps = args.rounds * 10
        bare_loop(site, data, steps=2)
        pairs = [
            (federated(site, data, folder / f"run-{number}"), bare_loop(site, data, steps=steps))
            for number in range(args.repeats)
        ]
        report(pairs, args.rounds, steps)


def report(pairs: list[tuple[float, float]], rounds: int, steps: int) -> None:
    """Print the figures.

    Args:
        pairs: Seconds (run, bare loop), measured in turn.
        rounds: Rounds of the run.
        steps: Optimiser steps of each party.
    """
    bare = statistics.median(bare for _, bare in pairs)
    step_ms = 1000 * bare / steps / len(PARTIES)
    ratios = sorted(run / bare for run, bare in pairs)
    fixed_ms = statistics.median(1000 * (run - bare) / rounds for run, bare in pairs)
    print(machine())
    print(f"{len(PARTIES)} parties, {rounds} rounds x 10 local steps, evaluation off, {step_ms:.0f} ms a step")
    print(f"run / bare loop: median {statistics.median(ratios):.3f} (min {ratios[0]:.3f}, max {ratios[-1]:.3f})")
    print(f"fixed cost of a round with {len(PARTIES)} parties: {fixed_ms:.0f} ms")


if __name__ == "__main__":
    main()
