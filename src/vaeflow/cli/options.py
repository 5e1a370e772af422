"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaeflow.common.workspace import Workspace
from vaeflow.errors import DataError

if TYPE_CHECKING:
    from vaeflow.config.schema import Parameters
    from vaeflow.data.io.tiles import Tiling

Model = Annotated[
    str, typer.Option(help="A bundle's folder, models:/NAME@ALIAS or models:/NAME/VERSION.")
]
Sources = Annotated[
    list[str],
    typer.Argument(
        help="Images: files, folders, arrays, archives, tables, a .txt with a path a line (-: on "
        "standard input), URLs of these (s3://, gs://, https://, ...), or a known set."
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
Tile = Annotated[
    int | None,
    typer.Option(help="Cut large pictures into tiles of so many pixels by as many."),
]
Stride = Annotated[
    int | None,
    typer.Option(help="Pixels from one tile to the next; by default they stand side by side."),
]
Address = Annotated[
    str | None,
    typer.Option(help="Of a Ray cluster: HOST:PORT, ray://HOST:PORT or auto; else one is made."),
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
HostNames = Annotated[
    str | None,
    typer.Option(
        "--hosts",
        envvar="VAEFLOW_HOSTS",
        help="Work with other processes (on JAX): HOST:PORT,HOST,... of all; the first leads.",
    ),
]
Process = Annotated[
    int | None,
    typer.Option("--process", envvar="VAEFLOW_PROCESS", help="Which of --hosts this is, from 0."),
]
HostsTimeout = Annotated[
    float,
    typer.Option(
        min=1,
        envvar="VAEFLOW_HOSTS_TIMEOUT",
        help="Seconds until a process is given up that does not join, or shows no sign of life.",
    ),
]


def tiling_of(tile: int | None, stride: int | None) -> Tiling | None:
    """Return how pictures are to be cut.

    Raises:
        DataError: in no way that there is.
    """
    from vaeflow.data.io.tiles import Tiling

    if tile is None:
        if stride is not None:
            raise DataError("--stride is for tiles: say --tile, too.")
        return None
    return Tiling.of(tile, stride)


def find_workspace() -> tuple[Workspace, Parameters]:
    """Return the workspace that the command is run in, and its parameters."""
    from vaeflow.config.schema import load_parameters

    workspace = Workspace.find()
    return workspace, load_parameters(workspace.parameters)
