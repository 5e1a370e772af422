"""The command that makes projects."""

from __future__ import annotations

import shlex
import shutil
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vaeflow.errors import WorkspaceError

commands = typer.Typer()
SAMPLE = "digits"


@commands.command("init")
def init(
    name: Annotated[
        Path | None,
        typer.Argument(help="The folder to make; it names the model. A dot is this one."),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Your images, as `vaeflow data add` takes them.")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Or 1,797 handwritten digits of 8x8 pixels.")
    ] = False,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT to bring the images to.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without bad images; list them.")
    ] = False,
    package: Annotated[
        str | None,
        typer.Option(
            help="Where the project gets vaeflow: the file of a wheel, vaeflow==VERSION, or "
            "vaeflow @ git+https://HOST/REPOSITORY@TAG. By default as it was installed here."
        ),
    ] = None,
    update: Annotated[
        bool,
        typer.Option("--update", help="Bring this project's files to this version's template."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --update: show what would change, as a patch.")
    ] = False,
) -> None:
    """Make a project of your own: pipeline, parameters, flows, tests, and a first commit."""
    from vaeflow.project.template import find_origin

    if update:
        if name or images or sample or size or skip_bad:
            raise WorkspaceError("--update takes no folder and no images: run it in the project.")
        _update(package, dry_run)
        return
    if name is None:
        raise WorkspaceError("say which folder: vaeflow init NAME, or . for this one.")
    if images and sample:
        raise WorkspaceError("either --images or --sample.")
    if (size or skip_bad) and not images:
        raise WorkspaceError("--size and --skip-bad are for --images SOURCE.")
    if dry_run:
        raise WorkspaceError("--dry-run is for --update.")
    from vaeflow.project.start import make_project

    folder = name.resolve()
    source = SAMPLE if sample else images
    if source:
        _require_pipeline()
        if Path(source).exists():
            source = str(Path(source).absolute())

    def add() -> None:
        from vaeflow.cli.data import data_add

        with chdir(folder):
            data_add(str(source), size=size, skip_bad=skip_bad)

    made = make_project(folder, find_origin(package), add if source else None)
    print(f"made {made.folder}: {made.files} files, commit {made.commit}")
    if made.without_ci:
        print("no files for GitHub or GitLab: they read them at the root of a repository only")
    if not shutil.which("make"):
        print("there is no make here: apt install make")
    steps = [] if folder == Path.cwd() else [f"cd {shlex.quote(str(name))}"]
    steps += ["make repro"] if source else ["vaeflow data add FOLDER", "make repro"]
    print(f"next: {' && '.join(steps)}")


def _require_pipeline() -> None:
    """Refuse before anything is written."""
    if not find_spec("dvc"):
        raise WorkspaceError(
            "adding images needs more packages: pip install 'vaeflow[pipeline]'; or make the "
            "project without images, and add them there: make setup."
        )


def _update(package: str | None, dry_run: bool) -> None:
    from vaeflow.project.template import find_origin
    from vaeflow.project.update import find_update

    found = find_update(find_origin(package))
    for change in found.changes:
        print("\n".join(change.diff()) if dry_run else change.line())
    if dry_run:
        return
    found.apply()
    if not found.changes:
        print(f"nothing to do: these are the files of vaeflow {found.after.version}")
    else:
        print(
            f"from vaeflow {found.before.version} to {found.after.version}. See: git diff; keep: "
            "git add --all && git commit; take back: git stash --include-untracked"
        )
