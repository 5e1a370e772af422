"""The wheel and the source archive in environments of their own: `make test-install`.

Packages come from where this machine's uv gets them.
"""

import os
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import run

UV = str(Path(sys.executable).with_name("uv"))
PYTHONS = ("3.11", "3.12", "3.13")
MEGABYTES = 180  # of a base install, without bytecode
pytestmark = pytest.mark.install


@pytest.fixture(params=PYTHONS)
def python(request) -> str:
    """The path of an interpreter of that version, where there is one."""
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{request.param}.*/bin/python"))
    for candidate in (f"python{request.param}", *map(str, of_pyenv)):
        tells = [candidate, "-c", "import sys; print(sys.executable)"]
        with suppress(FileNotFoundError):
            found = subprocess.run(tells, capture_output=True, text=True)
            if found.returncode == 0:
                return found.stdout.strip()
    pytest.skip(f"there is no Python {request.param} here")


def outside(**more: str) -> dict[str, str]:
    """The environment of somebody who has activated none of ours."""
    here = str(Path(sys.executable).parent)
    path = [part for part in os.environ["PATH"].split(os.pathsep) if part != here]
    kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return {**kept, "PATH": os.pathsep.join(path), **more}


def test_a_base_install_is_small_loads_a_bundle_and_says_what_more_needs(
    tmp_path, wheel, python, bundle
):
    run(tmp_path, UV, "venv", "--quiet", "--python", python, "base")
    run(tmp_path, UV, "pip", "install", "--quiet", "--python", "base/bin/python", str(wheel))
    assert int(run(tmp_path, "du", "-sm", "base").stdout.split()[0]) <= MEGABYTES
    loads = f"import vaeflow; print(vaeflow.load({str(bundle)!r}).sample(1, seed=0).shape)"
    program = str(tmp_path / "base" / "bin" / "python")
    assert run(tmp_path, program, "-c", loads).stdout.strip() == "(1, 8, 8, 1)"
    vaeflow = str(tmp_path / "base" / "bin" / "vaeflow")
    run(tmp_path, vaeflow, "init", "mine")
    needs = {
        "pipeline": (
            "retrain",
            "data add digits",
            "train",
            "models",
            "score x --model models:/x/1 --out z.parquet",
        ),
        "serve": (f"serve --model {bundle}",),
    }
    for extra, commands in needs.items():
        for command in commands:
            error = run(tmp_path / "mine", vaeflow, *command.split(), status=2).stderr
            assert f"vaeflow[{extra}]" in error, command
            assert "Traceback" not in error


def test_a_project_makes_its_own_environment_and_its_tests_pass(tmp_path, wheel, python):
    run(tmp_path, sys.executable, "-m", "vaeflow", "init", "mine", "--package", str(wheel))
    home = tmp_path / "home"
    home.mkdir()
    done = run(
        tmp_path / "mine",
        *("make", "test", f"PYTHON={python}"),
        env=outside(HOME=str(home), PREFECT_HOME=str(home / ".prefect")),
    )
    assert "2 passed" in done.stdout
    version = run(tmp_path / "mine", ".venv/bin/python", "--version").stdout
    assert Path(python).resolve().name.startswith(f"python{version.split()[1].rpartition('.')[0]}")


def test_the_source_archive_makes_the_same_wheel(tmp_path, dist, wheel):
    archive = next(dist.glob("*.tar.gz"))
    command = [UV, "build", "--wheel", "--quiet", "--no-build-isolation", "--python"]
    run(tmp_path, *command, sys.executable, "--out-dir", str(tmp_path), str(archive))
    again = next(tmp_path.glob("*.whl"))
    assert again.name == wheel.name
    contents = [
        {entry.filename: entry.CRC for entry in zipfile.ZipFile(path).infolist()}
        for path in (again, wheel)
    ]
    assert contents[0] == contents[1]
    assert any("project/template/dvc.yaml.jinja" in name for name in contents[0])
