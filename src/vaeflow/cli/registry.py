"""Commands on registered models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vaeflow.common.workspace import Workspace
from vaeflow.errors import VaeflowError

commands = typer.Typer()
PANEL = "Registry"


@contextmanager
def awaiting(what: str) -> Iterator[None]:
    """Say on a terminal what takes a few seconds, and take it back."""
    there = sys.stderr.isatty()
    if there:
        print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if there:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@commands.command(rich_help_panel=PANEL)
def models(
    name: Annotated[str | None, typer.Argument(help="Name of one model; by default all.")] = None,
) -> None:
    """List registered versions: aliases, bound, data, commit, age and the gate's verdict."""
    with awaiting("reading the registry"):
        from vaeflow.registry.inspect import table

        lines = table(name)
    print("\n".join(lines))


@commands.command(rich_help_panel=PANEL)
def lineage(
    source: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle's folder.")
    ],
) -> None:
    """Walk from a model to its run, parameters, data and commit; say whether each still exists."""
    from vaeflow.registry.inspect import trace

    for link in trace(source):
        print(f"{link.what:<11} {link.which}\n{'':<11} {link.state}")


@commands.command(rich_help_panel=PANEL)
def pull(
    uri: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    folder: Annotated[Path, typer.Argument(help="Becomes the bundle; an earlier one is replaced.")],
    offline_ok: Annotated[
        bool,
        typer.Option("--offline-ok", help="Without the registry, take what was pulled last."),
    ] = False,
) -> None:
    """Fetch a registered bundle, verified, into a folder."""
    with awaiting(f"fetching {uri}"):
        from vaeflow.registry.pull import pull_to

        pulled = pull_to(uri, folder, offline_ok)
    print(f"{folder}: version {pulled.version}")


@commands.command(rich_help_panel=PANEL)
def promote(
    uri: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@challenger.")],
    reason: Annotated[str, typer.Option(help="Kept with the version.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Even if it is no better than the champion.")
    ] = False,
) -> None:
    """Make a registered version the champion, if it passes the gate."""
    if force and not reason.strip():
        raise VaeflowError("--force needs a --reason, which is kept with the version.")
    with awaiting(f"comparing {uri} with the champion, and asking it as a service would"):
        from vaeflow.registry.champion import promote

        outcome = promote(Workspace.find(), uri, force, reason)
    print(outcome)


@commands.command(rich_help_panel=PANEL)
def rollback(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    reason: Annotated[str, typer.Option(help="Kept with the version that was champion.")] = "",
) -> None:
    """Make the champion before the present one champion again."""
    with awaiting("reading the registry"):
        from vaeflow.registry.champion import rollback

        outcome = rollback(name, reason)
    print(outcome)
