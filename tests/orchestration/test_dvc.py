import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import REPOSITORY, SAMPLE, run

from vaeflow.common.workspace import Workspace
from vaeflow.errors import DataError, StageError
from vaeflow.orchestration import dvc

pytestmark = pytest.mark.slow


@pytest.fixture
def place(workspace):
    return Workspace(workspace)


def test_stages_come_from_dvc_in_an_order_that_works(place):
    (place.root / "more").mkdir()
    more = "stages:\n  last:\n    cmd: echo\n    deps: [../outputs/bundle]\n"
    (place.root / "more" / "dvc.yaml").write_text(more)
    expected = ["prepare", "train", "evaluate", "export", "report", "more/dvc.yaml:last"]
    assert dvc.stages(place) == expected


def test_what_comes_before_the_first_change_is_not_run(place):
    everything = ["prepare", "train", "evaluate", "export", "report"]
    dvc.run_stage(place, "prepare", print)
    assert dvc.fetch_data(place) == everything[1:]
    assert dvc.fetch_data(place, force=True) == everything


def test_a_stage_added_to_dvc_yaml_is_found_where_it_belongs(place):
    path = place.root / "dvc.yaml"
    text = path.read_text().replace(
        "  evaluate:\n", "  audit:\n    cmd: 'true'\n    deps: [outputs/model]\n  evaluate:\n", 1
    )
    path.write_text(text)
    found = dvc.stages(place)
    assert sorted(found) == ["audit", "evaluate", "export", "prepare", "report", "train"]
    assert found.index("train") < found.index("audit")


def test_a_broken_graph_says_so(place):
    (place.root / "dvc.yaml").write_text("stages: 3\n")
    with pytest.raises(StageError, match=r"dvc\.yaml' validation failed.*dvc dag"):
        dvc.stages(place)


def test_data_that_are_missing_come_back_and_changed_ones_are_refused(place):
    assert dvc.fetch_data(place) == ["prepare", "train", "evaluate", "export", "report"]
    path = place.data / "digits" / "images.npy"
    images = np.load(path)
    path.unlink()
    np.save(path, images[:100])
    with pytest.raises(DataError, match="dvc add data"):
        dvc.fetch_data(place)
    assert len(np.load(path)) == 100
    run(place.root, "rm", "-r", "data")
    dvc.fetch_data(place)
    np.testing.assert_array_equal(np.load(path), images)
    run(place.root, "rm", "data.dvc")
    with pytest.raises(DataError, match="dvc add data"):
        dvc.fetch_data(place)


def test_a_failed_stage_says_why(place):
    path = place.root / "params.yaml"
    path.write_text(path.read_text().replace("validation_fraction: 0.2", "validation_fraction: 2"))
    lines = []
    with pytest.raises(StageError, match=r"prepare\.validation_fraction: Input should be less"):
        dvc.run_stage(place, "prepare", lines.append)
    assert any("prepare.validation_fraction" in line for line in lines)


def test_a_stage_runs_once_and_is_then_up_to_date(place):
    lines = []
    dvc.run_stage(place, "prepare", lines.append)
    assert any(line.startswith("prepared 12") for line in lines)
    lines.clear()
    dvc.run_stage(place, "prepare", lines.append)
    assert lines == []


INTERRUPTED = """
import sys
from pathlib import Path
from vaeflow.orchestration import dvc
from vaeflow.common.workspace import Workspace

dvc.run_stage(Workspace(Path(sys.argv[1])), "prepare", lambda line: print(line, flush=True))
"""


def test_an_interrupted_caller_leaves_no_process_behind(place):
    path = place.root / "dvc.yaml"
    path.write_text(path.read_text().replace("cmd: vaeflow prepare", "cmd: echo $$ && sleep 300"))
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(place.root)], stdout=subprocess.PIPE, text=True
    )
    shell = next(int(line) for line in process.stdout if line.strip().isdigit())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 60
    while is_alive(shell):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_shipped_repository_pulls_everything_its_lock_names(tmp_path):
    """Plain `dvc pull` in a fresh clone of the commit succeeds, with the sample data."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is no clone")
    for name, shipped in (
        ("data.dvc", SAMPLE / "data.pointer"),
        (".dvc/config", SAMPLE / "config"),
    ):
        if run(REPOSITORY, "git", "show", f"HEAD:{name}").stdout != shipped.read_text():
            pytest.skip(f"this clone has a {name} of its own")
    lock = run(REPOSITORY, "git", "show", "HEAD:dvc.lock").stdout
    if lock.count("d751713988987e9331980363e24189ce.dir") != len(pipeline_outputs()):
        pytest.skip("this clone has a dvc.lock of its own")
    run(tmp_path, "git", "clone", "--quiet", str(REPOSITORY), "clone")
    run(tmp_path / "clone", "dvc", "pull")
    assert np.load(tmp_path / "clone" / "data" / "digits" / "images.npy").shape == (1797, 8, 8, 1)


def pipeline_outputs():
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    return [output for stage in stages.values() for output in stage["outs"]]


def test_the_known_digits_are_the_versioned_bytes(tmp_path, place):
    before = (place.root / "data.dvc").read_bytes()
    printed = run(place.root, "vaeflow", "data", "add", "digits").stdout
    assert (place.root / "data.dvc").read_bytes() == before
    assert "1,797 images of 8 x 8" in printed
    assert "data.dvc: unchanged" in printed
