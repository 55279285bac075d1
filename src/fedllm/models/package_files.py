"""The files of a package as they travel: which may be in it, all as one row of bytes, the folder that they become.

A package is data: weights, configs and a tokenizer. No file of code is on the list, and no name leads out of a folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from fedllm.disk import disk_error, make_private, sync_folder
from fedllm.errors import ModelError, PayloadError
from fedllm.models.digest import file_digest, json_digest
from fedllm.models.package import MIDDLE, NOTE, read_note

# How much of the row travels in one message, in bytes.
PIECE_BYTES = 2**23
_MAX_FILES = 1000
# A config or a tokenizer is read whole; the weights are not.
_MAX_TEXT_BYTES = 2**28
_WEIGHTS = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(MIDDLE)}")
_REST = frozenset(
    {
        NOTE,
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
    }
)


class PackageFile(BaseModel):
    """One file of a package."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(max_length=128)
    size: int = Field(ge=0, lt=2**48)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def may_travel(name: str) -> bool:
    """Return whether a file of this name may be in a package.

    Args:
        name: Its name, without a folder.
    """
    return name in _REST or _WEIGHTS.fullmatch(name) is not None


def check_files(files: Sequence[PackageFile], *, sender: str) -> None:
    """Raise where a list of files is not that of a package.

    Args:
        files: As they are announced.
        sender: Who announced them, for the error.

    Raises:
        PayloadError: `PAYLOAD_REFUSED`: a name that is not on the list, or twice, or a text that is too long.
    """
    names = [file.name for file in files]
    strange = [name for name in names if not may_travel(name)]
    long = [file.name for file in files if file.size > _MAX_TEXT_BYTES and not _WEIGHTS.fullmatch(file.name)]
    if strange:
        raise _refused(f"{strange[0][:80]!r} is no file of a package", sender)
    if names != sorted(set(names)) or len(names) > _MAX_FILES or "config.json" not in names:
        raise _refused("the list of the package's files is not in order", sender)
    if long:
        raise _refused(f"{long[0]} is longer than {_MAX_TEXT_BYTES} bytes", sender)


def _refused(what: str, sender: str) -> PayloadError:
    return PayloadError("PAYLOAD_REFUSED", what, where=sender, fix="ask the package's owner to build it again")


