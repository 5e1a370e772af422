import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import same_process
from helpers import aliases, change_manifest, killed_before_each_change, run, worsen

from vaeflow.errors import RegistryError
from vaeflow.registry.champion import apply_verdict, promote, rollback
from vaeflow.registry.gate import judge
from vaeflow.registry.register import register
from vaeflow.tracking.runs import connect

pytestmark = pytest.mark.slow  # a real bundle has to be made first

NAME = "digits-vae"
SETTLE = f"""
import sys
sys.path.append({str(Path(same_process.__file__).parent)!r})
import same_process
from vaeflow.registry.champion import apply_verdict
from vaeflow.registry.versions import Version
from vaeflow.common.workspace import Workspace
same_process.install()
apply_verdict(Workspace.find(), Version("digits-vae", "NUMBER"))
"""


@pytest.fixture
def improving(bundled, tmp_path):
    """Three versions, each better than the one before; none has an alias yet."""
    best = shutil.copytree(bundled.bundle, tmp_path / "best")
    versions = []
    for shift in (1.0, 0.5, 0.0):
        shutil.rmtree(bundled.bundle)
        shutil.copytree(best, bundled.bundle)
        if shift:
            worsen(bundled.bundle, shift)
        versions.append(register(bundled))
    return bundled, versions


def test_champions_follow_one_another_and_come_back(improving):
    place, (first, second, third) = improving
    assert apply_verdict(place, first).alias == "champion"
    assert apply_verdict(place, third).alias == "champion"
    refused = apply_verdict(place, second)
    assert refused.alias == "challenger"
    assert "not better than version 3" in refused.reason
    assert aliases(place.root) == {"champion": "3", "challenger": "2"}

    assert str(rollback(NAME, "it is too slow")) == (
        "models:/digits-vae/1 is @champion: rolled back from version 3"
    )
    assert aliases(place.root)["champion"] == "1"
    note = connect(place).get_model_version(*third).tags["rolled_back"]
    assert note.endswith("to version 1: it is too slow")
    with pytest.raises(RegistryError, match="no champion before version 1"):
        rollback(NAME, "")
    # What people decided stays, however often the flow runs.
    assert apply_verdict(place, third).alias is None
    assert aliases(place.root) == {"champion": "1", "challenger": "2"}


def test_a_person_may_promote_what_the_gate_refuses_with_a_reason(improving):
    place, (first, second, third) = improving
    apply_verdict(place, third)
    with pytest.raises(RegistryError, match=r"not promoted: quality: not better .* --force"):
        promote(place, first.uri, force=False, reason="")
    done = run(place.root, "vaeflow", "promote", first.uri, "--force", status=2)
    assert "--force needs a --reason" in done.stderr
    for reason in ("", "  "):
        with pytest.raises(RegistryError, match="takes a reason"):
            promote(place, first.uri, force=True, reason=reason)
    run(place.root, "vaeflow", "promote", first.uri, "--force", "--reason", "the client asks")
    assert aliases(place.root) == {"champion": "1"}
    tags = connect(place).get_model_version(*first).tags
    assert tags["promoted_because"] == "by hand: the client asks"
    # Without force, the gate decides.
    run(place.root, "vaeflow", "promote", second.uri)
    assert aliases(place.root) == {"champion": "2"}
    assert "champion: it is already" in run(place.root, "vaeflow", "promote", second.uri).stdout
    run(place.root, "vaeflow", "rollback", NAME, "--reason", "no")
    assert aliases(place.root) == {"champion": "1"}


def test_not_even_force_promotes_what_cannot_be_served(bundled):
    apply_verdict(bundled, register(bundled))
    worsen(bundled.bundle, float("nan"))
    broken = register(bundled)
    with pytest.raises(RegistryError, match="servability"):
        promote(bundled, broken.uri, force=True, reason="hurry")
    assert aliases(bundled.root) == {"champion": "1"}


@pytest.mark.fresh_process
def test_no_way_back_to_a_champion_that_is_gone(improving):
    place, (first, second, _) = improving
    apply_verdict(place, first)
    apply_verdict(place, second)
    run_id = connect(place).get_model_version(*first).run_id
    (folder,) = (place.root / "mlartifacts").rglob(run_id)
    shutil.rmtree(folder)
    with pytest.raises(RegistryError, match="cannot be champion again"):
        rollback(NAME, "")
    assert aliases(place.root)["champion"] == "2"


def test_an_alias_that_people_moved_stays_where_they_put_it(improving):
    place, (first, second, _) = improving
    apply_verdict(place, first)
    apply_verdict(place, second)
    connect(place).set_registered_model_alias(NAME, "champion", "1")
    again = apply_verdict(place, second)
    assert "holds no alias: it was registered before" in str(again)
    assert aliases(place.root) == {"champion": "1"}


def test_two_that_promote_at_once_leave_the_better_one(improving):
    """Both were better than the champion; the worse must not be left in the end."""
    place, (first, *both) = improving
    apply_verdict(place, first)
    started = [
        subprocess.Popen([sys.executable, "-c", SETTLE.replace("NUMBER", version.number)])
        for version in both
    ]
    assert [process.wait(120) for process in started] == [0, 0]
    assert aliases(place.root)["champion"] == "3"


def test_two_that_make_the_first_alias_at_once_both_succeed(bundled):
    """Without the lock, as from two machines: the database refuses one, which tries again."""
    change_manifest(bundled.bundle, created="2020-01-01T00:00:00Z")
    version = register(bundled)
    code = """
import sys, time
from vaeflow.registry.versions import Version, set_alias
from vaeflow.tracking.runs import connect
client = connect()
client.get_registered_model("digits-vae")
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    set_alias(client, f"alias{number}", Version("digits-vae", sys.argv[1]))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code, version.number]
    started = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in started:
        process.communicate(timeout=120)
    assert [process.returncode for process in started] == [0] * 4
    assert len(aliases(bundled.root)) == 20


@pytest.mark.kills
def test_a_process_killed_while_it_promotes_leaves_work_that_can_be_finished(improving):
    place, (first, second, _) = improving
    apply_verdict(place, first)
    assert killed_before_each_change(SETTLE.replace("NUMBER", second.number)) > 5
    assert aliases(place.root) == {"champion": "2"}
    tags = connect(place).get_model_version(*second).tags
    assert tags["champion_before"] == "1"
    assert "judged" in tags


def test_a_verdict_on_a_champion_of_the_past_is_not_carried_out(improving):
    place, (first, second, third) = improving
    apply_verdict(place, first)
    verdict = judge(place, second)
    assert verdict.passed
    apply_verdict(place, third)
    assert apply_verdict(place, second, verdict).alias == "challenger"
    assert aliases(place.root) == {"champion": "3", "challenger": "2"}
