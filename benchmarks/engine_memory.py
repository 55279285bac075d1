"""Memory of the server's process of a run over FLARE, by number of parties: an adapter of 256 MB, nothing trained.

Run: python benchmarks/engine_memory.py   (about 4 minutes on 2 cores; needs 10 GB of memory and of disk)

Idle is the process with the run's state loaded, before the first round; the peak is the kernel's own figure after it.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import tempfile
from pathlib import Path

from engine_baselines.load import Load, Trial
from engine_ours.deploy import rounds_of

BAR = 2.5


def main() -> None:
    """Measure each number of parties and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parties", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--mb", type=float, default=256.0, help="size of the adapter")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    # So that the processes are ended, whoever ends this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"{platform.machine()}, Python {platform.python_version()}, {args.mb:.0f} MB in 128 tensors")
    above = []
    for parties in args.parties:
        load = Load(parties=parties, rounds=args.rounds, values=round(args.mb * 1e6 / 128 / 4))
        with tempfile.TemporaryDirectory(prefix="engine-", ignore_cleanup_errors=True) as folder:
            timing, found = rounds_of(load, Trial(Path(), Path(folder), 600.0))
        above.append((found["peak_mb"] - found["idle_mb"]) / args.mb)
        memory = f"idle {found['idle_mb']:.0f} MB, peak {found['peak_mb']:.0f} MB"
        print(
            f"{parties} parties: {memory}, {above[-1]:.2f} payloads above idle, {max(timing.rounds_s):.1f} s",
            flush=True,
        )
    sys.exit(max(above) > BAR)


if __name__ == "__main__":
    main()