def list_files(folder: Path) -> list[PackageFile]:
    """Return the files of a package that travel, by name; others that lie in the folder stay there.

    Args:
        folder: The package.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and may_travel(path.name))
    return [PackageFile(name=path.name, size=path.stat().st_size, sha256=file_digest(path)) for path in paths]


def check_built(folder: Path, files: Sequence[PackageFile]) -> None:
    """Raise where a folder is not as `fedllm emulator build` wrote it: what was not checked then does not leave.

    Args:
        folder: The package.
        files: From `list_files`.

    Raises:
        ModelError: `MODEL_NOT_FOUND`, the folder is no package; `MODEL_MISMATCH`, its weights are not those that were
            checked when it was built.
    """
    note = read_note(folder)
    weights = {file.name: file.sha256 for file in files if _WEIGHTS.fullmatch(file.name)}
    if weights != note.get("files") or len(weights) < len(list(folder.glob("*.safetensors"))):
        raise ModelError(
            "MODEL_MISMATCH",
            f"the weights in {folder} are not those that were checked when the package was built",
            where="model.model_name_or_path",
            fix="build it again with `fedllm emulator build JOB`",
        )


def listing_digest(files: Sequence[PackageFile]) -> str:
    """Return the SHA-256 of a list of files, hex: the name of a package.

    Args:
        files: The list.
    """
    return json_digest([file.model_dump() for file in files])


def total_bytes(files: Sequence[PackageFile]) -> int:
    """Return how long the files are together, in bytes.

    Args:
        files: The list.
    """
    return sum(file.size for file in files)


def num_pieces(files: Sequence[PackageFile]) -> int:
    """Return in how many pieces the files travel.

    Args:
        files: The list.
    """
    return -(-total_bytes(files) // PIECE_BYTES)


def _spans(files: Sequence[PackageFile], number: int) -> Iterator[tuple[PackageFile, int, int]]:
    """Yield which bytes of which files a piece is, as (file, from, to)."""
    first, last = number * PIECE_BYTES, (number + 1) * PIECE_BYTES
    at = 0
    for file in files:
        start, end = max(first - at, 0), min(last - at, file.size)
        if start < end:
            yield file, start, end
        at += file.size


def read_piece(folder: Path, files: Sequence[PackageFile], number: int) -> bytes:
    """Return one piece of a package.

    Args:
        folder: The package.
        files: From `list_files`.
        number: Which piece, from 0.

    Raises:
        ModelError: `MODEL_NOT_FOUND`, a file is not there any more, or shorter than it was.
    """
    data = bytearray()
    try:
        for file, start, end in _spans(files, number):
            with (folder / file.name).open("rb") as handle:
                handle.seek(start)
                part = handle.read(end - start)
            if len(part) < end - start:
                raise OSError(f"{file.name} is shorter than it was")
            data += part
    except OSError as error:
        what = f"the package in {folder} changed while it was sent ({type(error).__name__})"
        fix = "leave it as it is until the run has begun; `fedllm resume RUN`"
        raise ModelError("MODEL_NOT_FOUND", what, where="model.model_name_or_path", fix=fix) from None
    return bytes(data)


@dataclass(frozen=True)
class PackageDraft:
    """A package on its way: written aside, and put into its place when it is whole.

    Args:
        folder: Its place. It is not there before the package is whole.
        files: What it will hold.
    """

    folder: Path
    files: tuple[PackageFile, ...]

    @property
    def aside(self) -> Path:
        """Where it is written."""
        return self.folder.with_name(f"{self.folder.name}.part")

    def is_whole(self) -> bool:
        """Return whether the package is in its place, each file with its digest."""
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return names == {file.name for file in self.files} and self._wrong(self.folder) is None

    def begin(self) -> int:
        """Return the piece to go on with. What an earlier process wrote of it is kept, and cut to whole pieces.

        Raises:
            ResourceError: `DISK_FULL`.
        """
        make_private(self.aside)
        try:
            there = {path.name: path.stat().st_size for path in self.aside.iterdir()}
            at = 0
            for file in self.files:
                at += min(there.get(file.name, 0), file.size)
                if there.get(file.name) != file.size:
                    break
            number = num_pieces(self.files) if at == total_bytes(self.files) else at // PIECE_BYTES
            self._cut(number * PIECE_BYTES)
        except OSError as error:
            raise disk_error(error, self.aside) from None
        return number

    def _cut(self, length: int) -> None:
        at = 0
        for file in self.files:
            with (self.aside / file.name).open("ab") as handle:
                handle.truncate(min(max(length - at, 0), file.size))
            at += file.size

    def append(self, number: int, data: bytes) -> None:
        """Write the next piece.

        Args:
            number: Which it is.
            data: Its bytes.

        Raises:
            PayloadError: `PAYLOAD_REFUSED`, it is of another length.
            ResourceError: `DISK_FULL`.
        """
        spans = list(_spans(self.files, number))
        if len(data) != sum(end - start for _, start, end in spans):
            raise _refused(f"piece {number} of the package has {len(data)} bytes", "owner")
        try:
            for file, start, end in spans:
                with (self.aside / file.name).open("r+b") as handle:
                    handle.seek(start)
                    handle.write(data[: end - start])
                data = data[end - start :]
        except OSError as error:
            raise disk_error(error, self.aside) from None

    def check(self) -> None:
        """Raise where a file is not the one that was announced.

        Raises:
            PayloadError: `PAYLOAD_REFUSED`.
        """
        if name := self._wrong(self.aside):
            raise _refused(f"{name} is not the file that its owner announced", "owner")

    def _wrong(self, folder: Path) -> str | None:
        return next((file.name for file in self.files if file_digest(folder / file.name) != file.sha256), None)

    def settle(self) -> None:
        """Put what was written aside into its place.

        Raises:
            ResourceError: `DISK_FULL`.
        """
        try:
            for file in self.files:
                with (self.aside / file.name).open("rb") as handle:
                    os.fsync(handle.fileno())
            sync_folder(self.aside)
            # What lies there is not whole, or it would not have been asked for.
            shutil.rmtree(self.folder, ignore_errors=True)
            self.aside.replace(self.folder)
            sync_folder(self.folder.parent)
        except OSError as error:
            raise disk_error(error, self.folder) from None

    def discard(self) -> None:
        """Remove what was written aside."""
        shutil.rmtree(self.aside, ignore_errors=True)
