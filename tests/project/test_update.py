"""`vaeflow init --update`: what changed in the template comes, what people changed stays."""

import sys

import pytest
from helpers import run

from vaeflow.project.template import read_record, write_record

VAEFLOW = [sys.executable, "-m", "vaeflow", "init"]


@pytest.fixture
def project(tmp_path):
    run(tmp_path, *VAEFLOW, "mine", "--package", "vaeflow==1.0")
    return tmp_path / "mine"


def made_of(project, **older: str | None):
    """Have it be a project of an older template, whose files were otherwise; None for not there."""
    answers, originals = read_record(project)
    for name, text in older.items():
        if text is None:
            del originals[name]
            (project / name).unlink()
        else:
            originals[name] = text.encode()
            (project / name).write_text(text)
    write_record(project, answers.model_copy(update={"version": "0.9"}), originals)
    save(project)


def save(project):
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "as it is")


def update(project, *options, status=0) -> str:
    done = run(project, *VAEFLOW, "--update", "--package", "vaeflow==1.0", *options, status=status)
    return done.stdout + done.stderr


def of_now(project, name) -> str:
    return (project / name).read_text()


def test_nothing_to_do(project):
    assert "nothing to do" in update(project)
    assert run(project, "git", "status", "--porcelain").stdout == ""


def test_a_file_that_nobody_changed_is_replaced_and_another_version_named(project):
    fresh = of_now(project, "Makefile")
    made_of(project, Makefile=fresh.replace("show this list", "help"))
    said = update(project)
    assert "updated    Makefile" in said
    assert "from vaeflow 0.9 to " in said
    assert of_now(project, "Makefile") == fresh
    save(project)
    assert "nothing to do" in update(project)


def test_both_changed_and_both_are_kept(project):
    fresh = of_now(project, "params.yaml")
    made_of(project, **{"params.yaml": fresh.replace("latent_dim: auto", "latent_dim: 3")})
    theirs = of_now(project, "params.yaml").replace("samples: 200 ", "samples: 777 ")
    assert theirs != of_now(project, "params.yaml")
    (project / "params.yaml").write_text(theirs)
    save(project)
    assert "merged     params.yaml" in update(project)
    assert of_now(project, "params.yaml") == fresh.replace("samples: 200 ", "samples: 777 ")
    save(project)
    # The next update compares with the template that it was brought to.
    assert "nothing to do" in update(project)


def test_a_contradiction_is_marked(project):
    fresh = of_now(project, "params.yaml")
    made_of(project, **{"params.yaml": fresh.replace("latent_dim: auto", "latent_dim: 3")})
    (project / "params.yaml").write_text(fresh.replace("latent_dim: auto", "latent_dim: 64"))
    save(project)
    assert "conflict   params.yaml: 1 marked with <<<<<<<" in update(project)
    merged = of_now(project, "params.yaml")
    assert "latent_dim: 64" in merged
    assert "latent_dim: auto" in merged


def test_files_come_and_go(project):
    made_of(project, **{"prefect.toml": None, "old.cfg": "a\n", "older.cfg": "b\n"})
    (project / "older.cfg").write_text("changed\n")
    (project / ".gitlab-ci.yml").unlink()
    made = of_now(project, "Makefile")
    save(project)
    said = update(project)
    assert "new        prefect.toml" in said
    assert "removed    old.cfg" in said
    assert "kept       older.cfg" in said
    assert not (project / "old.cfg").exists()
    assert (project / "prefect.toml").exists()
    assert not (project / ".gitlab-ci.yml").exists()
    assert of_now(project, "Makefile") == made


def test_changes_that_are_not_committed_stop_it(project):
    fresh = of_now(project, "Makefile")
    made_of(project, Makefile=fresh.replace("show this list", "help"))
    (project / "Makefile").write_text("mine\n")
    said = update(project, status=2)
    assert "commit them first" in said
    assert of_now(project, "Makefile") == "mine\n"


def test_a_look_first(project):
    fresh = of_now(project, "Makefile")
    made_of(project, Makefile=fresh.replace("show this list", "help"))
    said = update(project, "--dry-run")
    assert "+help: ## show this list" in said
    assert run(project, "git", "status", "--porcelain").stdout == ""


def test_the_wheel_is_changed_for_another(project, tmp_path):
    for version in ("2.0", "2.1"):
        wheel = tmp_path / f"vaeflow-{version}-py3-none-any.whl"
        wheel.write_bytes(version.encode())
        run(project, *VAEFLOW, "--update", "--package", str(wheel))
        save(project)
    assert [path.name for path in (project / "wheels").iterdir()] == [wheel.name]
    assert f"./wheels/{wheel.name} " in of_now(project, "requirements.txt")


def test_a_folder_that_init_did_not_make(workspace):
    error = run(workspace, *VAEFLOW, "--update", status=2).stderr
    assert "was not made by `vaeflow init`" in error


@pytest.mark.parametrize("name", ["../README.md", "/etc/hosts"])
def test_a_record_that_names_files_elsewhere(project, name):
    answers, originals = read_record(project)
    (project.parent / "README.md").write_text("theirs\n")
    write_record(project, answers, {**originals, name: b"theirs\n"})
    save(project)
    assert "lies outside of the project" in update(project, status=2)
    assert (project.parent / "README.md").exists()


@pytest.mark.parametrize("file", ["template.zip", "project.json"])
@pytest.mark.parametrize("damage", [lambda content: b"nothing", lambda content: content[:-9]])
def test_a_damaged_record(project, file, damage):
    path = project / ".vaeflow" / file
    path.write_bytes(damage(path.read_bytes()))
    assert "git checkout .vaeflow" in update(project, status=2)
