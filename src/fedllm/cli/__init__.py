"""The command line. One file per verb; what each imports at its top decides how fast `--help` is."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from types import FrameType

import typer

from fedllm.cli import (
    approve,
    audit,
    audit_log,
    compare,
    config,
    data,
    demo,
    doctor,
    emulator,
    evaluate,
    export,
    init,
    install,
    join,
    ownership,
    ownership_text,
    plan,
    provision,
    report,
    request,
    resume,
    run,
    schema,
    serve,
    status,
    submit,
    up,
    validate,
    verify,
)
from fedllm.cli.output import print_error
from fedllm.errors import ExitCode, FedllmError

app = typer.Typer(
    help="Organisations tune a large language model together; each keeps its data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("init")(init.init)
app.add_typer(data.app, name="data")
app.command("validate")(validate.validate)
app.command("plan")(plan.plan)
app.command("run")(run.run)
app.command("resume")(resume.resume)
app.command("compare")(compare.compare)
app.command("eval")(evaluate.evaluate)
app.command("audit")(audit.audit)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("verify")(verify.verify)
app.command("config")(config.config)
app.command("schema")(schema.schema)
app.add_typer(emulator.app, name="emulator")
app.command("request")(request.request)
app.command("provision")(provision.provision)
app.command("install")(install.install)
app.command("approve")(approve.approve)
app.add_typer(audit_log.app, name="audit-log")
ownership.app.command("ask")(ownership_text.ask)
ownership.app.command("fingerprint")(ownership_text.fingerprint)
ownership.app.command("trace")(ownership_text.trace)
app.add_typer(ownership.app, name="ownership")
app.command("up")(up.up)
app.command("serve")(serve.serve)
app.command("join")(join.join)
app.command("submit")(submit.submit)
app.command("status")(status.status)
app.command("logs")(status.logs)
app.command("pause")(status.pause)
app.command("stop")(status.stop)
app.command("doctor")(doctor.doctor)


class Stopped(BaseException):
    """SIGINT or SIGTERM, raised where the program stands so that it can write its verdict.

    Not a KeyboardInterrupt, which typer would turn into an exit without a word.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum)


def quiet_dependencies() -> None:
    """Switch off telemetry, progress bars and advice of the libraries below, unless the user has set them."""
    settings = {
        # Threads that wait for each other asleep: spinning, two threads on a busy machine are slower than one.
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    # PEFT asks transformers for properties under their old names; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def main() -> None:
    """Run the command line and exit with a documented code."""
    quiet_dependencies()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = app(standalone_mode=False)
    except FedllmError as error:
        print_error(error, as_json="--json" in sys.argv)
        code = int(error.exit_code)
    except typer.Abort:
        code = ExitCode.FAILED
    except Stopped as stopped:
        for note in getattr(stopped, "__notes__", []):
            sys.stderr.write(f"\n{note}\n")
        code = stopped.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = ExitCode.OK
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()
            code = ExitCode.USAGE
        else:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(int(code or 0))
