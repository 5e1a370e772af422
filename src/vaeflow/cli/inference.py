"""Commands that use a model, and the server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaeflow.cli.options import (
    Address,
    Key,
    Layout,
    MaxPixels,
    Model,
    Out,
    Pages,
    Rate,
    Resize,
    Seed,
    Sources,
    Stride,
    Tile,
    ValueRange,
    find_workspace,
    tiling_of,
)
from vaeflow.errors import BadImageError, DataError
from vaeflow.serving.settings import Settings

if TYPE_CHECKING:
    from vaeflow.bundle.runtime import Bundle
    from vaeflow.data.io.reading import Images
    from vaeflow.scoring.images import Asked

commands = typer.Typer()
PANEL = "Inference"


@commands.command(rich_help_panel=PANEL)
def sample(
    model: Model,
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    seed: Seed = 0,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Draw the pixels, too, instead of showing their means.")
    ] = False,
) -> None:
    """Draw new images from the model (.png or .npy)."""
    from vaeflow.scoring.outputs import write_images

    images = _load(model).sample(count, seed, pixels)
    write_images(out, images)
    print(f"{out}: {count} images")


@commands.command(rich_help_panel=PANEL)
def reconstruct(
    images: Sources,
    model: Model,
    out: Out,
    resize: Resize = None,
    key: Key = None,
    layout: Layout = None,
    value_range: ValueRange = None,
    pages: Pages = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Encode images and decode them again (.png: originals above; .npy: the result alone)."""
    from vaeflow.scoring.images import Asked
    from vaeflow.scoring.outputs import write_images

    asked = Asked(resize, key, layout, value_range, pages, max_pixels)
    loaded, read = _load_and_read(model, images, asked)
    write_images(out, loaded.reconstruct(read.pixels), originals=read.pixels)
    print(f"{out}: {len(read.names)} images")


