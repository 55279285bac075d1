"""A finished run, checked: is every file the one that the run left, and do they say the same?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import ConfigError, FedllmError
from fedllm.identity.kit import Kit, open_kit
from fedllm.job.job import Job
from fedllm.models.deliver import WEIGHTS
from fedllm.models.digest import file_digest
from fedllm.runs.card import model_card
from fedllm.runs.digests import DIGESTS, covered, site_of
from fedllm.runs.folder import run_identity
from fedllm.runs.jsonl import read_rows
from fedllm.runs.plan_files import versions
from fedllm.runs.verify_logs import Look, Problem, check_audit_log, check_commitments

_FINISHED = ("SUCCESS", "PARTIAL")
# What nobody but the run writes: a file that is put in here is as wrong as one that is taken away.
_CLOSED = ("adapter", "checkpoints", "parties")

# What reading a file raises that holds other things than a run writes, in whichever line it is noticed.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)

# What is measured when the checkpoint is written already.
_LATER = ("seconds_write", "bytes_after_up", "bytes_after_down")


@dataclass(frozen=True)
class Check:
    """One check of a run: what was looked at, and what is wrong. `said` is empty where there was nothing to check."""

    name: str
    said: str
    problems: list[Problem]


@dataclass(frozen=True)
class Verified:
    """What the checks of a run found. `seal` is the digest of its digests.json, to be noted elsewhere."""

    path: Path
    seal: str
    checks: list[Check]

    @property
    def problems(self) -> list[Problem]:
        """All that is wrong, in the order of the checks."""
        return [problem for check in self.checks for problem in check.problems]


def verify_run(path: Path, *, site: Path | None = None, peers: Sequence[Path] = (), seal: str = "") -> Verified:
    """Return what the checks of a finished run found.

    On a machine of its own a run is signed by nobody: whoever can write to the folder can write digests.json again.
    Its own digest (`seal`), noted elsewhere, shows that too. Between machines the server signs it with the key of its
    kit, and the sites' audit logs bear out the checkpoints.

    Args:
        path: The run folder.
        site: The folder of a site of the project, whose roster has the server's certificate; by default that of the
            site to which the run belongs.
        peers: Audit logs of other sites.
        seal: The digest of digests.json that was noted when the run was finished.

    Raises:
        ConfigError: `RUN_NOT_FOUND`, `RUN_UNFINISHED`.
    """
    look = Look(path, site or site_of(path), peers, seal)
    _need_finished(look)
    checks = []
    for name, check in CHECKS.items():
        look.problems = []
        try:
            said = check(look)
        except FedllmError as error:
            look.wrong(error.where or name, f"{error.what} [{error.code}]")
            said = "could not be checked"
        except _UNREADABLE:
            look.wrong(name, "a file that it compares does not hold what a run writes")
            said = "could not be checked"
        checks.append(Check(name, said, look.problems))
    for inner in sorted(path.glob(f"baselines/*/{DIGESTS}")):
        below = inner.parent.relative_to(path).as_posix()
        found = verify_run(inner.parent)
        problems = [Problem(f"{below}/{problem.file}", problem.what) for problem in found.problems]
        checks.append(Check(below, f"a run of its own, {len(found.checks)} checks", problems))
    return Verified(path, look.seal.sha256 if look.seal else "", checks)


def _need_finished(look: Look) -> None:
    if not any((look.path / name).exists() for name in ("run.json", "result.json", DIGESTS)):
        run_identity(look.path)
    status = None if (look.path / DIGESTS).exists() else look.json("result.json").get("status", "SUCCESS")
    if status not in (None, *_FINISHED):
        fix = f"`fedllm resume {look.path}` goes on with it"
        raise ConfigError("RUN_UNFINISHED", f"the run is {status}, not finished", where=str(look.path), fix=fix)


def check_files(look: Look) -> str:
    """Note each file that is not the one of the run's end; return how many there are.

    Args:
        look: The run.
    """
    if look.seal is None:
        look.wrong(DIGESTS, "it is missing, or cannot be read: nothing says which files the run left")
        return "no digests"
    if look.expected_seal and look.expected_seal != look.seal.sha256:
        look.wrong(DIGESTS, f"its digest is {look.seal.sha256}, not the one that was noted")
    files, there = look.seal.files, set(covered(look.path))
    for name, digest in files.items():
        if name not in there:
            look.wrong(name, "it is missing")
        elif file_digest(look.path / name) != digest:
            look.wrong(name, "it is not the file that the run left")
    added = sorted(there - files.keys())
    for name in added:
        if name.startswith(_CLOSED):
            look.wrong(name, "the run did not leave this file: it was put in since")
    others = sum(not name.startswith(_CLOSED) for name in added)
    return f"{len(files)} files by SHA-256" + (f"; {others} more are not the run's" if others else "")


def check_signature(look: Look) -> str:
    """Note where digests.json is not signed by the server of the project; nothing to check on one machine.

    Args:
        look: The run.
    """
    signed_by = look.seal.signed_by if look.seal else ""
    if look.site is None:
        return f"by `{signed_by}`, not checked: --site names a site with its certificate" if signed_by else ""
    kit: Kit = open_kit(look.site)
    if look.seal is None or not look.seal.signature:
        look.wrong(DIGESTS, "it is not signed, and the run belongs to a site that signs")
    elif not look.seal.is_signed_by(kit.roster):
        look.wrong(DIGESTS, f"the signature is not that of `{signed_by}` over what stands there")
    return f"by `{signed_by}`, with the certificate of project {kit.project}"


def check_job(look: Look) -> str:
    """Note where job.yaml and the files that name its digest differ.

    Args:
        look: The run.
    """
    identity = look.json("run.json")
    digest, run_id = identity.get("job_digest"), identity.get("run_id")
    found = Job.from_yaml(look.path / "job.yaml").digest
    if found != digest:
        look.wrong("job.yaml", f"its digest is {found[:12]}..., and the run was of {str(digest)[:12]}...")
    for name in ("config.json", "provenance.json"):
        if look.json(name).get("job_digest") != digest:
            look.wrong(name, "it names another job than run.json")
    if look.json("provenance.json").get("run_id") != run_id:
        look.wrong("provenance.json", "it names another run than run.json")
    body = look.seal.body if look.seal else identity
    if (body.get("run_id"), body.get("job_digest")) != (run_id, digest):
        look.wrong(DIGESTS, "it is that of another run")
    return f"digest {found[:12]}..., as in every file that names it"


def check_journal(look: Look) -> str:
    """Note where the journal is not one of a run from round 0 to its last, each begun and committed in turn.

    Args:
        look: The run.
    """
    name = "journal.jsonl"
    try:
        lines = (look.path / name).read_bytes().splitlines()
    except OSError:
        look.wrong(name, "it is missing")
        return "no journal"
    last, begun = -1, -1
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            round_, step = int(row["round"]), row["step"]
        except (ValueError, KeyError, TypeError):
            look.wrong(name, f"line {number} is not written as the journal is")
            continue
        if step == "begin":
            begun = round_
        is_next = step == "commit" and round_ in (last, last + 1) and begun >= round_
        if not (is_next or (step == "begin" and round_ == last + 1) or (step == "rollback" and round_ < last)):
            look.wrong(name, f"line {number}: {step} of round {round_} does not follow on round {last}")
        last = last if step == "begin" else round_
    if last != look.json("result.json").get("rounds"):
        look.wrong(name, f"it ends with round {last}, which is not the last one of result.json")
    return f"rounds 0 to {last}, each begun and committed in turn"


def check_checkpoints(look: Look) -> str:
    """Note checkpoints that are damaged, of another run, or not those that the journal names.

    Args:
        look: The run.
    """
    states = look.states("server", look.path / "checkpoints")
    present = states.present()
    for number in present:
        name = f"checkpoints/round-{number:06d}.ckpt"
        if states.digest(number) != look.commits.get(number):
            look.wrong(name, "it is damaged, or not the checkpoint that the journal names")
    if look.commits and max(look.commits) not in present:
        look.wrong("checkpoints", f"that of the last round, {max(look.commits)}, is missing")
    own = 0
    for folder in sorted(look.path.glob("parties/*/checkpoints")):
        party = folder.parent.name
        kept = look.states(party, folder)
        own += len(kept.present())
        for number in sorted(set(kept.present()) - set(kept.valid())):
            look.wrong(f"parties/{party}/checkpoints/round-{number:06d}.ckpt", "it is damaged, or of another run")
    return f"{len(present)} of the server, as the journal names them; {own} of parties, whole"


def check_metrics(look: Look) -> str:
    """Note where metrics.jsonl is not what the checkpoints hold of it.

    Args:
        look: The run.
    """
    states, rows = look.states("server", look.path / "checkpoints"), read_rows(look.path / "metrics.jsonl")
    compared = 0
    for number in states.valid():
        kept = states.load(number).fields.get("driver/rows")
        found = [row for row in rows if row.get("round") == number and row.get("name") not in _LATER]
        compared += len(found)
        if found != kept:
            look.wrong("metrics.jsonl", f"its rows of round {number} are not those in the checkpoint")
    return f"{compared} of {len(rows)} rows as they are in the checkpoints"


def check_result(look: Look) -> str:
    """Note where result.json and the adapter differ.

    Args:
        look: The run.
    """
    result, weights = look.json("result.json"), look.path / "adapter" / WEIGHTS
    expected, found = result.get("adapter_sha256"), file_digest(weights) if weights.is_file() else None
    if result.get("status") not in _FINISHED:
        look.wrong("result.json", f"its status is {result.get('status')!r}: not that of a finished run")
    if found != expected:
        what = "it is missing" if found is None else "it is not the one that result.json names"
        look.wrong(f"adapter/{WEIGHTS}", what if expected else "result.json names no adapter")
    return f"adapter {found[:12]}..., as result.json names it" if found else "each party has an adapter of its own"


def check_card(look: Look) -> str:
    """Note where the model card says other figures or digests than the run's files.

    Args:
        look: The run.
    """
    name = "adapter/README.md"
    if not (look.path / "adapter").is_dir():
        return ""
    try:
        found = (look.path / name).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        look.wrong(name, "it is missing, or no text")
        return "no card"
    expected = model_card(look.path).splitlines()
    if look.json("provenance.json").get("versions", {}).get("fedllm") != versions()["fedllm"]:
        # Another version words it otherwise: what must be the same are the figures and the digests.
        expected, found = list(_figures(expected)), list(_figures(found))
    for number, (one, other) in enumerate(zip(expected, found, strict=False), start=1):
        if one != other:
            look.wrong(name, f"line {number} is not what the run's files say")
    if len(expected) != len(found):
        look.wrong(name, f"it has {len(found)} lines where the run's files give {len(expected)}")
    return f"its {len(expected)} lines are what metrics, settings and digests of the run say"


def _figures(lines: list[str]) -> Iterator[str]:
    return (line for line in lines if "value:" in line or "digest:" in line or "sha256:" in line)


CHECKS: dict[str, Callable[[Look], str]] = {
    "files": check_files,
    "signature": check_signature,
    "job": check_job,
    "journal": check_journal,
    "checkpoints": check_checkpoints,
    "metrics": check_metrics,
    "result": check_result,
    "card": check_card,
    "audit log": check_audit_log,
    "commitments": check_commitments,
}
