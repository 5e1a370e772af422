"""The scoring flow as Prefect runs it, against a real server."""

import json
import os
import shutil
import sys
import time
import urllib.request

import numpy as np
import pyarrow.parquet
import pytest
from helpers import REPOSITORY, run

from vaeflow.scoring.drift import DRIFT_DETECTED, unmatched_trigger_warning

pytestmark = pytest.mark.slow

RUN = """
import json, sys
from prefect.flows import load_flow_from_entrypoint
flow = load_flow_from_entrypoint("pipelines/score.py:score")
print(json.dumps(flow(**json.loads(sys.argv[1]))["drifted"]))
"""


def ask(api, what, query):
    request = urllib.request.Request(
        f"{api}/{what}/filter",
        json.dumps(query).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def drift_events(api):
    query = {"filter": {"event": {"name": ["vaeflow.drift.detected"]}}}
    return ask(api, "events", query)["events"]


def wait_for_events(api, count):
    deadline = time.monotonic() + 60
    while len(events := drift_events(api)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return events


@pytest.fixture
def root(finished, tmp_path):
    """A workspace with the flow, a bundle, and two batches: one as usual, one inverted."""
    root = tmp_path / "workspace"
    shutil.copytree(finished / "outputs" / "bundle", root / "outputs" / "bundle")
    shutil.copytree(finished / "pipelines", root / "pipelines")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(finished / name, root)
    usual = np.load(finished / "outputs" / "prepared" / "test.npy")
    np.save(root / "usual.npy", usual)
    np.save(root / "inverted.npy", 255 - usual)
    return root


def start(root, api, status=0, **parameters):
    parameters = {"model": "outputs/bundle", **parameters}
    environment = {**os.environ, "PREFECT_API_URL": api}
    command = [sys.executable, "-c", RUN, json.dumps(parameters)]
    return run(root, *command, status=status, env=environment)


def test_the_flow_scores_compares_tells_and_leaves_a_report(root, prefect_api):
    done = start(root, prefect_api, sources=["usual.npy"], out="outputs/usual.parquet")
    assert done.stdout.splitlines()[-1] == "false"
    done = start(root, prefect_api, sources=["inverted.npy"], out="outputs/inverted.parquet")
    assert done.stdout.splitlines()[-1] == "true"

    table = pyarrow.parquet.read_table(root / "outputs" / "inverted.parquet")
    assert len(table) == len(np.load(root / "inverted.npy"))
    report = json.loads((root / "outputs" / "inverted.drift.json").read_text())
    assert (root / "outputs" / "inverted.drift.png").exists()
    (event,) = wait_for_events(prefect_api, 1)
    assert event["resource"]["prefect.resource.id"] == "vaeflow.model.digits-vae"
    assert event["payload"]["bundle_sha256"] == report["bundle_sha256"]
    assert event["payload"]["table"] == "outputs/inverted.parquet"
    assert "score" in event["payload"]["drifted"]
    related = {resource["prefect.resource.role"] for resource in event["related"]}
    assert "flow-run" in related
    artifacts = ask(prefect_api, "artifacts", {"sort": "CREATED_DESC"})
    written = [artifact["data"] for artifact in artifacts if artifact["key"] == "score"]
    assert len(written) == 2
    assert "drift: yes" in written[0]
    assert "| score |" in written[0]

    refused = start(root, prefect_api, status=1, sources=["absent.npy"])
    assert "absent.npy does not exist" in refused.stderr


def test_the_command_tells_the_server_too(root, prefect_api):
    before = len(drift_events(prefect_api))
    model = ("--model", "outputs/bundle")
    run(root, "vaeflow", "score", "inverted.npy", *model, "--latents", "--out", "s.parquet")
    environment = {**os.environ, "PREFECT_API_URL": prefect_api}
    command = ("vaeflow", "drift", "s.parquet", *model, "--out", "d.json")
    done = run(root, *command, status=1, env=environment)
    assert "event vaeflow.drift.detected: sent" in done.stdout
    assert done.stderr == ""
    wait_for_events(prefect_api, before + 1)


def test_the_trigger_answers_to_its_own_model_alone():
    import uuid

    import yaml
    from prefect.server.events.schemas.automations import EventTrigger
    from prefect.server.events.schemas.events import Event
    from prefect.types._datetime import now

    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    (trigger,) = next(d["triggers"] for d in deployments if d["name"] == "retrain-on-drift")
    trigger = EventTrigger(
        **{key: trigger[key] for key in ("expect", "match", "within")},
        threshold=1,
        posture="Reactive",
    )
    watched = trigger.match["prefect.resource.id"][0]

    def event(resource):
        about = {"prefect.resource.id": resource}
        return Event(
            occurred=now(), event=DRIFT_DETECTED, resource=about, id=uuid.uuid4()
        ).receive()

    assert trigger.covers(event(watched))
    assert not trigger.covers(event("vaeflow.model.somebody-elses"))


def test_deployments_of_another_model_are_told(tmp_path):
    path = tmp_path / "prefect.yaml"
    assert unmatched_trigger_warning(path, "faces") is None
    path.write_text("match:\n  prefect.resource.id: vaeflow.model.digits-vae   # a remark\n")
    assert unmatched_trigger_warning(path, "digits-vae") is None
    assert "write vaeflow.model.faces there" in unmatched_trigger_warning(path, "faces")
    path.write_text("match: {prefect.resource.id: 'vaeflow.model.*'}")
    assert unmatched_trigger_warning(path, "faces") is None
