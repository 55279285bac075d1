"""What verbs say of offsite tuning: of a run that leaves no adapter for its base model, of a package that is sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from offsite import LACKING, OWNER, offsite_federation, party_file
from tiny import TinyFederation
from verbs import Call, data_of

from fedllm.models.package_files import list_files, total_bytes

Make = Callable[..., TinyFederation]


@pytest.mark.parametrize(("to_owner", "to_clients"), [("model", "service"), ("adapter", "nothing")])
def test_verbs_say_who_has_what_and_where(call: Call, make_federation: Make, to_owner: str, to_clients: str) -> None:
    changes = {"federation__deliver_to_clients": to_clients, "federation__deliver_to_owner": to_owner}
    made = offsite_federation(make_federation, **changes)
    run = made.folder / "run"
    place = f"parties/{OWNER}/{'model' if to_owner == 'model' else 'adapter'}"
    code, out, _ = call("run", made.job_file, "--output", run, "--quiet")
    assert code == 0
    assert f"{run}/{place}" in out and f"fedllm report {run}" in out and "each party has its own" not in out
    for words in (
        ["eval", run],
        ["export", run, "-o", made.folder / "out"],
        ["audit", run],
        ["compare", made.job_file],
    ):
        code, _, err = call(*words)
        assert code == 2, words
        said = " ".join(err.split())
        assert "BAD_COMBINATION" in said and place in said.replace(" ", "") and f"{OWNER}, the owner, gets" in said
    (run / place).rename(run / "elsewhere")
    code, _, err = call("eval", run)
    assert "at the owner's site" in " ".join(err.split())


def test_the_plan_says_how_long_the_package_is(call: Call, make_federation: Make) -> None:
    made = offsite_federation(make_federation)
    (made.folder / "package" / "notes.txt").write_text("stays")
    code, out, _ = call("plan", made.job_file, "--json")
    size = total_bytes(list_files(made.folder / "package"))
    assert code == 0 and 0 < data_of(out)["package_bytes"] - size < 100
    code, out, _ = call("plan", made.job_file)
    assert "before round 0: once from its owner, and once to each party that lacks it" in out
    assert "goes once through the server to each party that lacks it, sealed" in out
    party_file(made.folder, LACKING)
    code, out, _ = call("plan", made.job_file, "--json", "--set", "federation.package=copied")
    assert code == 0 and data_of(out)["package_bytes"] == 0
