"""What the server's job process does, apart from FLARE: open the run, drive it, write its verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedllm.runs.folder import RunFolder, run_identity
from fedllm.runs.plan_files import read_plan
from fedllm.runtime.base import Link
from fedllm.runtime.run import carry_out, concluding


def run_folder(site: Path, run_id: str) -> Path:
    """Return the folder of a run at the coordinator.

    Args:
        site: The server's site folder.
        run_id: The run.
    """
    for path in sorted((site / "state" / "runs").iterdir()):
        if (path / "run.json").is_file() and run_identity(path)["run_id"] == run_id:
            return path
    raise FileNotFoundError(run_id)


def drive_run(site: Path, run_id: str, make_link: Callable[[list[str]], Link]) -> None:
    """Drive a run to its end, or until it pauses; the verdict is in its folder.

    Args:
        site: The server's site folder.
        run_id: The run.
        make_link: A link to the parties, given in the job's order.
    """
    path = run_folder(site, run_id)
    job, parties = read_plan(path)
    run = RunFolder.open(path)
    try:
        with concluding(run):
            carry_out(run, job, parties, make_link(job.parties))
    finally:
        run.close()
