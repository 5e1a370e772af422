"""The files of a project as this version of the package makes them.

`template/` has them under their own names with `.jinja` at the end, lest DVC, git or pytest take
them for files of this repository; a name that begins with a dot begins with `dot-` there. `make
lock` makes the `.lock` files, which some of them include.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import zipfile
import zlib
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vaeflow.common.code import package_version
from vaeflow.common.files import atomic_file
from vaeflow.errors import WorkspaceError

# What a project keeps of how it was made: the answers, and the files as they were before anybody
# changed them, which an update compares with.
RECORD = Path(".vaeflow") / "project.json"
ORIGINALS = Path(".vaeflow") / "template.zip"
WHEELS = "wheels"
CI = (".github/workflows/main.yml", ".gitlab-ci.yml")
LARGEST = 16 << 20  # bytes of those, unpacked
DOT = re.compile("(?:(?<=/)|^)dot-")


class Answers(BaseModel):
    """What the files of a project depend on.

    Attributes:
        model: its name in the registry.
        version: of the package whose template it is.
        package: where the package comes from, as a line of `requirements.txt`.
        wheel: the file's name in `wheels/`, where it comes from a file.
        ci: whether there are files for GitHub and GitLab, which read them only at a repository's
            root.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    version: str
    package: str
    wheel: Annotated[str, Field(pattern=r"^vaeflow-[^/\\]+\.whl$")] | None
    ci: bool


class Origin(BaseModel):
    """Where the package comes from: a requirement, or the file of a wheel."""

    model_config = ConfigDict(frozen=True)

    requirement: str
    wheel: Path | None = None

    def put_wheel(self, project: Path) -> None:
        """Copy the wheel into a project, where there is one."""
        if self.wheel:
            with atomic_file(project / WHEELS / self.wheel.name) as fresh:
                shutil.copyfile(self.wheel, fresh)


def render(answers: Answers) -> dict[str, bytes]:
    """Make every file of a project: contents by path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vaeflow.project", "template"),
        # What Make, YAML and workflows do not use themselves.
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
        comment_start_string="[#",
        comment_end_string="#]",
        undefined=StrictUndefined,
        trim_blocks=True,  # a line of a block alone leaves no empty line
        keep_trailing_newline=True,
        autoescape=False,  # no page: files of text
    )
    values = answers.model_dump()
    files = {
        DOT.sub(".", name.removesuffix(".jinja")): environment.get_template(name)
        for name in environment.list_templates(extensions=["jinja"])
    }
    return {
        path: template.render(values).encode()
        for path, template in files.items()
        if answers.ci or path not in CI
    }


def find_origin(package: str | None) -> Origin:
    """Find out where this package was installed from.

    Args:
        package: instead, what the user says: the file of a wheel, or a requirement.

    Raises:
        WorkspaceError: the file is not there, or the requirement is none of this package.
    """
    if package is None:
        return _installed_from()
    if package.endswith(".whl"):
        return _of_wheel(Path(package))
    if not package.startswith("vaeflow"):
        raise WorkspaceError(
            f"--package {package}: expected the file of a wheel, vaeflow==VERSION, or "
            "vaeflow @ git+https://HOST/REPOSITORY@TAG."
        )
    return Origin(requirement=package)


def _installed_from() -> Origin:
    """Read what the installer noted (PEP 610); it notes nothing of what came from an index."""
    version = package_version()
    try:
        noted = metadata.distribution("vaeflow").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        noted = None
    if noted is None:
        return Origin(requirement=f"vaeflow=={version}")
    origin: dict[str, Any] = json.loads(noted)
    url = str(origin["url"])
    if about := origin.get("vcs_info"):
        return Origin(requirement=f"vaeflow @ {about['vcs']}+{url}@{about['commit_id']}")
    if url.startswith("file:") and url.endswith(".whl"):
        return _of_wheel(Path(unquote(urlsplit(url).path)))
    return Origin(requirement=f"vaeflow @ {url}")


def _of_wheel(path: Path) -> Origin:
    if not path.is_file():
        raise WorkspaceError(
            f"{path}, which vaeflow is installed from, is not there. Say where a project gets it: "
            "--package FILE.whl, or --package vaeflow==VERSION."
        )
    if not path.name.startswith("vaeflow-"):
        raise WorkspaceError(f"{path} is no wheel of vaeflow.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Origin(
        requirement=f"./{WHEELS}/{path.name} --hash=sha256:{digest}", wheel=path.absolute()
    )


def write_record(project: Path, answers: Answers, originals: dict[str, bytes]) -> None:
    """Note how a project was made."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in sorted(originals.items()):
            # The same bytes whenever it is made: git then sees a change only where there is one.
            archive.writestr(zipfile.ZipInfo(path), content, zipfile.ZIP_DEFLATED)
    with atomic_file(project / ORIGINALS) as fresh:
        fresh.write_bytes(packed.getvalue())
    with atomic_file(project / RECORD) as fresh:
        fresh.write_text(answers.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_record(project: Path) -> tuple[Answers, dict[str, bytes]]:
    """Read how a project was made, and its files as they were then.

    Raises:
        WorkspaceError: it was not made by `vaeflow init`, or the record is damaged.
    """
    if not (project / RECORD).is_file():
        raise WorkspaceError(
            f"{project} has no {RECORD}: it was not made by `vaeflow init`. Make a new project "
            "beside it, and take data.dvc, params.yaml and src/networks there."
        )
    try:
        answers = Answers.model_validate_json((project / RECORD).read_bytes())
        with zipfile.ZipFile(project / ORIGINALS) as archive:
            for entry in archive.infolist():
                # Whose project it is need not be who updates it.
                if ".." in Path(entry.filename).parts or Path(entry.filename).is_absolute():
                    raise zipfile.BadZipFile(f"{entry.filename} lies outside of the project")
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise zipfile.BadZipFile(f"more than {LARGEST >> 20} MiB")
            return answers, {name: archive.read(name) for name in archive.namelist()}
    except (ValidationError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise WorkspaceError(
            f"{project / RECORD.parent} is damaged: {error}. Restore it: git checkout "
            f"{RECORD.parent}"
        ) from None
