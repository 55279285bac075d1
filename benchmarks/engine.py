"""Time of a round between machines' processes: fedllm, NVIDIA FLARE's own FedAvg recipe, Flower, a bare FLARE call.

Run: python benchmarks/engine.py --make-environments DIR   (once, about 2 minutes: FLARE and Flower, each on its own)
     python benchmarks/engine.py --environments DIR        (about 5 minutes on 2 cores)

All run on this machine over loopback, 4 parties, no training: an adapter of 54.5 MB goes to each party, a changed
copy of it comes back, their mean is the next round's. FLARE with mutual TLS, provisioned and started as in production;
Flower without TLS. The first round of a run doesn't count. In the tables: seconds or milliseconds of a round or call;
peak memory of the server's largest process and of all of its processes; cores that others used meanwhile.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine_baselines import flare, flower
from engine_baselines.environments import make_environments, versions
from engine_baselines.load import CALL_BYTES, Load, Row, Timing, Trial
from engine_baselines.processes import Usage
from engine_ours.deploy import rounds_of

import fedllm

OURS = "fedllm"
CALL = Load(parties=4, rounds=21, tensors=1, values=CALL_BYTES // 4)


def ours(load: Load, trial: Trial) -> Timing:
    """Return what rounds of fedllm take: mutual TLS, signed messages, a process for each party, as after `fedllm up`.

    A round is a whole one, journal and checkpoint included; with the load of a call it is the exchange alone.

    Args:
        load: What is carried.
        trial: Where.
    """
    return rounds_of(load, trial)[0]


class Trials:
    """Runs trials one after the other, each in a folder of its own that is removed, and keeps what they showed."""

    def __init__(self, environments: Path, timeout_s: float) -> None:
        self.environments = environments
        self.timeout_s = timeout_s
        self.rounds: dict[str, Row] = {}
        self.calls: dict[str, Row] = {}
        self.failed = False

    def run(self, rows: list[Row], table: dict[str, Row], measure: Callable[[Trial], tuple[Timing, ...]]) -> None:
        """Run one trial and add its timings to the rows, one for each.

        Args:
            rows: How they are shown.
            table: Which table the rows belong to.
            measure: The trial.
        """
        names = ", ".join(row.name for row in rows)
        print(f"measuring {names}", file=sys.stderr, flush=True)
        before = Usage.now()
        try:
            with tempfile.TemporaryDirectory(prefix="engine-", ignore_cleanup_errors=True) as temporary:
                timings = measure(Trial(self.environments, Path(temporary), self.timeout_s))
        except RuntimeError as error:
            self.failed = True
            print(f"{names}: FAILED: {error}", file=sys.stderr, flush=True)
            return
        others_cores = Usage.now().others_since(before)
        for row, timing in zip(rows, timings, strict=True):
            known = table.setdefault(row.name, row)
            known.runs.append(timing)
            known.others_cores = max(known.others_cores, others_cores)

    def ours(self, load: Load, table: dict[str, Row]) -> None:
        """Measure fedllm.

        Args:
            load: What is carried.
            table: Where it is shown.
        """
        row = Row(OURS, f"fedllm {fedllm.__version__}", flare.SECURITY)
        self.run([row], table, lambda trial: (ours(load, trial),))

    def flare(self, load: Load) -> None:
        """Measure FLARE's own FedAvg recipe.

        Args:
            load: What is carried.
        """
        row = Row("FLARE's FedAvg recipe", versions(self.environments, "flare"), flare.SECURITY)
        self.run([row], self.rounds, lambda trial: (flare.fedavg_recipe(load, trial),))

    def flower(self, load: Load, *, evaluated: bool) -> None:
        """Measure Flower's FedAvg.

        Args:
            load: What is carried.
            evaluated: Whether each round also sends the new model out to be evaluated.
        """
        name = f"Flower's FedAvg, {'train and evaluate' if evaluated else 'train only'}"
        row = Row(name, versions(self.environments, "flower"), flower.SECURITY)
        self.run([row], self.rounds, lambda trial: (flower.fedavg(load, trial, evaluated=evaluated),))

    def bare_calls(self, load: Load) -> None:
        """Measure a call of FLARE's, without anything around it.

        Args:
            load: How many parties and calls.
        """
        version = versions(self.environments, "flare")
        rows = [Row(f"a bare FLARE call, {kind}", version, flare.SECURITY) for kind in ("Cell", "Collab")]
        self.run(rows, self.calls, lambda trial: flare.bare_calls(load, trial))


def main() -> None:
    """Make the environments, or measure and print."""
    args = options()
    # So that the processes of a trial are ended, whoever ends this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.make_environments:
        make_environments(args.make_environments)
        return
    trials = Trials(args.environments, args.timeout)
    load = Load(parties=4, rounds=args.rounds)
    for _ in range(args.repeats):
        measure(trials, load, only=args.only, evaluated=args.flower_evaluates)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {load.parties} parties")
    report(trials.rounds, f"{load.num_bytes / 1e6:.1f} MB in {load.tensors} fp32 tensors, there and back", unit=1.0)
    report(trials.calls, f"{CALL.num_bytes / 1e6:.1f} MB there and back, ms", unit=1000.0)
    sys.exit(trials.failed)


def options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = parser.add_mutually_exclusive_group(required=True)
    folder.add_argument("--make-environments", type=Path, metavar="DIR", help="install FLARE and Flower there and end")
    folder.add_argument("--environments", type=Path, metavar="DIR", help="measure with what was installed there")
    parser.add_argument("--rounds", type=int, default=3, help="of each run; the first doesn't count")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each kind, in turn")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the rounds of one run")
    parser.add_argument("--only", nargs="+", choices=["ours", "flare", "flower", "calls"], help="measure less")
    parser.add_argument("--flower-evaluates", action="store_true", help="measure Flower's default as well: a round"
                        " sends the model out twice, to be trained and to be evaluated")  # fmt: skip
    return parser.parse_args()


def measure(trials: Trials, load: Load, *, only: list[str] | None, evaluated: bool) -> None:
    """Run one trial of each kind.

    Args:
        trials: Where they are kept.
        load: What is carried in a round.
        only: The kinds to run; none means all.
        evaluated: Whether Flower is measured with its evaluation, too.
    """
    kinds = only or ["ours", "flare", "flower", "calls"]
    if "ours" in kinds:
        trials.ours(load, trials.rounds)
        trials.ours(CALL, trials.calls)
    if "flare" in kinds:
        trials.flare(load)
    if "flower" in kinds:
        trials.flower(load, evaluated=False)
        if evaluated:
            trials.flower(load, evaluated=True)
    if "calls" in kinds:
        trials.bare_calls(CALL)


def report(rows: dict[str, Row], title: str, *, unit: float) -> None:
    """Print one table.

    Args:
        rows: What was measured, by name.
        title: What was carried.
        unit: Of the times shown, in one second.
    """
    if not rows:
        return
    mine = rows.get(OURS)
    heads = f"{'median':>8} {'min':>8} {'max':>8} {'ours / this':>11} {'server MB':>9} {'all MB':>7} {'others':>6}"
    print(f"\n{title}\n{'':<38} {'version':<14} {'TLS':<10} {heads}")
    for row in rows.values():
        low, high = min(row.seconds) * unit, max(row.seconds) * unit
        ratio = f"{mine.median_s / row.median_s:.3f}" if mine else "not there"
        memory = f"{row.server_mb or '-':>9} {row.server_side_mb or '-':>7} {row.others_cores:>6.2f}"
        times = f"{row.median_s * unit:>8.2f} {low:>8.2f} {high:>8.2f}"
        print(f"{row.name:<38} {row.version:<14} {row.security:<10} {times} {ratio:>11} {memory}")
    if not mine:
        print("fedllm's own transport was not measured in this run.")


if __name__ == "__main__":
    main()
