"""Between machines: sites without the package, and a server without it, run a job whose owner sends it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from between import make_kits, run_between, site_of
from fake_channel import Air
from offsite import LACKING, OWNER, SIZES, offsite_federation, party_file
from tiny import TinyFederation

from fedllm.errors import FedllmError
from fedllm.job.job import load_party
from fedllm.models import package_files
from fedllm.runs.audit_log import AUDIT_FILE, read_log
from fedllm.runs.jsonl import read_rows
from fedllm.runtime.consequences import consequences
from fedllm.runtime.flare.desk import Desk
from fedllm.runtime.flare.party import open_party
from fedllm.runtime.flare.waiting import Waiting

Make = Callable[..., TinyFederation]


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("kits"), list(SIZES))


@pytest.fixture
def made(make_federation: Make, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyFederation:
    """Sites of which the owner's alone has the package: none has the owner's folder."""
    monkeypatch.setattr(package_files, "PIECE_BYTES", 2**16)
    shutil.copytree(kits, tmp_path / "sites")
    made = offsite_federation(make_federation)
    for name in SIZES:
        if name != OWNER:
            party_file(made.folder, name, model_name_or_path=f"../none-at-{name}")
    return made


def packages(made: TinyFederation) -> dict[str, Path]:
    found = (made.folder.parent / "sites").glob("site-*/state/packages/*")
    return {path.parts[-4]: path for path in found if path.is_dir() and path.suffix != ".part"}


def test_sites_and_a_server_without_the_package_run_the_job(made: TinyFederation) -> None:
    result = run_between(made)
    assert result.status == "SUCCESS"
    sent = {path.name: path.read_bytes() for path in (made.folder / "package").iterdir()}
    assert set(packages(made)) == {f"site-{name}" for name in SIZES if name != OWNER}
    for path in packages(made).values():
        assert {each.name: each.read_bytes() for each in path.iterdir()} == sent
    # The server wrote an adapter with no more of the model than its config, and keeps nothing of what passed.
    assert result.adapter.is_dir()
    left = [path for path in result.path.rglob("*") if path.is_file() and path.name in sent]
    # The other one is the job's.
    assert {path.relative_to(result.path).as_posix() for path in left} == {"config.json", "base/config.json"}
    weights = sent["model.safetensors"][5000:5064]
    assert not any(weights in path.read_bytes() for path in result.path.rglob("*") if path.is_file())
    # Another run of the same package asks for the digest alone.
    again = run_between(made, "again")
    assert again.adapter_sha256 == result.adapter_sha256
    events = [row["event"] for row in read_rows(again.path / "events.jsonl")]
    assert "package_taken" not in events


def test_lost_calls_lose_no_piece_and_nothing_is_asked_before_the_package(made: TinyFederation) -> None:
    site, count = made.folder.parent / "sites" / f"site-{LACKING}", [0]

    def bad(caller: str, peer: str, topic: Any, body: Any) -> bool:
        count[0] += 1
        return count[0] % 31 == 0

    assert run_between(made, air=Air(bad=bad)).status == "SUCCESS"
    noted = [entry for _, _, entry in read_log(site / AUDIT_FILE) if entry and entry.event == "operation"]
    kinds = [entry.kind for entry in noted if entry.way == "asked"]
    pieces = kinds.count("TakePiece")
    assert pieces > 2 and kinds[: pieces + 3] == ["WantPackage", "TakeKey", *["TakePiece"] * pieces, "Hello"]


def test_a_site_that_takes_no_package_says_so_and_ends_the_run(made: TinyFederation) -> None:
    party_file(made.folder, LACKING, model_name_or_path="../none", limits={"max_package_bytes": 0})
    with pytest.raises(FedllmError) as refused:
        run_between(made)
    assert (refused.value.code, refused.value.where) == ("POLICY_REFUSED", f"party {LACKING}")
    assert f"site-{LACKING}" not in packages(made)


def test_a_site_approves_a_job_before_it_has_the_package(made: TinyFederation) -> None:
    located = load_party(made.folder / "parties" / f"{LACKING}.yaml")
    found = consequences(made.job(), located)
    assert (found.trainable_parameters, found.bytes_up_in_all) == (None, None)
    assert [(read.use, read.examples) for read in found.data] == [("training", SIZES[LACKING]), ("held-out", 3)]
    assert OWNER in found.base and "TakePiece" not in found.operations and "Train" in found.operations
    none = load_party(party_file(made.folder, LACKING, model_name_or_path="../none", limits={"max_package_bytes": 0}))
    with pytest.raises(FedllmError) as refused:
        consequences(made.job(), none)
    assert refused.value.code == "POLICY_REFUSED"


def test_a_site_that_waits_answers_nothing_else(made: TinyFederation) -> None:
    party = open_party(
        site_of(made, LACKING), made.job().model_dump(mode="json"), "0" * 32, Desk(Air().channel(LACKING, ["server"]))
    )
    assert isinstance(party, Waiting)
    with pytest.raises(FedllmError) as missing:
        party.host.ready([])
    assert missing.value.code == "MODEL_NOT_FOUND"
    party.close()