@commands.command(rich_help_panel=PANEL)
def encode(
    images: Sources,
    model: Model,
    out: Out,
    resize: Resize = None,
    key: Key = None,
    layout: Layout = None,
    value_range: ValueRange = None,
    pages: Pages = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Embed images: posterior means (.npy), or means and log variances (.csv, .parquet)."""
    from vaeflow.scoring.images import Asked
    from vaeflow.scoring.outputs import write_embeddings

    asked = Asked(resize, key, layout, value_range, pages, max_pixels)
    loaded, read = _load_and_read(model, images, asked)
    write_embeddings(out, read.names, *loaded.encode(read.pixels))
    print(f"{out}: {len(read.names)} images")


@commands.command(rich_help_panel=PANEL)
def score(
    images: Sources,
    model: Model,
    out: Out,
    latents: Annotated[
        bool, typer.Option("--latents", help="The posterior means too; drift needs them.")
    ] = False,
    false_alarm_rate: Rate = None,
    a_day: Annotated[
        int | None,
        typer.Option("--a-day", min=1, help="Images that come a day: how many false alarms?"),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures of what is anomalous, with red where it is so."),
    ] = None,
    resize: Resize = None,
    key: Key = None,
    layout: Layout = None,
    value_range: ValueRange = None,
    pages: Pages = None,
    tile: Tile = None,
    stride: Stride = None,
    max_pixels: MaxPixels = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without what cannot be used.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="What computes: local, all cores here; or ray, a cluster.")
    ] = "local",
    address: Address = None,
) -> None:
    """Score images, and say which are anomalous (.parquet, .csv; .npy has the scores alone).

    Any number of them; a run that was killed goes on where it was when it is started again.
    """
    from vaeflow.scoring.images import Asked
    from vaeflow.scoring.score import Batch, score

    tiling = tiling_of(tile, stride)
    asked = Asked(resize, key, layout, value_range, pages, max_pixels, tiling)
    batch = Batch(
        tuple(images),
        model,
        out,
        latents=latents,
        false_alarm_rate=false_alarm_rate,
        a_day=a_day,
        maps=maps,
        asked=asked,
        skip_bad=skip_bad,
        engine=engine,
        address=address,
    )
    try:
        print("\n".join(score(batch).lines()))
    except BadImageError as error:
        raise DataError(f"{error} To score the rest, and have these listed: --skip-bad.") from None


@commands.command(rich_help_panel=PANEL)
def report(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A bundle's folder, models:/NAME@ALIAS or models:/NAME/VERSION; by default "
            "outputs/bundle, with all that the stages wrote about it."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; by default outputs/report.")
    ] = None,
) -> None:
    """Write a page on a model, to look at: index.html, which opens from disk, without network."""
    from vaeflow.report.page import write_report

    workspace = None
    if model is None:
        workspace, _ = find_workspace()
        workspace.require(workspace.bundle / "manifest.json", "Make it: dvc repro")
        model, out = str(workspace.bundle), out or workspace.report
    if out is None:
        raise DataError("say where to: --out FOLDER")
    page, here = write_report(out, _load(model), workspace), Path.cwd()
    print(page.relative_to(here) if page.is_relative_to(here) else page)


@commands.command(rich_help_panel=PANEL)
def drift(
    scores: Annotated[
        Path, typer.Argument(help="Table of a batch: .parquet, from score --latents.")
    ],
    model: Model,
    out: Annotated[Path, typer.Option(help="The .json to write; a .png comes beside it.")],
) -> None:
    """Compare a scored batch with the validation images; exit status 1 when it differs.

    Prefect is told where PREFECT_API_URL names a server.
    """
    _, parameters = find_workspace()
    from vaeflow.scoring.drift import DRIFT_DETECTED, emit_drift, measure_drift, summary

    report = measure_drift(scores, model, out, parameters.drift)
    print("\n".join(summary(report)))
    if report["drifted"]:
        told = emit_drift(report)
        print(f"event {DRIFT_DETECTED}: " + ("sent" if told else "no server in PREFECT_API_URL"))
        raise typer.Exit(1)


@commands.command(rich_help_panel=PANEL)
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="0.0.0.0 answers other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Answer over gRPC there, too. 0: any free one."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that share the port.")
    ] = Settings.workers,
    follow: Annotated[
        str, typer.Option(help="How often to look for a new version, such as 30s or 5m; 0: never.")
    ] = "0",
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Ask for the token in this file in Authorization: Bearer TOKEN. The environment's "
            "VAEFLOW_TOKEN does the same."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that clients may give for this server, or *. Repeat for several. By "
            "default any, and on a loopback address that address and localhost."
        ),
    ] = None,
    connections: Annotated[
        int, typer.Option(min=1, help="Connections that may be open at once.")
    ] = Settings.connections,
    connections_of_address: Annotated[
        int, typer.Option(min=0, help="Of one address; 0 behind a proxy: any.")
    ] = Settings.connections_of_address,
    batch: Annotated[
        int, typer.Option(min=1, help="Images run together at most.")
    ] = Settings.batch,
    wait: Annotated[float, typer.Option(min=0, help="Milliseconds to wait for others.")] = (
        1000 * Settings.wait
    ),
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait.")] = Settings.queue,
    deadline: Annotated[
        float, typer.Option(min=0.001, help="Seconds to answer within.")
    ] = Settings.deadline,
    body: Annotated[int, typer.Option(min=1, help="MiB that a request may hold.")] = (
        Settings.body >> 20
    ),
    false_alarm_rate: Rate = None,
) -> None:
    """Answer over HTTP, until stopped; /docs shows how."""
    from vaeflow.serving.settings import hosts_of, parse_seconds, read_token
    from vaeflow.serving.workers import run

    settings = Settings(
        model=model,
        workers=workers,
        follow=parse_seconds(follow),
        token=read_token(token_file, os.environ.get("VAEFLOW_TOKEN")),
        grpc=grpc_port,
        hosts=hosts_of(host, allowed_host or []),
        connections=connections,
        connections_of_address=connections_of_address,
        batch=batch,
        wait=wait / 1000,
        queue=queue,
        rows=min(Settings.rows, queue),
        deadline=deadline,
        body=body << 20,
        false_alarm_rate=false_alarm_rate,
    )
    run(settings, host, port)


def _load(model: str) -> Bundle:
    import vaeflow

    return vaeflow.load(model)


def _load_and_read(model: str, sources: list[str], asked: Asked) -> tuple[Bundle, Images]:
    from vaeflow.data.survey import left_alone
    from vaeflow.scoring.images import read, reading_for

    loaded = _load(model)
    ignored: list[str] = []
    image = loaded.manifest.image
    images = read(sources, reading_for(image, asked, on_other=ignored.append))
    print("\n".join(left_alone(ignored)), end="\n" if ignored else "")
    return loaded, images
