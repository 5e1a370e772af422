"""What makes a stage's output is among its deps, and nothing else is."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from helpers import REPOSITORY, run
from ruamel.yaml import YAML

from vaeflow.common import code
from vaeflow.config.schema import Train
from vaeflow.training.checkpoint import training_key

STAGES = {
    "prepare": ("vaeflow.data.prepare", code.PREPARE),
    "train": ("vaeflow.training.train", code.TRAIN),
    "evaluate": ("vaeflow.evaluation.evaluate", code.EVALUATE),
    "export": ("vaeflow.bundle.export", code.EXPORT),
    "report": ("vaeflow.report.page", code.REPORT),
}
# What these do leaves no trace in an output: paths, errors, bars, records of runs and models.
OF_NO_INFLUENCE = {
    "vaeflow",
    "vaeflow.common",
    "vaeflow.errors",
    "vaeflow.registry",
    "vaeflow.tracking",
}
# For these, a stage needs no more than a name, a reader of files, or a frame for pictures.
FORMS = {
    "prepare": {"vaeflow.bundle", "vaeflow.config.model"},
    "train": {"vaeflow.bundle"},
    "evaluate": set(),
    "export": set(),
    "report": {"vaeflow.config.model", "vaeflow.config.schema"},
    "score": {"vaeflow.config.model", "vaeflow.config.schema"},
}


def source(module: str) -> Path:
    path = code.PACKAGE.parent / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(module: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source(module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("vaeflow") and source(name).exists()}


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def within(module: str, rooms: set[str]) -> bool:
    return any(
        module == room or (room != "vaeflow" and module.startswith(f"{room}.")) for room in rooms
    )


@pytest.mark.parametrize(
    ("stage", "first", "parts"),
    [
        *((stage, first, parts) for stage, (first, parts) in STAGES.items()),
        ("score", "vaeflow.scoring.score", code.SCORE),
    ],
)
def test_all_that_is_imported_is_watched_or_of_no_influence(stage, first, parts):
    watched = {f"vaeflow.{part.removesuffix('.py').replace('/', '.')}" for part in parts}
    seen, to_see = set(), {first}
    while to_see:
        module = to_see.pop()
        seen.add(module)
        if not within(module, OF_NO_INFLUENCE | FORMS[stage]):
            assert within(module, watched), f"{module} makes outputs of {stage}"
            to_see |= imported(module) - seen


def test_dvc_watches_the_same():
    stages = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    for stage, (_, parts) in STAGES.items():
        deps = [dep for dep in stages[stage]["deps"] if dep.startswith("src/")]
        own = [] if stage in {"prepare", "report"} else [str(code.OWN_NETWORKS)]
        assert deps == own + [f"{code.IN_WORKSPACE}/{part}" for part in parts]


def test_changed_code_makes_what_it_makes_out_of_date(finished, tmp_path):
    root = Path(shutil.copytree(finished, tmp_path / "workspace", symlinks=True))
    package = root / code.IN_WORKSPACE
    package.unlink()
    shutil.copytree(code.PACKAGE, package)
    out_of_date = lambda: set(json.loads(run(root, "dvc", "status", "--json").stdout))  # noqa: E731
    assert out_of_date() == set()
    for part in (
        "serving/app.py",
        "cli/registry.py",
        "registry/pull.py",
        "orchestration/console.py",
    ):
        append(package / part, "\n# a remark\n")
    assert out_of_date() == set()
    append(package / "evaluation" / "bounds.py", "\n# a remark\n")
    assert out_of_date() == {"evaluate"}
    append(package / "model" / "networks.py", "\n# a remark\n")
    assert out_of_date() == {"train", "evaluate", "export"}
    append(package / "report" / "model.js", "\n// a remark\n")
    assert out_of_date() == {"train", "evaluate", "export", "report"}


def test_a_checkpoint_of_other_code_is_not_gone_on_with(finished, tmp_path, monkeypatch):
    prepared = finished / "outputs" / "prepared"
    before = training_key(prepared, Train())
    package = Path(shutil.copytree(code.PACKAGE, tmp_path / "vaeflow"))
    assert code.digest(code.TRAIN, package) == code.digest(code.TRAIN)
    append(package / "serving" / "app.py", "\n")
    assert code.digest(code.TRAIN, package) == code.digest(code.TRAIN)
    append(package / "model" / "vae.py", "\n")
    other = Path(shutil.copytree(package, tmp_path / "other"))
    digest = code.digest
    assert digest(code.TRAIN, other) != digest(code.TRAIN)
    monkeypatch.setattr(code, "digest", lambda parts: digest(parts, other))
    assert training_key(prepared, Train()) != before


def test_a_workspace_without_source_watches_the_installed_package(workspace):
    place = workspace / code.IN_WORKSPACE
    assert place.is_symlink()
    assert place.resolve() == code.PACKAGE
