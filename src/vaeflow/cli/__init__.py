"""The `vaeflow` command: one short function a command, heavy imports inside."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from vaeflow.cli import data, inference, project, registry, retraining, stages, tuning
from vaeflow.common import processes
from vaeflow.common.code import package_version
from vaeflow.common.files import cache_error_message
from vaeflow.errors import VaeflowError

# Nothing is sent anywhere, and libraries tell only what is wrong, unless the user says otherwise.
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

SERVING = {"fastapi", "uvicorn", "uvloop", "prometheus_client", "starlette"}
GRPC = {"grpc", "grpc_health", "google"}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (project, stages, retraining, tuning, registry, inference):
    app.add_typer(group.commands)
app.add_typer(data.commands, name="data", rich_help_panel="Images")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vaeflow {package_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Variational autoencoders as a reproducible pipeline."""


def main() -> None:
    """Run the command line. What a user can mend is one paragraph and exit status 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # A file's name may be no text: better shown escaped than an error after the work is done.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # By default these end a process on the spot: MLflow runs would stay open for ever, and
    # Prefect's temporary server and a stage's processes would go on without us.
    for name in {"SIGTERM", "SIGHUP"} & set(signal.Signals.__members__):
        if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(signal.Signals[name], lambda number, _: sys.exit(128 + number))
    try:
        with processes.rare_garbage_collection():
            app()
    except VaeflowError as error:
        _refuse(str(error))
    except OSError as error:
        if not (message := cache_error_message(error)):
            raise
        _refuse(message)
    except ModuleNotFoundError as error:
        if (error.name or "vaeflow").startswith("vaeflow"):
            raise
        extra = "serve" if error.name in SERVING else "pipeline"
        extra = "serve,grpc" if error.name in GRPC else extra
        extra = "ray" if error.name == "ray" else extra
        _refuse(f"this needs the package {error.name}: pip install 'vaeflow[{extra}]'")


def _refuse(message: str) -> NoReturn:
    print(f"vaeflow: {message}", file=sys.stderr)
    sys.exit(2)
