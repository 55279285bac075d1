"""Every error that a user can meet: code, what happened, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit codes of the command line; part of the public interface (docs/reference/exit-codes.md)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    PAUSED = 3
    REFUSED = 4
    IDENTITY = 5
    BUDGET = 6
    RESOURCES = 7
    STATE_LOST = 8
    EXPORT = 9
    INTERRUPTED = 130
    TERMINATED = 143


# Code -> one line of help. docs/reference/errors.md has a section for each, held by a test.
CODES: dict[str, str] = {
    "UNKNOWN_KEY": "A key that no setting has.",
    "DUPLICATE_KEY": "The same key stands twice in one mapping.",
    "BAD_YAML": "The file is not YAML, or uses a part of YAML that is refused.",
    "BAD_VALUE": "A value of the wrong type, or out of range.",
    "MISSING_KEY": "A required setting is missing.",
    "BAD_COMBINATION": "Two settings that cannot hold together.",
    "FILE_NOT_FOUND": "A file or folder that the job or a party names is not there.",
    "ONE_PARTY": "A federation needs two parties at least.",
    "PARTY_UNKNOWN": "A party file and the job do not name the same parties.",
    "DATA_NOT_FOUND": "A data file, folder or data set id cannot be found.",
    "DATA_FORMAT_UNKNOWN": "The examples have no known layout, or more than one.",
    "DATA_BROKEN_LINE": "A line or record that cannot be read.",
    "DATA_COLUMN_MISSING": "A mapped column that the data do not have.",
    "DATA_EMPTY": "No example is left to train or evaluate on.",
    "DATA_NO_TEMPLATE": "The data are chats, and the tokenizer has no chat template.",
    "DATA_TEMPLATE": "The chat template cannot render the chats, or its answers cannot be told apart.",
    "DATA_CHANGED": "A party's data are not those that the run began with.",
    "DATA_LABEL_UNKNOWN": "An example has a label that the job does not name.",
    "DATA_NO_TARGET": "No token would be trained: every token is masked or cut off.",
    "MODEL_NOT_FOUND": "The base model cannot be found or loaded.",
    "MODEL_UNSAFE": "The model folder asks to run code, or has no safetensors weights.",
    "MODEL_MISMATCH": "A party holds another base model, tokenizer or template than the job.",
    "PEFT_TARGET": "The tuning method does not fit the base model.",
    "DEVICE_MISSING": "The machine lacks what a setting asks for: device, bf16, a package.",
    "POLICY_REFUSED": "A site's own limits forbid what the job asks.",
    "NOT_APPROVED": "A site has not approved the job, or its approval does not hold any more.",
    "BAD_KEY": "The file is no private key, or one of a kind that cannot be used.",
    "KEY_EXISTS": "A private key would be overwritten.",
    "KEY_EXPOSED": "Others than its owner can read a private key.",
    "WEAK_KEY": "A key that is too short to be safe.",
    "REQUEST_REFUSED": "A request for a certificate that is malformed, or for another name or key.",
    "CERT_REFUSED": "A certificate that does not prove who its holder is.",
    "CERT_EXPIRED": "A certificate that is no longer valid.",
    "CERT_NOT_YET_VALID": "A certificate that is not valid yet, as a rule because of a wrong clock.",
    "AUTHORITY_MISSING": "The project's authority is not there, or not whole.",
    "AUTHORITY_CHANGED": "Another authority than the one that is trusted here.",
    "AUTHORITY_UNCONFIRMED": "Nobody has confirmed yet that this authority is to be trusted.",
    "KIT_MISSING": "No start-up kit is installed here.",
    "KIT_DAMAGED": "A file of a start-up kit was changed, is missing, or was added.",
    "KIT_REFUSED": "A start-up kit that is unsafe to unpack, out of date, or for another site.",
    "BAD_SIGNATURE": "Something is not signed by whom it names.",
    "NOT_ON_ROSTER": "A name that the project's roster does not have.",
    "BLOB_MISSING": "A message refers to tensors that the receiver no longer holds; they are sent again.",
    "PAYLOAD_REFUSED": "A message is malformed, too large, or from another run.",
    "NONFINITE": "A tensor or a loss is not a finite number.",
    "SUM_OVERFLOW": "Updates are too large to be summed exactly.",
    "SUM_REFUSED": "A step of a secure sum that a party, or the server, does not take; nothing is opened.",
    "SUM_ABORTED": "Too few parties stayed to the end of a secure sum; nothing was opened.",
    "SUM_IN_CLEAR": "A party was asked for something in the clear that the job sums securely.",
    "COHORT_CHANGED": "A sum that was opened would be opened again for other parties, or of something else.",
    "QUORUM": "Fewer parties answered than `min_parties`.",
    "ROUND_TIMEOUT": "A party did not finish within `round_timeout`.",
    "REPLAYED": "A message that came before, or an older one than that; nothing is done on its word.",
    "STALE_ROUND": "An answer came after the round it belongs to was closed; it is not used.",
    "PARTY_FAILED": "A party stopped with an error of its own; the text stays there.",
    "EMULATOR_REFUSED": "An emulator's package breaks its owner's export policy; it is not written.",
    "RUN_EXISTS": "The run folder is in use, or holds another job.",
    "RUN_NOT_FOUND": "The folder is not a run.",
    "RUN_STOPPED": "The run was stopped for good.",
    "RUN_UNFINISHED": "The run has no final adapter yet.",
    "RUN_ALTERED": "A file of a finished run is not the one that the run left.",
    "STATE_CORRUPT": "Every generation of the run's state is damaged.",
    "ENDPOINT_FAILED": "A model behind a network address gives no answer that could be used.",
    "DISK_FULL": "No space is left for the run folder.",
    "BUDGET_EXHAUSTED": "One more round would spend more privacy than the job or a site allows.",
    "BUDGET_OTHER_UNIT": "Earlier runs on the same data hid less than this one; what they spent of it is not known.",
    "LEDGER_BROKEN": "The ledger of spent privacy was deleted, shortened or changed.",
    "GRADIENT_UNSURE": "The gradient of a single example cannot be had from this model, or is not right.",
    "OWNERSHIP_UNCOMMITTED": "A party claims the model and has not committed to a claim before the run.",
    "OWNERSHIP_BROKEN": "The log of commitments is not as the parties signed it.",
    "AUDIT_BROKEN": "A site's audit log is not as it was written.",
    "AUDIT_LOCKED": "Another process holds a site's audit log for too long.",
    "UNEXPECTED": "A fault of fedllm itself; please report it.",
    "INTERRUPTED": "The run was stopped by a signal; it can be resumed.",
    "PARTY_LOST": "A party's process gives no sign of life; the run is tried again once it is back.",
    "NO_PROGRESS": "Several attempts in a row brought a run between machines no further.",
}


class FedllmError(Exception):
    """An error with a stable code. Its text may name files, fields and parties, never rows or prompts.

    Args:
        code: A key of `CODES`.
        what: What is wrong, with the offending value where that is not private.
        where: File and line, field or party; empty when there is none.
        fix: What the reader can do about it.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, code: str, what: str, *, where: str = "", fix: str = "") -> None:
        if code not in CODES:
            raise KeyError(f"{code} is not in errors.CODES")
        super().__init__(code, what)
        self.code, self.what, self.where, self.fix = code, what, where, fix
        self.also: tuple[FedllmError, ...] = ()

    def __str__(self) -> str:
        head = f"[{self.code}] {self.where}: {self.what}" if self.where else f"[{self.code}] {self.what}"
        return f"{head}\n  fix: {self.fix}" if self.fix else head


