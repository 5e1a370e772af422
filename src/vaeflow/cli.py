"""The `vaeflow` command: one short function a command, heavy imports inside."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from vaeflow import collector
from vaeflow.errors import VaeflowError
from vaeflow.serving.settings import Settings
from vaeflow.workspace import Workspace

# Nothing is sent anywhere, and TensorFlow's start-up notes stay quiet, unless the user says so.
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

app = typer.Typer(
    help="Variational autoencoders as a reproducible pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Images: add, check, look at them.", no_args_is_help=True)
app.add_typer(data_app, name="data", rich_help_panel="Images")

STAGES = "Stages (run by DVC; see dvc.yaml)"
FLOWS = "Retraining"
REGISTRY = "Registry"
INFERENCE = "Inference"

SERVING = {"fastapi", "uvicorn", "prometheus_client", "starlette"}

Model = Annotated[
    str, typer.Option(help="A bundle's folder, models:/NAME@ALIAS or models:/NAME/VERSION.")
]
Sources = Annotated[
    list[str],
    typer.Argument(
        help="Images: .npy, .npz or IDX arrays, image files, folders of them, or a known set."
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(help="Bring other sizes and colours to the model's: crop, fit or exact."),
]
Key = Annotated[str | None, typer.Option(help="Which array of an .npz.")]
Out = Annotated[Path, typer.Option(help="The file to write; its ending decides the format.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")]


def main() -> None:
    """Run the command line. What a user can mend is one paragraph and exit status 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # A file's name may be no text: better shown escaped than an error after the work is done.
    sys.stdout.reconfigure(errors="backslashreplace")
    # By default these end a process on the spot: MLflow runs would stay open for ever, and
    # Prefect's temporary server and a stage's processes would go on without us.
    for name in {"SIGTERM", "SIGHUP"} & set(signal.Signals.__members__):
        if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(signal.Signals[name], lambda number, _: sys.exit(128 + number))
    try:
        with collector.seldom():
            app()
    except VaeflowError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "vaeflow").startswith("vaeflow"):
            raise
        extra = "serve" if error.name in SERVING else "pipeline"
        _refuse(f"this needs the package {error.name}: pip install 'vaeflow[{extra}]'")


def _refuse(message: str) -> NoReturn:
    print(f"vaeflow: {message}", file=sys.stderr)
    sys.exit(2)


@data_app.command("add")
def data_add(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images, an image, an .npy, .npz or IDX array, or a known set: "
            "digits, mnist, fashion-mnist, kmnist."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Of the part of data/ it becomes.")] = None,
    append: Annotated[bool, typer.Option("--append", help="Keep what is in data/.")] = False,
    labels: Annotated[
        str, typer.Option(help="folders: an image's first subfolder is its label; files: as found.")
    ] = "files",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT to resize to.")] = None,
    resize: Annotated[
        str, typer.Option(help="crop: fill and cut; fit: whole, on black; exact: stretch.")
    ] = "crop",
    channels: Annotated[int | None, typer.Option(help="1 (grey) or 3 (colour).")] = None,
    key: Key = None,
    copies: Annotated[
        Path | None, typer.Option("--from", help="Where the files of a known set lie already.")
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take them even if they are not the published.")
    ] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave out exact copies.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without bad files; list them.")
    ] = False,
) -> None:
    """Make data/ of images, or add them to it, and version it with DVC."""
    workspace, parameters = _workspace()
    from vaeflow.data.add import Addition, add
    from vaeflow.data.conversion import Conversion, parse_size

    added = add(
        workspace,
        parameters.prepare,
        Addition(
            source=source,
            name=name,
            conversion=Conversion(parse_size(size) if size else None, resize, channels),
            key=key,
            labels=labels,
            copies=copies,
            verify=not unverified,
            append=append,
            drop_duplicates=drop_duplicates,
            skip_bad=skip_bad,
        ),
    )
    print("\n".join(added.lines()))


@data_app.command("check")
def data_check() -> None:
    """Report on the images in data/; exit status 1 when something is wrong with them."""
    workspace, parameters = _workspace()
    from vaeflow.data.survey import check

    report, wrong = check(workspace, parameters.prepare)
    print("\n".join(report.lines()))
    for fault in wrong:
        print(f"wrong: {fault}", file=sys.stderr)
    raise typer.Exit(1 if wrong else 0)


@data_app.command("show")
def data_show(
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write; by default outputs/data.png.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each split.")] = 64,
    seed: Seed = 0,
) -> None:
    """Draw random images of each split, and print statistics of their pixels."""
    workspace, parameters = _workspace()
    from vaeflow.data.show import show

    out = out or workspace.root / "outputs" / "data.png"
    for line in show(workspace, parameters.prepare, out, count, seed):
        print(line)
    print(out)


