"""The package goes from its owner to whoever lacks it: once, sealed, and only as its owner signed it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from offsite import LACKING, OWNER, offsite_federation, party_file
from safetensors.torch import load_file, save_file
from tiny import TinyFederation, save_base

from fedllm.errors import ConfigError, FedllmError, ModelError, PayloadError, PolicyError, SenderRefused
from fedllm.job.job import Job
from fedllm.job.policy import PACKAGE_REQUESTS, check_operation
from fedllm.models import package_files
from fedllm.models.digest import base_digest, file_digest
from fedllm.models.package import NOTE
from fedllm.models.package_files import PackageFile, check_files
from fedllm.models.scan import matches, secret_tensors
from fedllm.privacy import sealed
from fedllm.privacy.sealed import Pieces, public_hex, unsealed
from fedllm.privacy.secure_sum import Signatures
from fedllm.runs.jsonl import read_rows
from fedllm.runtime import package_messages, package_party
from fedllm.runtime.emulator import owner_of
from fedllm.runtime.host import PartyHost
from fedllm.runtime.package_messages import (
    PIECE,
    GivePiece,
    OfferPackage,
    PackageOffered,
    SealPackage,
    ShownKey,
    Statement,
    TakeKey,
    TakePiece,
    WantPackage,
    context_of,
)
from fedllm.runtime.package_party import Giver, Lineage, Taker
from fedllm.runtime.run import resume
from fedllm.wire.blob import whole
from fedllm.wire.frame import Parcel

Make = Callable[..., TinyFederation]
PIECE_BYTES = 2**15
DIGEST, RUN = "a" * 64, "b" * 32


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_files, "PIECE_BYTES", PIECE_BYTES)


# One owner and one taker, and between them a server that this file plays.


@dataclass
class Pair:
    """A giver and a taker, and what passed between them through the server."""

    giver: Giver
    taker: Taker
    job: Job
    signers: dict[str, Ed25519PrivateKey]
    seen: list[bytes] = field(default_factory=list)
    offered: PackageOffered | None = None

    def offer(self, **changes: Any) -> WantPackage:
        """The owner's offer, which a dishonest owner has changed before it signed."""
        offered = self.giver.answer(OfferPackage())
        assert isinstance(offered, PackageOffered)
        if changes:
            statement = json.dumps(json.loads(offered.statement) | changes)
            signature = self.giver.signatures.sign(package_messages.text_of_statement(statement))
            offered = PackageOffered(statement=statement, signature=signature.hex())
            self.giver._statement = statement
            self.giver._pieces = Pieces(context_of(statement))
        self.offered = offered
        return WantPackage(statement=offered.statement, signature=offered.signature)

    def carry(self, *, until: int | None = None, **changes: Any) -> list[int]:
        """Bring the package over, and return the numbers of the pieces that were sent."""
        wanted: Any = self.taker.answer(self.offer(**changes))
        if wanted.key is None:
            return []
        boxes: Any = self.giver.answer(SealPackage(keys={LACKING: wanted.key}))
        self.taker.answer(TakeKey(box=boxes.boxes[LACKING]))
        stated = Statement.model_validate_json(self.offered.statement if self.offered else "")
        sent = list(range(wanted.start, package_files.num_pieces(stated.files)))[:until]
        for number in sent:
            piece: Any = self.giver.answer(GivePiece(number=number))
            self.seen.append(piece.data[PIECE].numpy().tobytes())
            self.taker.answer(TakePiece(number=number, data=piece.data))
        return sent

    def again(self) -> Taker:
        """A taker of the same site, in another process."""
        self.taker.close()
        t = self.taker
        self.taker = Taker(t.party, t.owner, t.lineage, t.signatures, t.root, t.most_bytes, t.have)
        return self.taker


MakePair = Callable[..., Pair]