class ConfigError(FedllmError, ValueError):
    """The job file, a party file, a flag or an argument is wrong."""

    exit_code = ExitCode.USAGE


class DataError(FedllmError, ValueError):
    """A data file cannot be used as it is."""

    exit_code = ExitCode.USAGE


class ModelError(FedllmError, ValueError):
    """A base model, tokenizer or adapter cannot be used as it is."""

    exit_code = ExitCode.USAGE


class PolicyError(FedllmError):
    """A site's own limits forbid what the job asks."""

    exit_code = ExitCode.REFUSED


class EmulatorRefused(FedllmError):
    """An emulator's package may not leave its owner. `report` has the figures, as plain values."""

    exit_code = ExitCode.EXPORT

    def __init__(self, code: str, what: str, *, where: str, fix: str, report: dict[str, Any]) -> None:
        super().__init__(code, what, where=where, fix=fix)
        self.report = report


class IdentityError(FedllmError):
    """A key, a certificate or a start-up kit does not prove who someone is."""

    exit_code = ExitCode.IDENTITY


class ResourceError(FedllmError):
    """The machine lacks something: memory, disk, a package, a device."""

    exit_code = ExitCode.RESOURCES


class PayloadError(FedllmError):
    """A message was refused on receipt."""


class SenderRefused(PayloadError):
    """A message, an approval or a job does not come from whom it names."""

    exit_code = ExitCode.IDENTITY


class RunFailed(FedllmError):
    """The run cannot go on, and resuming it as it is would fail again."""


class BudgetExhausted(RunFailed):
    """A round would spend more privacy than may be spent."""

    exit_code = ExitCode.BUDGET


class RunPaused(FedllmError):
    """The run stopped at a committed round and can be resumed."""

    exit_code = ExitCode.PAUSED


class StateLost(FedllmError):
    """No generation of a run's state can be read. Nothing is restarted silently."""

    exit_code = ExitCode.STATE_LOST


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return a hint that names the closest choice, or lists the choices when none is close.

    Args:
        word: What the user wrote.
        choices: What would have been right.
    """
    names = sorted(set(choices))
    if close := difflib.get_close_matches(word, names, n=1, cutoff=0.6):
        return f"did you mean `{close[0]}`?"
    return f"one of: {', '.join(f'`{name}`' for name in names)}" if names else ""