@app.command(rich_help_panel=STAGES)
def prepare() -> None:
    """Check the images in data/ and split them."""
    workspace, parameters = _workspace()
    from vaeflow.data.prepare import prepare

    images, duplicates = prepare(workspace, parameters.prepare)
    print("prepared " + ", ".join(f"{count} {split}" for split, count in images.items()))
    if duplicates:
        print(f"{duplicates} are exact copies of other images; copies share a split")


@app.command(rich_help_panel=STAGES)
def train() -> None:
    """Train the VAE, tracked in MLflow."""
    workspace, parameters = _workspace()
    from vaeflow.training.train import train

    train(workspace, parameters)


@app.command(rich_help_panel=STAGES)
def evaluate() -> None:
    """Compute bounds and figures on the test split."""
    workspace, parameters = _workspace()
    from vaeflow.evaluation.evaluate import evaluate

    metrics = evaluate(workspace, parameters.evaluate)
    print("\n".join(f"{name}: {value:.6g}" for name, value in metrics.items()))


@app.command(rich_help_panel=STAGES)
def export() -> None:
    """Write the serving bundle, compared with the Keras model."""
    workspace, parameters = _workspace()
    from vaeflow.bundle.export import export

    manifest = export(workspace, parameters.export)
    worst = max(manifest.export_differences.values())
    print(f"{workspace.bundle}: {len(manifest.files)} files, largest difference {worst:.2g}")


@app.command(rich_help_panel=FLOWS)
def retrain(
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, for this run alone; may be repeated."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the registered model, instead of export.name.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run every stage even if nothing changed.")
    ] = False,
    push: Annotated[
        bool, typer.Option("--push", help="Send data and outputs to the DVC remote at the end.")
    ] = False,
    busy: Annotated[
        Literal["wait", "cancel"], typer.Option(help="What to do while another flow works here.")
    ] = "wait",
) -> None:
    """Bring every stage up to date, register the bundle, and promote it if it is better."""
    from prefect.exceptions import CancelledRun
    from prefect.flows import load_flow_from_entrypoint

    from vaeflow.overrides import parse
    from vaeflow.pipeline import check_parameters

    workspace = Workspace.find()
    overrides = parse(settings or [])
    # The flow checks them too; here it takes no server to find a typing mistake.
    check_parameters(workspace)
    # The flow is the workspace's own, for its users to change.
    path = workspace.root / "pipelines" / "retrain.py"
    workspace.require(path, "Restore it: git checkout pipelines")
    run = load_flow_from_entrypoint(f"{path}:retrain")
    try:
        run(str(workspace.root), name, overrides, force, push, busy)
    except CancelledRun as cancelled:
        raise VaeflowError(str(cancelled)) from None


@app.command(rich_help_panel=FLOWS)
def schedule(
    cron: Annotated[str, typer.Option(help='When to retrain, in UTC, e.g. "0 3 * * *".')],
) -> None:
    """Retrain on a schedule, until stopped."""
    from vaeflow.scheduling import serve

    serve(Workspace.find(), cron)


@app.command(rich_help_panel=REGISTRY)
def models(
    name: Annotated[str | None, typer.Argument(help="Of one model; by default all.")] = None,
) -> None:
    """List registered versions: aliases, bound, data, commit, age and the gate's verdict."""
    from vaeflow.registry.listing import table

    print("\n".join(table(name)))


@app.command(rich_help_panel=REGISTRY)
def lineage(
    source: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle's folder.")
    ],
) -> None:
    """Walk from a model to its run, parameters, data and commit; say whether each still exists."""
    from vaeflow.registry.tracing import trace

    for link in trace(source):
        print(f"{link.what:<11} {link.which}\n{'':<11} {link.state}")


@app.command(rich_help_panel=REGISTRY)
def pull(
    uri: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    folder: Annotated[Path, typer.Argument(help="Becomes the bundle; an earlier one is replaced.")],
    offline_ok: Annotated[
        bool,
        typer.Option("--offline-ok", help="Without the registry, take what was pulled last."),
    ] = False,
) -> None:
    """Fetch a registered bundle, verified, into a folder."""
    from vaeflow.registry.pull import pull_to

    pulled = pull_to(uri, folder, offline_ok)
    print(f"{folder}: version {pulled.version}")


@app.command(rich_help_panel=REGISTRY)
def promote(
    uri: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@challenger.")],
    reason: Annotated[str, typer.Option(help="Kept with the version.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Even if it is no better than the champion.")
    ] = False,
) -> None:
    """Make a registered version the champion, if it passes the gate."""
    from vaeflow.registry.promotion import promote

    if force and not reason.strip():
        raise VaeflowError("--force needs a --reason, which is kept with the version.")
    print(promote(Workspace.find(), uri, force, reason))


