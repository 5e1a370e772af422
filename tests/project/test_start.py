"""Projects made by `vaeflow init`, and what stands in the way of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY, run

from vaeflow.cli import main

VAEFLOW = [sys.executable, "-m", "vaeflow"]


def init(folder, *arguments, status=0, **environment):
    return run(
        folder, *VAEFLOW, "init", *arguments, status=status, env={**os.environ, **environment}
    )


def listing(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def tracked(folder) -> set[str]:
    return set(run(folder, "git", "ls-files").stdout.split())


def test_a_project_is_whole_and_committed(tmp_path):
    said = init(tmp_path, "digits", "--sample").stdout
    project = tmp_path / "digits"
    assert "next: cd digits && make repro" in said
    assert run(project, "git", "status", "--porcelain").stdout == ""
    assert run(project, "git", "log", "--format=%s").stdout.splitlines() == [
        "A project made by vaeflow init"
    ]
    assert {
        *("dvc.yaml", "params.yaml", "data.dvc", "prefect.yaml", "pipelines/retrain.py"),
        *("pipelines/score.py", "src/networks/__init__.py", "tests/test_pipeline.py"),
        *("requirements.txt", "Makefile", "README.md", ".gitignore", ".dvc/config"),
        *(".github/workflows/main.yml", ".gitlab-ci.yml"),
    } <= tracked(project)
    assert "name: digits " in (project / "params.yaml").read_text()
    assert "vaeflow.model.digits " in (project / "prefect.yaml").read_text()
    # DVC reads it, and knows that every stage has to run.
    status = json.loads(run(project, "dvc", "status", "--json").stdout)
    assert {"prepare", "train", "evaluate", "export", "report"} <= set(status)


def test_images_of_ones_own_come_with_it(tmp_path):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (300, 12, 10)))
    said = init(tmp_path, "deep/in/mine", "--images", "mine.npy", "--size", "8x8").stdout
    assert "300 images" in said
    assert "data.dvc" in tracked(tmp_path / "deep" / "in" / "mine")


def test_without_images_it_says_how_to_add_some(tmp_path):
    said = init(tmp_path, "later").stdout
    assert "vaeflow data add FOLDER" in said
    project = tmp_path / "later"
    assert "data.dvc" not in tracked(project)
    error = run(project, *VAEFLOW, "prepare", status=2).stderr
    assert "vaeflow data add FOLDER" in error


def test_images_that_cannot_be_added_leave_a_project_without(tmp_path):
    error = init(tmp_path, "mine", "--images", "nowhere", status=2).stderr
    assert "nowhere" in error
    assert "has no images yet" in error
    assert run(tmp_path / "mine", "git", "status", "--porcelain").stdout == ""


def test_in_a_repository_only_its_own_files_are_committed(tmp_path):
    run(tmp_path, "git", "init", "--quiet")
    (tmp_path / "README.md").write_text("theirs\n")
    run(tmp_path, "git", "add", "README.md")
    said = init(tmp_path, "model").stdout
    assert "no files for GitHub or GitLab" in said
    assert run(tmp_path, "git", "status", "--porcelain").stdout == "A  README.md\n"
    assert all(path.startswith("model/") for path in tracked(tmp_path) - {"README.md"})
    assert "model/.gitlab-ci.yml" not in tracked(tmp_path)
    run(tmp_path / "model", "dvc", "status")


def test_at_the_root_of_a_repository(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    run(root, "git", "init", "--quiet")
    (root / "notes.md").write_text("theirs\n")
    init(root, ".")
    assert run(root, "git", "status", "--porcelain").stdout == "?? notes.md\n"
    assert ".gitlab-ci.yml" in tracked(root)


def test_nothing_is_overwritten(tmp_path):
    project = tmp_path / "mine"
    project.mkdir()
    (project / "README.md").write_text("theirs\n")
    (project / "src").write_text("a file where a folder has to be\n")
    before = listing(project)
    error = init(tmp_path, "mine", status=2).stderr
    assert "README.md, src." in error
    assert listing(project) == before
    assert (project / "README.md").read_text() == "theirs\n"


def test_a_file_where_a_folder_has_to_be(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/inside"):
        error = init(tmp_path, name, status=2).stderr
        assert f"{tmp_path / 'file'} is a file" in error
    assert listing(tmp_path) == ["file"]


def test_what_the_repository_ignores_is_said_before_anything_is_written(tmp_path):
    run(tmp_path, "git", "init", "--quiet")
    (tmp_path / ".gitignore").write_text("*.yaml\n")
    error = init(tmp_path, "mine", status=2).stderr
    assert "dvc.yaml, params.yaml, prefect.yaml" in error
    assert not (tmp_path / "mine").exists()


def test_a_hook_that_refuses_leaves_the_files_staged(tmp_path):
    run(tmp_path, "git", "init", "--quiet")
    hook = tmp_path / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho not like this; exit 1\n")
    hook.chmod(0o755)
    error = init(tmp_path, "mine", status=2).stderr
    assert "not like this" in error
    assert "made, but not committed" in error
    assert "mine/dvc.yaml" in run(tmp_path, "git", "diff", "--cached", "--name-only").stdout


def test_a_path_is_taken_as_it_is_meant(tmp_path):
    init(tmp_path, "nowhere/../mine")
    assert listing(tmp_path)[0] == "mine"


def test_a_second_time_it_says_how_to_update(tmp_path):
    init(tmp_path, "mine")
    error = init(tmp_path, "mine", status=2).stderr
    assert "vaeflow init --update" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "vaeflow init NAME"),
        (("two words",), "cannot name a model"),
        (("mine", "--images", "x", "--sample"), "either --images or --sample"),
        (("mine", "--size", "8x8"), "are for --images"),
        (("mine", "--sample", "--dry-run"), "--dry-run is for --update"),
        (("mine", "--package", "numpy"), "vaeflow==VERSION"),
        (("mine", "--package", "vaeflow-9-py3-none-any.whl"), "is not there"),
        (("mine", "--update"), "run it in the project"),
        (("--update",), "vaeflow init NAME"),
    ],
)
def test_mistakes_are_a_paragraph_and_nothing_is_written(tmp_path, arguments, says):
    error = init(tmp_path, *arguments, status=2).stderr
    assert says in error
    assert "Traceback" not in error
    assert listing(tmp_path) == []


def test_without_git_or_a_name_for_commits(tmp_path):
    assert "apt install git" in init(tmp_path, "mine", status=2, PATH="/nowhere").stderr
    nobody = {f"GIT_{who}_{what}": "" for who in ("AUTHOR", "COMMITTER") for what in ("NAME",)}
    error = init(
        tmp_path,
        "mine",
        status=2,
        **nobody,
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0="user.useConfigOnly",
        GIT_CONFIG_VALUE_0="true",
    ).stderr
    assert "git config" in error
    assert listing(tmp_path) == []


def test_without_make_the_project_is_made_all_the_same(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "git").symlink_to(shutil.which("git"))
    assert "apt install make" in init(tmp_path, "mine", PATH=str(programs)).stdout
    assert (tmp_path / "mine" / "Makefile").exists()


def test_inside_another_dvc_project(tmp_path):
    (tmp_path / ".dvc").mkdir()
    error = init(tmp_path, "a/b", status=2).stderr
    assert str(tmp_path) in error
    assert listing(tmp_path) == [".dvc"]


def test_images_need_packages_that_a_base_install_has_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vaeflow.cli.project.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["vaeflow", "init", "mine", "--sample"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "vaeflow[pipeline]" in capsys.readouterr().err
    assert listing(tmp_path) == []


# === Where the package comes from ===


def first_entry(project: Path) -> str:
    lines = (project / "requirements.txt").read_text().splitlines()
    return next(line for line in lines if not line.startswith("#"))


@pytest.mark.parametrize(
    ("noted", "entry"),
    [
        (None, "vaeflow==9.9"),
        (
            {
                "url": "https://example.org/vaeflow",
                "vcs_info": {"vcs": "git", "commit_id": "0" * 40},
            },
            f"vaeflow @ git+https://example.org/vaeflow@{'0' * 40}",
        ),
        (
            {"url": "file:///home/me/vaeflow", "dir_info": {"editable": True}},
            "vaeflow @ file:///home/me/vaeflow",
        ),
    ],
)
def test_a_project_gets_the_package_from_where_it_was_installed(tmp_path, noted, entry):
    about = tmp_path / "packages" / "vaeflow-9.9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vaeflow\nVersion: 9.9\n")
    if noted:
        (about / "direct_url.json").write_text(json.dumps(noted))
    init(tmp_path, "mine", PYTHONPATH=str(about.parent))
    assert first_entry(tmp_path / "mine") == entry


def test_a_wheel_goes_along(tmp_path):
    wheel = tmp_path / "vaeflow-9.9-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    init(tmp_path, "mine", "--package", wheel.name)
    copy = tmp_path / "mine" / "wheels" / wheel.name
    assert copy.read_bytes() == b"a wheel"
    digest = subprocess.run(["sha256sum", copy], capture_output=True, text=True).stdout.split()[0]
    assert first_entry(tmp_path / "mine") == f"./wheels/{wheel.name} --hash=sha256:{digest}"
    assert f"wheels/{wheel.name}" in tracked(tmp_path / "mine")


@pytest.mark.slow
def test_its_own_test_passes(tmp_path):
    """The smoke test that a project gets: the whole pipeline, in a copy."""
    init(tmp_path, "mine")
    project = tmp_path / "mine"
    done = run(project, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert "2 passed" in done.stdout
    assert run(project, "git", "status", "--porcelain").stdout == ""
    assert not (project / "mlflow.db").exists()


@pytest.mark.parametrize("whose", ["a project's", "this repository's"])
def test_make_makes_an_environment_anew_that_was_moved(tmp_path, whose):
    init(tmp_path, "mine")
    project = tmp_path / "mine"
    if whose == "this repository's":
        shutil.copy(REPOSITORY / "Makefile", project)
        (project / "pyproject.toml").touch()
    (project / ".venv" / "bin").mkdir(parents=True)
    for stamp in ("bin/uv", ".ready"):
        (project / ".venv" / stamp).touch()
    place = project / ".venv" / ".place"
    outside = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}

    def makes(it: str) -> bool:
        place.write_text(it)
        return "-m venv --clear .venv" in run(project, "make", "-n", "setup", env=outside).stdout

    assert not makes(f"{project}\n")
    assert makes(f"{tmp_path}\n")


def test_make_takes_spaces_in_the_way(tmp_path):
    """The active environment is ours, by a link."""
    place = tmp_path / "my projects"
    place.mkdir()
    (place / "my environment").symlink_to(sys.prefix)
    init(place, "mine")
    environment = {**os.environ, "VIRTUAL_ENV": str(place / "my environment")}
    error = run(place / "mine", "make", "repro", status=2, env=environment).stderr
    assert "vaeflow data add FOLDER" in error
    assert not (place / "mine" / ".venv").exists()


def test_make_says_what_an_active_environment_lacks(tmp_path):
    init(tmp_path, "mine")
    environment = tmp_path / "bare"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(shutil.which("false"))
    done = subprocess.run(
        ["make", "repro"],
        cwd=tmp_path / "mine",
        env={**os.environ, "VIRTUAL_ENV": str(environment)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "is active and has not all that is needed" in done.stdout