def signatures(signers: dict[str, Ed25519PrivateKey], party: str) -> Signatures:
    def verify(name: str, text: bytes, signature: bytes) -> None:
        try:
            signers[name].public_key().verify(signature, text)
        except (KeyError, InvalidSignature):
            raise SenderRefused("BAD_SIGNATURE", "not signed by it", where=name) from None

    return Signatures(signers[party].sign, verify)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks as `fedllm emulator build` leaves it."""
    folder = save_base(tmp_path_factory.mktemp("package"))
    noted(folder)
    return folder


def noted(folder: Path) -> Path:
    files = {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    (folder / NOTE).write_text(json.dumps({"blocks": {}, "files": files}))
    return folder


@pytest.fixture
def make_pair(make_federation: Make) -> Iterator[Callable[..., Pair]]:
    """A function that makes a pair with a package in a folder, and a site to take it to."""
    made: list[Pair] = []

    def make(folder: Path, root: Path, **model: Any) -> Pair:
        sizes = {LACKING: 3, "east": 3, OWNER: 3}
        job = make_federation(sizes=sizes, job={"model.model_name_or_path": "package"} | model).job()
        made.append(pair_of(job, folder, root))
        return made[-1]

    yield make
    for each in made:
        each.taker.close()


@pytest.fixture
def pair(package: Path, make_pair: MakePair, tmp_path: Path) -> Pair:
    return make_pair(shutil.copytree(package, tmp_path / "package"), tmp_path / "site")


def pair_of(job: Job, folder: Path, root: Path) -> Pair:
    lineage, signers = Lineage(job, DIGEST, RUN), {name: Ed25519PrivateKey.generate() for name in job.parties}
    giver = Giver(OWNER, lineage, folder, base_digest(folder), signatures(signers, OWNER))
    return Pair(giver, Taker(LACKING, OWNER, lineage, signatures(signers, LACKING), root, 2**30), job, signers)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def half_folders(root: Path) -> list[str]:
    return [path.name for path in root.glob("*") if path.is_dir()]


def test_what_arrives_is_what_was_sent_and_nothing_goes_twice(pair: Pair) -> None:
    sent = pair.carry()
    assert len(sent) > 3 and pair.taker.folder is not None
    assert contents(pair.taker.folder) == contents(pair.giver.folder)
    again = pair.again()
    assert pair.carry() == [] and again.folder == pair.taker.root / pair.taker.folder.name


def test_what_broke_off_goes_on_where_it_was(pair: Pair) -> None:
    first = pair.carry(until=3)
    assert pair.taker.folder is None and [name for name in half_folders(pair.taker.root) if "." not in name] == []
    # The process ended in the midst of writing the next piece.
    (part,) = pair.taker.root.glob("*.part")
    with max(part.iterdir(), key=lambda path: path.stat().st_size).open("ab") as file:
        file.write(b"half of it")
    pair.again()
    rest = pair.carry()
    assert [*first, *rest] == list(range(len(first) + len(rest)))
    assert pair.taker.folder and contents(pair.taker.folder) == contents(pair.giver.folder)


def test_what_was_written_before_and_damaged_since_is_found_and_sent_anew(pair: Pair) -> None:
    pair.carry(until=3)
    (part,) = pair.taker.root.glob("*.part")
    file = part / "config.json"
    file.write_bytes(file.read_bytes()[::-1])
    pair.again()
    with pytest.raises(PayloadError, match=r"config\.json is not the file that its owner announced"):
        pair.carry()
    assert half_folders(pair.taker.root) == []
    pair.again()
    assert pair.carry()[0] == 0
    assert pair.taker.folder


def test_a_site_with_its_own_copy_is_asked_for_the_digest_alone(pair: Pair) -> None:
    pair.taker.have = base_digest(pair.giver.folder)
    assert pair.carry() == [] and not pair.taker.root.exists()
    pair.taker.have = "c" * 64
    with pytest.raises(ModelError) as refused:
        pair.carry()
    assert refused.value.code == "MODEL_MISMATCH"


def test_a_package_that_the_job_does_not_name_is_refused(make_pair: MakePair, package: Path, tmp_path: Path) -> None:
    right = make_pair(package, tmp_path / "a", **{"model.base_digest": base_digest(package)})
    assert right.carry()
    wrong = make_pair(package, tmp_path / "b", **{"model.base_digest": "d" * 64})
    with pytest.raises(ModelError, match="the job names another"):
        wrong.carry()
    assert not (tmp_path / "b").exists()


def test_other_bytes_than_the_owner_signed_are_refused_and_leave_no_folder(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = package_party.read_piece

    def other(folder: Path, files: Any, number: int) -> bytes:
        data = bytearray(real(folder, files, number))
        data[-1] ^= number == 2
        return bytes(data)

    monkeypatch.setattr(package_party, "read_piece", other)
    with pytest.raises(PayloadError, match="is not the file that its owner announced"):
        pair.carry()
    assert half_folders(pair.taker.root) == [] and pair.taker.folder is None
    # The digests are what finds it.
    pair.again()
    monkeypatch.setattr(package_files.PackageDraft, "_wrong", lambda self, folder: None)
    pair.carry(base_digest=other_digest(pair, other))
    assert pair.taker.folder and contents(pair.taker.folder) != contents(pair.giver.folder)


def other_digest(pair: Pair, read: Callable[..., bytes]) -> str:
    """The digest of the package as a dishonest owner sends it."""
    folder = Path(shutil.copytree(pair.giver.folder, pair.taker.root / "copy"))
    files = package_files.list_files(folder)
    row = b"".join(read(pair.giver.folder, files, number) for number in range(package_files.num_pieces(files)))
    for file in files:
        (folder / file.name).write_bytes(row[: file.size])
        row = row[file.size :]
    return base_digest(folder)


NAMES = ["modeling_llama.py", "../config.json", "a/config.json", "/etc/passwd", ".", "pytorch_model.bin", "model.pt"]
NAMES += ["model.safetensors.exe", "adapter_config.json", "tokenizer.pkl", "config.json\n", "Config.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_not_on_the_list_is_refused(name: str) -> None:
    files = [PackageFile(name=each, size=1, sha256=DIGEST) for each in sorted(["config.json", "vocab.txt"])]
    check_files(files, sender=OWNER)
    with pytest.raises(PayloadError) as refused:
        check_files(sorted([*files, PackageFile(name=name, size=1, sha256=DIGEST)], key=lambda f: f.name), sender=OWNER)
    assert refused.value.code == "PAYLOAD_REFUSED"


def test_no_file_is_listed_twice_or_beyond_its_size() -> None:
    file = PackageFile(name="config.json", size=1, sha256=DIGEST)
    long = PackageFile(name="config.json", size=2**40, sha256=DIGEST)
    for files in ([file, file], [], [long]):
        with pytest.raises(PayloadError):
            check_files(files, sender=OWNER)


def test_a_path_would_leave_the_folder_if_names_were_not_checked(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    target = pair.taker.root / "evil.py"
    path = pair.giver.folder / "zz.py"
    path.write_text("import os")
    evil = PackageFile(name="zz.py", size=path.stat().st_size, sha256=file_digest(path))
    out = evil.model_copy(update={"name": "../evil.py"})
    listed = [*package_files.list_files(pair.giver.folder)]
    real = package_party.read_piece
    sent = [*listed, evil]
    monkeypatch.setattr(package_party, "read_piece", lambda folder, files, number: real(folder, sent, number))
    stated = [file.model_dump() for file in [*listed, out]]
    with pytest.raises(PayloadError, match="no file of a package"):
        pair.carry(files=stated)
    assert not pair.taker.root.exists() or not target.exists()
    # Without that check the owner's file lands outside.
    monkeypatch.setattr(package_party, "check_files", lambda files, sender: None)
    pair.again()
    pair.taker.root.mkdir(exist_ok=True)
    pair.carry(files=stated)
    assert target.read_text() == "import os"


def test_a_config_that_asks_for_code_is_not_kept(pair: Pair) -> None:
    config = pair.giver.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}))
    pair.giver.digest = base_digest(pair.giver.folder)
    with pytest.raises(ModelError) as refused:
        pair.carry()
    assert refused.value.code == "MODEL_UNSAFE" and half_folders(pair.taker.root) == []


def test_a_site_takes_no_longer_package_than_it_allows(pair: Pair) -> None:
    size = package_files.total_bytes(package_files.list_files(pair.giver.folder))
    for most in (0, size - 1):
        pair.taker.most_bytes = most
        with pytest.raises(PolicyError, match="max_package_bytes"):
            pair.carry()
        assert not pair.taker.root.exists()
    pair.taker.most_bytes = size
    assert pair.carry()


# What the server can do.


def test_the_server_reads_nothing_of_the_package(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.carry()
    clear = b"".join(contents(pair.giver.folder)[name] for name in sorted(contents(pair.giver.folder)))
    chunks = [clear[at : at + 16] for at in range(0, len(clear) - 16, 997)]
    assert not any(chunk in piece for piece in pair.seen for chunk in chunks)
    # The same look finds it where pieces are not sealed.
    monkeypatch.setattr(sealed.Pieces, "sealed", lambda self, number, data: data)
    pair.seen.clear()
    with pytest.raises(PayloadError):
        shutil.rmtree(pair.taker.root)
        pair.again()
        pair.carry()
    assert any(chunk in piece for piece in pair.seen for chunk in chunks)


def test_a_server_that_shows_its_own_key_for_a_party_s_gets_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.taker.answer(pair.offer())
    own = X25519PrivateKey.generate()
    forged = SealPackage(keys={LACKING: ShownKey(public=public_hex(own), signature="00" * 64)})
    with pytest.raises(SenderRefused):
        pair.giver.answer(forged)
    # If the owner did not look, the server could open the key, and with it each piece.
    pair.giver.signatures = Signatures(pair.giver.signatures.sign, lambda name, text, signature: None)
    boxes: Any = pair.giver.answer(forged)
    statement = pair.offered.statement if pair.offered else ""
    key = unsealed(boxes.boxes[LACKING], own, context=context_of(statement, LACKING))
    piece: Any = pair.giver.answer(GivePiece(number=0))
    clear = Pieces(context_of(statement), key).opened(0, piece.data[PIECE].numpy().tobytes())
    assert clear == package_files.read_piece(pair.giver.folder, package_files.list_files(pair.giver.folder), 0)


def test_a_key_that_a_party_showed_for_another_offer_is_refused(pair: Pair) -> None:
    wanted: Any = pair.taker.answer(pair.offer())
    pair.giver.answer(SealPackage(keys={LACKING: wanted.key}))
    for keys in ({"east": wanted.key}, {"stranger": wanted.key}, {OWNER: wanted.key}):
        with pytest.raises((SenderRefused, PayloadError)):
            pair.giver.answer(SealPackage(keys=keys))
    (pair.giver.folder / "vocab.txt").write_text("more")
    pair.offer()
    with pytest.raises(SenderRefused):
        pair.giver.answer(SealPackage(keys={LACKING: wanted.key}))


def test_a_server_that_offers_a_package_of_its_own_is_refused(pair: Pair) -> None:
    request = pair.offer()
    for changed in (
        request.model_copy(update={"statement": request.statement.replace(DIGEST[:8], "0" * 8, 1)}),
        request.model_copy(update={"signature": "00" * 64}),
    ):
        with pytest.raises(SenderRefused):
            pair.taker.answer(changed)
    with pytest.raises(PayloadError, match="another run"):
        pair.taker.answer(pair.offer(run_id="c" * 32))


def test_pieces_that_are_changed_left_out_or_swapped_are_refused(pair: Pair) -> None:
    wanted: Any = pair.taker.answer(pair.offer())
    boxes: Any = pair.giver.answer(SealPackage(keys={LACKING: wanted.key}))
    with pytest.raises(PayloadError):
        pair.taker.answer(TakeKey(box=boxes.boxes[LACKING][:-2] + "00"))
    pair.taker.answer(TakeKey(box=boxes.boxes[LACKING]))
    pieces: list[Any] = [pair.giver.answer(GivePiece(number=number)) for number in range(2)]
    changed = pieces[0].data[PIECE].clone()
    changed[40] ^= 1
    for number, data in ((0, changed), (0, pieces[1].data[PIECE]), (1, pieces[1].data[PIECE])):
        with pytest.raises(PayloadError):
            pair.taker.answer(TakePiece(number=number, data={PIECE: data}))
    for data in ({}, {"other": changed}, {PIECE: changed.reshape(1, -1)}, {PIECE: torch.zeros(20, dtype=torch.int32)}):
        with pytest.raises(PayloadError):
            pair.taker.answer(TakePiece(number=0, data=data))
    pair.taker.answer(TakePiece(number=0, data=pieces[0].data))
    with pytest.raises(PayloadError):
        pair.taker.answer(TakePiece(number=0, data=pieces[0].data))


# What the owner must not do.


def test_what_was_not_checked_when_it_was_built_does_not_leave(
    make_pair: MakePair, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(package, tmp_path / "changed"))
    tensors = load_file(folder / "model.safetensors")
    secret = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    save_file(tensors | {"planted": secret}, folder / "model.safetensors", {"format": "pt"})
    changed = make_pair(folder, tmp_path / "site")
    with pytest.raises(ModelError, match="not those that were checked when the package was built"):
        changed.carry()
    monkeypatch.setattr(package_party, "check_built", lambda folder, files: None)
    changed.again()
    changed.carry()
    assert changed.taker.folder and "planted" in load_file(changed.taker.folder / "model.safetensors")


def test_a_whole_model_is_no_package_and_does_not_leave(make_pair: MakePair, base: Path, tmp_path: Path) -> None:
    plain = make_pair(base, tmp_path / "site")
    with pytest.raises(ModelError, match="is no emulator's package"):
        plain.carry()


def test_files_that_are_no_package_s_stay_at_the_owner(pair: Pair) -> None:
    (pair.giver.folder / "notes.txt").write_text("of the owner alone")
    pair.carry()
    assert pair.taker.folder and "notes.txt" not in contents(pair.taker.folder)


# Whole runs.


@pytest.fixture
def made(make_federation: Make) -> TinyFederation:
    return offsite_federation(make_federation)


def packages(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("parties/*/packages/*") if path.is_dir())


def test_a_run_brings_the_package_to_whoever_lacks_it_and_has_the_same_bits(
    made: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[bytes] = []
    handle = PartyHost.handle

    def noting(self: PartyHost, parcel: Parcel, *, timeout_s: float) -> Parcel:
        answer = handle(self, parcel, timeout_s=timeout_s)
        received.extend(part.head + bytes(whole(part.blob) if part.blob else b"") for part in (parcel, answer))
        return answer

    monkeypatch.setattr(PartyHost, "handle", noting)
    result = made.run()
    (folder,) = packages(result.path)
    assert result.status == "SUCCESS" and folder.parts[-3] == LACKING
    assert contents(folder) == contents(made.folder / "package")
    (event,) = [row for row in read_rows(result.path / "events.jsonl") if row["event"] == "package_taken"]
    assert event["party"] == LACKING and "in 6 files" in event["detail"]
    check_no_secret_block(made, folder, received)
    # Where all have it nothing is sent, and no bit of the run is another.
    party_file(made.folder, LACKING)
    plain = made.run("plain")
    assert packages(plain.path) == []
    assert plain.adapter_sha256 == result.adapter_sha256
    rows = [
        [row for row in each.rows() if not row["name"].startswith(("seconds", "bytes"))] for each in (result, plain)
    ]
    assert rows[0] == rows[1]


def check_no_secret_block(made: TinyFederation, folder: Path, received: list[bytes]) -> None:
    owner = owner_of(made.job())
    model = owner.full.load().model
    secret = secret_tensors(model, {"model.layers": [0, 1, 4, 5]}, owner.full.cut)
    allowed = {name: tensor for name, tensor in model.state_dict().items() if name not in secret}
    held = load_file(folder / "model.safetensors")
    assert len(held) > 30 and matches(held, secret, allowed=allowed) == []
    # Of the package the messages show nothing, let alone of what is not in it.
    rows = [tensor.numpy().tobytes()[:64] for tensor in (*secret.values(), *held.values()) if tensor.dim() > 1]
    assert not any(row in message for row in rows for message in received)
    planted = secret["model.layers.3.mlp.up_proj.weight"]
    assert matches({"x": planted}, secret, allowed=allowed)


def test_a_run_that_breaks_off_on_the_way_goes_on_with_the_next_piece(
    made: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, answer = list[int](), Taker.answer

    def breaking(self: Taker, request: Any) -> Any:
        if isinstance(request, TakePiece):
            if len(taken) == 3:
                taken.append(-1)
                raise KeyboardInterrupt
            taken.append(request.number)
        return answer(self, request)

    monkeypatch.setattr(Taker, "answer", breaking)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert [path.suffix for path in packages(made.folder / "run")] == [".part"]
    result = resume(made.folder / "run")
    assert result.status == "SUCCESS"
    assert taken[:5] == [0, 1, 2, -1, 3] and sorted(set(taken)) == sorted(taken)


def test_a_site_that_refuses_ends_the_run_with_the_reason(made: TinyFederation) -> None:
    party_file(made.folder, LACKING, model_name_or_path="../nowhere", limits={"max_package_bytes": 1000})
    with pytest.raises(FedllmError) as refused:
        made.run()
    assert (refused.value.code, refused.value.where) == ("POLICY_REFUSED", f"party {LACKING}")


def test_worker_processes_do_not_wait_for_a_package(made: TinyFederation) -> None:
    with pytest.raises(ConfigError, match="still to come to north"):
        made.run(num_workers=2)


def test_without_a_package_the_error_names_the_mend(make_federation: Make) -> None:
    copied = offsite_federation(make_federation, federation__package="copied")
    with pytest.raises(ModelError) as missing:
        copied.run()
    assert missing.value.code == "MODEL_NOT_FOUND" and "federation.package: send" in missing.value.fix


def test_a_site_answers_about_packages_only_in_a_job_that_sends_one(made: TinyFederation) -> None:
    party = made.parties()[0].party
    assert set(PACKAGE_REQUESTS) == {cls.__name__ for cls in package_messages.PACKAGE_REQUESTS}
    copied = Job.from_yaml(made.job_file, overrides=["federation.package=copied"])
    for kind in PACKAGE_REQUESTS:
        check_operation(kind, job=made.job(), party=party)
        with pytest.raises(PolicyError):
            check_operation(kind, job=copied, party=party)