@app.command(rich_help_panel=REGISTRY)
def rollback(
    name: Annotated[str, typer.Argument(help="Of the model.")],
    reason: Annotated[str, typer.Option(help="Kept with the version that was champion.")] = "",
) -> None:
    """Make the champion before the present one champion again."""
    from vaeflow.registry.promotion import rollback

    print(rollback(name, reason))


@app.command(rich_help_panel=INFERENCE)
def sample(
    model: Model,
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    seed: Seed = 0,
) -> None:
    """Draw new images from the model (.png or .npy)."""
    from vaeflow.results import write_images

    images = _load(model).sample(count, seed)
    write_images(out, images)
    print(f"{out}: {count} images")


@app.command(rich_help_panel=INFERENCE)
def reconstruct(
    images: Sources, model: Model, out: Out, resize: Resize = None, key: Key = None
) -> None:
    """Encode images and decode them again (.png: originals above; .npy: the result alone)."""
    from vaeflow.results import write_images

    loaded, read = _load_and_read(model, images, resize, key)
    write_images(out, loaded.reconstruct(read.pixels), originals=read.pixels)
    print(f"{out}: {len(read.names)} images")


@app.command(rich_help_panel=INFERENCE)
def encode(images: Sources, model: Model, out: Out, resize: Resize = None, key: Key = None) -> None:
    """Embed images: posterior means (.npy), or means and log variances (.csv, .parquet)."""
    from vaeflow.results import write_embeddings

    loaded, read = _load_and_read(model, images, resize, key)
    write_embeddings(out, read.names, *loaded.encode(read.pixels))
    print(f"{out}: {len(read.names)} images")


@app.command(rich_help_panel=INFERENCE)
def score(
    images: Sources,
    model: Model,
    out: Out,
    latents: Annotated[
        bool, typer.Option("--latents", help="The posterior means too; drift needs them.")
    ] = False,
    resize: Resize = None,
    key: Key = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without what cannot be used.")
    ] = False,
) -> None:
    """Score images: minus the ELBO in nats, larger is stranger (.parquet, .csv, .npy).

    Any number of them; a run that was killed goes on where it was when it is started again.
    """
    from vaeflow.scoring.score import Batch, score

    batch = Batch(tuple(images), model, out, latents, resize, key, skip_bad)
    print("\n".join(score(batch).lines()))


@app.command(rich_help_panel=INFERENCE)
def drift(
    scores: Annotated[Path, typer.Argument(help="Of a batch: from score --latents, .parquet.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="The .json to write; a .png comes beside it.")],
) -> None:
    """Compare a scored batch with the validation images; exit status 1 when it differs.

    Prefect is told where PREFECT_API_URL names a server.
    """
    _, parameters = _workspace()
    from vaeflow.scoring.drift import measure_drift, summary
    from vaeflow.scoring.events import DRIFT_DETECTED, emit_drift

    report = measure_drift(scores, model, out, parameters.drift)
    print("\n".join(summary(report)))
    if report["drifted"]:
        told = emit_drift(report)
        print(f"event {DRIFT_DETECTED}: " + ("sent" if told else "no server in PREFECT_API_URL"))
        raise typer.Exit(1)


@app.command(rich_help_panel=INFERENCE)
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="0.0.0.0 answers other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that share the port.")
    ] = Settings.workers,
    follow: Annotated[
        str, typer.Option(help="How often to look for a new version, such as 30s or 5m; 0: never.")
    ] = "0",
    token: Annotated[
        str,
        typer.Option(envvar="VAEFLOW_TOKEN", help="Ask for it in Authorization: Bearer TOKEN."),
    ] = "",
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
) -> None:
    """Answer over HTTP, until stopped; /docs shows how."""
    from vaeflow.serving.settings import parse_seconds
    from vaeflow.serving.workers import run

    settings = Settings(
        model=model,
        workers=workers,
        follow=parse_seconds(follow),
        token=token,
        batch=batch,
        wait=wait / 1000,
        queue=queue,
        rows=min(Settings.rows, queue),
        deadline=deadline,
        body=body << 20,
    )
    run(settings, host, port)


def _workspace():
    from vaeflow.config import load_parameters

    workspace = Workspace.find()
    return workspace, load_parameters(workspace.parameters)


def _load(model: str):
    import vaeflow

    return vaeflow.load(model)


def _load_and_read(model: str, sources: list[str], resize: str | None, key: str | None):
    from vaeflow.scoring.images import read, reading_for

    loaded = _load(model)
    return loaded, read(sources, reading_for(loaded.image_shape, resize, key))
