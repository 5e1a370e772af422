"""This repository is a project, too: its files are those of the template, but for what is named."""

import re

import pytest
from helpers import REPOSITORY, SAMPLE
from ruamel.yaml import YAML

from vaeflow.project.template import Answers, render

# What this repository has otherwise, and why.
OF_ITS_OWN = {
    "Makefile": "it installs the package from its source, and has the targets of its developers",
    "README.md": "it is about the package",
    "requirements.txt": "it has what developers need, too, and not the package itself",
    ".github/workflows/main.yml": "it tests the package",
    ".gitlab-ci.yml": "it is kept on one host",
    ".gitignore": "it also names what developers make",
    ".dvc/config": "it has a remote with the sample images",
    ".dockerignore": "it is no model to make images of",
    "containers/pipeline.Containerfile": "the same",
    "containers/serve.Containerfile": "the same",
    "requirements-serve.txt": "it is for one of these",
    "tests/test_pipeline.py": "its own tests run the pipeline",
    "dvc.yaml": "its stages watch the package's source instead of requirements.txt",
}


@pytest.fixture(scope="module")
def rendered():
    answers = Answers(
        model="digits-vae", version="1.0", package="vaeflow==1.0", wheel=None, ci=True
    )
    return {path: content.decode() for path, content in render(answers).items()}


def own(path: str) -> str:
    # Whoever uses this clone may have other parameters by now.
    place = SAMPLE / path if path == "params.yaml" else REPOSITORY / path
    return place.read_text(encoding="utf-8")


def test_the_other_files_are_the_same(rendered):
    assert set(OF_ITS_OWN) <= set(rendered)
    for path in set(rendered) - set(OF_ITS_OWN):
        assert rendered[path] == own(path), f"src/vaeflow/project/template/{path} differs"


def test_the_stages_differ_in_what_code_they_watch_and_in_nothing_else(rendered):
    def stages(text: str) -> dict:
        content = YAML(typ="safe").load(text)
        for stage in content["stages"].values():
            watched = [
                dep
                for dep in stage["deps"]
                if dep == "requirements.txt" or dep.startswith("src/vaeflow/")
            ]
            assert watched
            stage["deps"] = [dep for dep in stage["deps"] if dep not in watched]
        return content

    assert stages(rendered["dvc.yaml"]) == stages(own("dvc.yaml"))


def test_git_ignores_here_what_it_ignores_there(rendered):
    assert set(rendered[".gitignore"].split()) <= set(own(".gitignore").split())


def test_shared_targets_of_make_do_the_same(rendered):
    def recipe(text: str, target: str) -> str:
        (found,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)*)", text, re.MULTILINE)
        return found

    for target in ("help", "setup", "repro"):
        assert recipe(rendered["Makefile"], target) == recipe(own("Makefile"), target)


def test_the_locks_name_the_same_versions(rendered):
    def pins(text: str) -> set[str]:
        return set(re.findall(r"^([\w.-]+==[^\s;\\]+)", text, re.MULTILINE))

    ours = pins(own("requirements.txt"))
    assert len(ours) > 200
    assert pins(rendered["requirements.txt"]) - {"vaeflow==1.0"} <= ours
    assert pins(rendered["requirements-uv.txt"]) <= ours
