"""The verbs request, provision and install as their users type them, each on what stands for its own machine."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
from verbs import Call, data_of

from fedllm.errors import ExitCode
from fedllm.identity import keys
from fedllm.identity.kit import open_kit

PROJECT = "name: trial\nserver: {host: fl.example.org}\nparties: [north, east]\n"


@pytest.fixture(autouse=True)
def short_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    # They are made in a tenth of the time; their strength is not what is tested here.
    monkeypatch.setattr(keys.new_key, "__kwdefaults__", {"bits": keys.MIN_KEY_BITS})


@pytest.fixture
def machines(tmp_path: Path) -> Path:
    for name in ("north", "east"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "party.yaml").write_text(f"name: {name}\ndata: {{train: train.jsonl}}\n")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/project.yaml").write_text(PROJECT)
    return tmp_path


def send(path: Path, folder: Path) -> Path:
    return Path(shutil.copy(path, folder))


def test_two_sites_are_let_in_one_after_the_other(call: Call, machines: Path) -> None:
    project = machines / "hub/project.yaml"
    north, east = machines / "north/party.yaml", machines / "east/party.yaml"

    code, out, _ = call("request", north)
    request = machines / "north/site-north/request.csr"
    assert code == 0 and str(request) in out and "send it to nobody" in out

    code, out, _ = call("provision", project, "--request", request)
    assert code == 0 and "waiting   for east" in out and "roster" not in out
    authority = out.split()[1].rstrip(",")
    kit = send(machines / "hub/coordinator/kits/north.zip", machines / "north")

    code, out, err = call("install", kit, north)
    assert code == ExitCode.IDENTITY and "AUTHORITY_UNCONFIRMED" in err and authority in err
    code, out, _ = call("install", kit, north, "--authority", authority)
    assert code == 0 and "fl.example.org, port 8002" in out
    assert sorted(open_kit(machines / "north/site-north").roster) == ["north", "server"]

    asked = data_of(call("request", east, "--json")[1])
    code, out, _ = call("provision", project, "--request", asked["request"])
    assert code == 0 and "waiting" not in out and asked["key"] in out
    assert "roster    changed" in out and "send north, east" in out

    kit = send(machines / "hub/coordinator/kits/north.zip", machines / "north")
    found = data_of(call("install", kit, north, "--json")[1])
    assert found["parties"] == ["east", "north"] and found["authority"] == authority

    done = data_of(call("provision", project, "--json")[1])
    assert not done["roster_changed"] and done["missing"] == []
    assert [kit["is_new"] for kit in done["kits"].values()] == [False, False]


def test_a_request_is_made_again_with_the_same_key(call: Call, machines: Path) -> None:
    party = machines / "north/party.yaml"
    first, second = (data_of(call("request", party, "--json")[1]) for _ in range(2))
    assert first == second


def test_a_kit_is_refused_with_code_and_mend(call: Call, machines: Path) -> None:
    call("request", machines / "north/party.yaml")
    call("request", machines / "east/party.yaml")
    requests = [
        word for name in ("north", "east") for word in ("--request", machines / f"{name}/site-{name}/request.csr")
    ]
    done = data_of(call("provision", machines / "hub/project.yaml", *requests, "--json")[1])
    east = done["kits"]["east"]["path"]
    code, out, _ = call("install", east, machines / "north/party.yaml", "--authority", done["authority"], "--json")
    assert code == ExitCode.IDENTITY and data_of(out)["code"] == "KIT_REFUSED" and data_of(out)["where"] == east
    code, _, err = call("install", east, machines / "east/party.yaml", "--authority", "sha256:1234")
    assert code == ExitCode.USAGE and "--authority" in err
    code, _, err = call("install", machines / "absent.zip", machines / "east/party.yaml")
    assert code == ExitCode.USAGE and "absent.zip" in err


class Terminal(io.StringIO):
    """A person at the keyboard."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "expected"), [("y\n", ExitCode.OK), ("n\n", ExitCode.FAILED)])
def test_a_person_may_confirm_the_authority(
    call: Call, machines: Path, monkeypatch: pytest.MonkeyPatch, answer: str, expected: ExitCode
) -> None:
    party = machines / "north/party.yaml"
    call("request", party)
    done = data_of(
        call(
            "provision", machines / "hub/project.yaml", "--request", party.parent / "site-north/request.csr", "--json"
        )[1]
    )
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    code, _, err = call("install", done["kits"]["north"]["path"], party)
    assert code == expected and done["authority"] in err
    assert (party.parent / "site-north/kit").exists() == (expected == ExitCode.OK)
