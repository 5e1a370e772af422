from helpers import change_parameters, run

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import load_parameters
from vaeflow.tracking.lineage import collect_lineage
from vaeflow.training.train import run_name


def lineage(root):
    place = Workspace(root)
    return collect_lineage(place, load_parameters(place.parameters))


def test_what_digests_record_makes_no_run_dirty_and_other_changes_do(workspace):
    before = lineage(workspace)
    assert before["git_dirty"] == "false"
    assert before["git_commit"] == run(workspace, "git", "rev-parse", "HEAD").stdout.strip()

    change_parameters(workspace, train={"epochs": 7})  # as `--set` does for a run
    (workspace / "data.dvc").write_text((workspace / "data.dvc").read_text() + "# a remark\n")
    (workspace / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    after = lineage(workspace)
    assert after["git_dirty"] == "false"
    assert after["parameters_sha256"] != before["parameters_sha256"]

    with (workspace / "dvc.yaml").open("a") as file:
        file.write("# a remark\n")
    assert lineage(workspace)["git_dirty"] == "true"


def test_a_run_is_named_by_model_data_and_date(workspace):
    parameters = load_parameters(workspace / "params.yaml")
    model, data, *date = run_name(parameters, lineage(workspace)["data_md5"]).split()
    assert (model, data) == ("digits-vae", "fa096e85")
    assert len(" ".join(date)) == len("2026-11-27 08:00:00")
