"""The command line. One file per verb; what each imports at its top decides how fast `--help` is."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

import typer

from fedllm.cli import (
    compare,
    config,
    data,
    demo,
    doctor,
    evaluate,
    export,
    init,
    plan,
    report,
    resume,
    run,
    schema,
    validate,
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
app.command("report")(report.report)
app.command("export")(export.export)
app.command("config")(config.config)
app.command("schema")(schema.schema)
app.command("doctor")(doctor.doctor)


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program stands so that it can write its verdict."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


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


def main() -> None:
    """Run the command line and exit with a documented code."""
    quiet_dependencies()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
    except FedllmError as error:
        print_error(error, as_json="--json" in sys.argv)
        code = int(error.exit_code)
    except typer.Abort:
        code = ExitCode.FAILED
    except KeyboardInterrupt as interrupt:
        for note in getattr(interrupt, "__notes__", []):
            sys.stderr.write(f"\n{note}\n")
        code = ExitCode.TERMINATED if isinstance(interrupt, Terminated) else ExitCode.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        code = ExitCode.OK
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()
            code = ExitCode.USAGE
        else:
            raise
    sys.exit(int(code or 0))
