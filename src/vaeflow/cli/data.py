"""Commands on images: add, check, look at them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vaeflow.cli.options import (
    Address,
    Key,
    Layout,
    MaxPixels,
    Pages,
    Seed,
    Stride,
    Tile,
    ValueRange,
    find_workspace,
    tiling_of,
)

commands = typer.Typer(help="Images: add, check, look at them.", no_args_is_help=True)


@commands.command("add")
def data_add(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, an image, an array (.npy, .npz, IDX, HDF5, .mat, CIFAR), an archive "
            "(.zip, .tar), a table (.parquet, .csv), a .txt with a path a line (-: on standard "
            "input), a URL of one of these (s3://, gs://, https://, ...), or a known set: digits, "
            "mnist, fashion-mnist, kmnist."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name of the part of data/ it becomes.")] = None,
    append: Annotated[bool, typer.Option("--append", help="Keep what is in data/.")] = False,
    labels: Annotated[
        str, typer.Option(help="folders: an image's first subfolder is its label; files: as found.")
    ] = "files",
    label_key: Annotated[
        str | None, typer.Option(help="Which array or column has the labels.")
    ] = None,
    splits: Annotated[
        str,
        typer.Option(
            help="published: known sets keep their test images; folders: train/, val/, test/; "
            "content: neither."
        ),
    ] = "published",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT to resize to.")] = None,
    resize: Annotated[
        str, typer.Option(help="crop: fill and cut; fit: whole, on black; exact: stretch.")
    ] = "crop",
    channels: Annotated[
        int | None, typer.Option(help="1 (grey), 3 (colour), or 4 as they are.")
    ] = None,
    background: Annotated[
        str, typer.Option(help="What transparent pixels show: black, white, #808080, ...")
    ] = "black",
    key: Key = None,
    layout: Layout = None,
    value_range: ValueRange = None,
    pixels: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH[xCHANNELS] of images that are rows of numbers.")
    ] = None,
    pages: Pages = "all",
    tile: Tile = None,
    stride: Stride = None,
    max_pixels: MaxPixels = None,
    copies: Annotated[
        Path | None, typer.Option("--from", help="Where the files of a known set lie already.")
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take copies that differ from the published.")
    ] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave out exact copies.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without bad files; list them.")
    ] = False,
    anomalies: Annotated[
        bool,
        typer.Option(
            "--anomalies",
            help="Known to be bad: kept apart, never trained on, to try what is noticed.",
        ),
    ] = False,
    engine: Annotated[
        str,
        typer.Option(help="What decodes images: local, all cores here; or ray, a cluster."),
    ] = "local",
    address: Address = None,
) -> None:
    """Make data/ of images, or add them to it, and version it with DVC."""
    workspace, parameters = find_workspace()
    from vaeflow.data.add import Addition, add
    from vaeflow.data.io.conversion import Conversion, parse_pixels, parse_size
    from vaeflow.data.io.rules import parse_background, parse_layout, parse_range

    given = parse_range(value_range) if value_range else None
    conversion = Conversion(
        parse_size(size) if size else None,
        resize,
        channels,
        parse_background(background),
        given,
        given,
        given,
    )
    added = add(
        workspace,
        parameters.prepare,
        Addition(
            source=source,
            name=name,
            conversion=conversion,
            key=key,
            label_key=label_key,
            layout=parse_layout(layout) if layout else None,
            row_shape=parse_pixels(pixels) if pixels else None,
            pages=pages or "all",
            tiling=tiling_of(tile, stride),
            labels=labels,
            splits=splits,
            max_pixels=max_pixels,
            copies=copies,
            verify=not unverified,
            append=append,
            drop_duplicates=drop_duplicates,
            skip_bad=skip_bad,
            anomalies=anomalies,
            engine=engine,
            address=address,
        ),
    )
    print("\n".join(added.lines()))


@commands.command("check")
def data_check() -> None:
    """Report on the images in data/; exit status 1 when something is wrong with them."""
    workspace, parameters = find_workspace()
    from vaeflow.data.survey import check

    report, wrong = check(workspace, parameters.prepare)
    print("\n".join(report.lines()))
    for fault in wrong:
        print(f"wrong: {fault}", file=sys.stderr)
    raise typer.Exit(1 if wrong else 0)


@commands.command("show")
def data_show(
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write; by default outputs/data.png.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each split.")] = 64,
    seed: Seed = 0,
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="Pairs of those, side by side.")
    ] = False,
) -> None:
    """Draw random images of each split, and print statistics of their pixels."""
    workspace, parameters = find_workspace()
    from vaeflow.data.survey import show, show_near_duplicates

    out = out or workspace.root / "outputs" / "data.png"
    if near_duplicates:
        lines = show_near_duplicates(workspace, parameters.prepare, out, count)
    else:
        lines = show(workspace, parameters.prepare, out, count, seed)
    for line in lines:
        print(line)
    print(out)
