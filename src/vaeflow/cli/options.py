"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaeflow.common.workspace import Workspace

if TYPE_CHECKING:
    from vaeflow.config.schema import Parameters

Model = Annotated[
    str, typer.Option(help="A bundle's folder, models:/NAME@ALIAS or models:/NAME/VERSION.")
]
Sources = Annotated[
    list[str],
    typer.Argument(
        help="Images: files, folders, arrays, archives, tables, a .txt with a path a line (-: on "
        "standard input), or a known set."
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(help="Bring other sizes and colours to the model's: crop, fit or exact."),
]
Key = Annotated[
    str | None, typer.Option(help="Which array of several in a file, or column of a table.")
]
Layout = Annotated[
    str | None, typer.Option(help="An array's axes: NHWC, NCHW, HWCN, NHW, HWN, CHW, HW, ...")
]
ValueRange = Annotated[
    str | None,
    typer.Option("--range", help="Which numbers are black and white: 0..1, 0..255, -1..1, ..."),
]
Pages = Annotated[
    str | None, typer.Option(help="Of a file with several (TIFF, GIF, WebP): all or first.")
]
MaxPixels = Annotated[
    int | None, typer.Option(min=1, help="Height x width of the largest image to decode.")
]
Out = Annotated[Path, typer.Option(help="The file to write; its ending decides the format.")]
Rate = Annotated[
    float | None,
    typer.Option(
        "--false-alarm-rate",
        help="Share of usual images that may count as anomalous; else the model's own.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")]


def find_workspace() -> tuple[Workspace, Parameters]:
    """Return the workspace that the command is run in, and its parameters."""
    from vaeflow.config.schema import load_parameters

    workspace = Workspace.find()
    return workspace, load_parameters(workspace.parameters)
