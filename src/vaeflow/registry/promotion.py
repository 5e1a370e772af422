"""Who is champion: by the gate's verdict, by hand, or the one before again."""

from __future__ import annotations

from typing import NamedTuple

from vaeflow.errors import RegistryError
from vaeflow.registry.aliases import (
    CHALLENGER,
    CHAMPION,
    REASON_TAG,
    ROLLED_BACK_TAG,
    champion_before,
    crown,
    held_by,
    holder,
    now,
    point,
)
from vaeflow.registry.gate import Verdict, check_servability, judge
from vaeflow.registry.lock import alone_with
from vaeflow.registry.probe import Probe
from vaeflow.registry.versions import Address, Version
from vaeflow.training.tracking import clear_errors, connect, store_address
from vaeflow.workspace import Workspace

JUDGED_TAG = "judged"


class Settled(NamedTuple):
    """A version, the alias it holds, and why."""

    version: Version
    alias: str | None
    reason: str

    @property
    def uri(self) -> str:
        """The version's address."""
        return self.version.uri

    def __str__(self) -> str:
        held = f"is @{self.alias}" if self.alias else "holds no alias"
        return f"{self.uri} {held}: {self.reason}"


def settle(workspace: Workspace, version: Version, verdict: Verdict | None = None) -> Settled:
    """Make a version champion if it passes the gate, else challenger.

    A version is settled once: where people moved the alias since, it stays as they put it.

    Args:
        workspace: with the test images.
        version: registered.
        verdict: of `judge`; judged again when the champion is another by now.
    """
    client = connect(workspace)
    with clear_errors(client.tracking_uri), alone_with(client, version.name):
        if before := settled_before(workspace, version):
            return before
        champion = holder(client, version.name, CHAMPION)
        if champion == version.number:  # an earlier call was cut short before it noted its verdict
            tags = client.get_model_version(version.name, version.number).tags
            settled = Settled(version, CHAMPION, tags.get(REASON_TAG, "it was made champion"))
        else:
            if verdict is None or verdict.against != champion:
                verdict = judge(workspace, version)
            if verdict.passed:
                crown(client, version, verdict.reason)
            else:
                point(client, CHALLENGER, version)
            alias = CHAMPION if verdict.passed else CHALLENGER
            settled = Settled(version, alias, verdict.reason)
        client.set_model_version_tag(version.name, version.number, JUDGED_TAG, str(settled)[:5000])
    return settled


def settled_before(workspace: Workspace, version: Version) -> Settled | None:
    """What became of a version whose verdict was carried out; None where it was not yet."""
    client = connect(workspace)
    with clear_errors(client.tracking_uri):
        if JUDGED_TAG not in client.get_model_version(version.name, version.number).tags:
            return None
        return Settled(version, held_by(client, version), "it was registered before")


def judge_once(
    workspace: Workspace, version: Version, probe: Probe | None = None
) -> Verdict | None:
    """Judge a version as `gate.judge` does, unless its verdict was carried out before."""
    return None if settled_before(workspace, version) else judge(workspace, version, probe)


def promote(workspace: Workspace, uri: str, force: bool, reason: str) -> Settled:
    """Make a version champion because a person says so.

    Args:
        workspace: with the test images.
        uri: of a registered version.
        force: even if it is not better or not sane. One that cannot be served is never promoted.
        reason: kept with the version.

    Raises:
        RegistryError: the gate refuses it; the message says why.
    """
    with Probe(store_address(workspace)) as probe:
        probe.start()  # it imports what it needs while this process does
        client = connect(workspace)
        found = Address.parse(uri).resolve(client)
        version = Version(found.name, str(found.version))
        with clear_errors(client.tracking_uri), alone_with(client, version.name):
            if holder(client, version.name, CHAMPION) == version.number:
                return Settled(version, CHAMPION, "it is already")
            if force:
                verdict = Verdict(
                    None, {"servability": check_servability(client, version, probe)}, None
                )
            else:
                verdict = judge(workspace, version, probe)
            if not verdict.passed:
                remedy = "" if force else " To promote it all the same: --force --reason WHY."
                raise RegistryError(f"{version.uri} is not promoted: {verdict.reason}.{remedy}")
            reason = f"by hand: {reason or verdict.reason}"
            crown(client, version, reason)
            client.set_model_version_tag(version.name, version.number, JUDGED_TAG, reason[:5000])
        return Settled(version, CHAMPION, reason)


def rollback(name: str, reason: str) -> Settled:
    """Make the champion before the present one champion again.

    Args:
        name: of the model.
        reason: kept with the version that was champion.

    Raises:
        RegistryError: there was none before, or it cannot be served any more.
    """
    client = connect()
    with clear_errors(client.tracking_uri), alone_with(client, name):
        present, before = champion_before(client, name)
        servable = check_servability(client, before)
        if not servable.passed:
            raise RegistryError(f"{before.uri} cannot be champion again: {servable.reason}.")
        note = f"{now()} to version {before.number}: {reason}"
        client.set_model_version_tag(name, present.number, ROLLED_BACK_TAG, note[:5000])
        point(client, CHAMPION, before)
    return Settled(before, CHAMPION, f"rolled back from version {present.number}")
