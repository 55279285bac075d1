"""`fedllm verify RUN`: what is printed, and the exit codes."""

from pathlib import Path

from tiny import TinyFederation, tiny_federation
from verbs import Call, data_of

from fedllm.errors import ExitCode


def test_a_run_is_verified_and_an_altered_one_named(call: Call, tmp_path: Path, base: Path) -> None:
    federation: TinyFederation = tiny_federation(tmp_path, base, job={"federation.num_rounds": 1})
    run = federation.run().path
    code, out, err = call("verify", run)
    assert (code, err) == (0, "") and "ok       card" in out and "ALTERED" not in out
    seal = out.split("seal     ")[1].strip()
    assert call("verify", run, "--seal", seal)[0] == 0
    code, out, _ = call("verify", run, "--json")
    assert code == 0 and data_of(out)["error"] is None and data_of(out)["seal"] == seal
    (run / "adapter" / "README.md").write_text("# Better than it is")
    code, out, err = call("verify", run)
    assert code == ExitCode.STATE_LOST
    assert "ALTERED  card" in out and "adapter/README.md: " in out
    assert "RUN_ALTERED" in err and "fix: " in err
    code, out, _ = call("verify", run, "--json")
    assert code == 8 and data_of(out)["error"]["code"] == "RUN_ALTERED"
    assert call("verify", tmp_path)[0] == ExitCode.USAGE
