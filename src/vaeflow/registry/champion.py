"""Change which version is champion: by the gate's verdict, by hand, or back to the one before."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from vaeflow.common.workspace import Workspace
from vaeflow.errors import RegistryError
from vaeflow.registry.gate import Verdict, check_servability, judge
from vaeflow.registry.lock import HeldLock, hold_lock
from vaeflow.registry.probe import Probe
from vaeflow.registry.versions import (
    CHALLENGER,
    CHAMPION,
    Address,
    Version,
    alias_of,
    alias_version,
    set_alias,
)
from vaeflow.tracking.runs import connect, registry_errors, store_address

if TYPE_CHECKING:
    from mlflow import MlflowClient


# On a version that is or was champion: the number of the one before, empty for none; when; why.
BEFORE_TAG = "champion_before"
PROMOTED_TAG = "promoted"
REASON_TAG = "promoted_because"
ROLLED_BACK_TAG = "rolled_back"
JUDGED_TAG = "judged"


def set_champion(
    client: MlflowClient, version: Version, reason: str, confirm: Callable[[], None]
) -> None:
    """Make a version the champion. What it takes the place of is noted first.

    Args:
        client: of the registry.
        version: the new champion.
        reason: kept with it.
        confirm: called right before the alias moves; raises where it must not.
    """
    name, number = version
    before = alias_version(client, name, CHAMPION)
    if before != number:
        client.set_model_version_tag(name, number, BEFORE_TAG, before or "")
    client.set_model_version_tag(name, number, PROMOTED_TAG, now())
    client.set_model_version_tag(name, number, REASON_TAG, reason)
    confirm()
    set_alias(client, CHAMPION, version)
    if alias_version(client, name, CHALLENGER) == number:
        client.delete_registered_model_alias(name, CHALLENGER)


def champion_before(client: MlflowClient, name: str) -> tuple[Version, Version]:
    """Return the champion, and the version whose place it took.

    Raises:
        RegistryError: there is no champion, or none was before it.
    """
    present = alias_version(client, name, CHAMPION)
    if present is None:
        raise RegistryError(f"{name} has no champion. Make one: vaeflow promote models:/{name}/1")
    before = client.get_model_version(name, present).tags.get(BEFORE_TAG)
    if not before:
        raise RegistryError(
            f"{name}: there was no champion before version {present}. "
            f"See what there is: vaeflow models {name}"
        )
    return Version(name, present), Version(name, before)


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Outcome(NamedTuple):
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


def apply_verdict(
    workspace: Workspace, version: Version, verdict: Verdict | None = None
) -> Outcome:
    """Make a version champion if it passes the gate, else challenger.

    A version is outcome once: where people moved the alias since, it stays as they put it.

    Args:
        workspace: with the test images.
        version: registered.
        verdict: of `judge`; judged again as long as the champion is another by then.
    """
    client = connect(workspace)
    with registry_errors(client.tracking_uri):
        while True:
            if outcome := earlier_outcome(workspace, version):
                return outcome
            # Not with others waiting: it may take minutes.
            if verdict is None and alias_version(client, version.name, CHAMPION) != version.number:
                verdict = judge(workspace, version)
            with hold_lock(client, version.name) as held:
                outcome = earlier_outcome(workspace, version)
                if outcome := outcome or _carry_out(client, version, verdict, held):
                    return outcome
            verdict = None  # another was promoted meanwhile: compare with that one


def _carry_out(
    client: MlflowClient, version: Version, verdict: Verdict | None, held: HeldLock
) -> Outcome | None:
    """Carry a verdict out, where it is on the present champion."""
    champion = alias_version(client, version.name, CHAMPION)
    if champion == version.number:  # an earlier call was cut short before it noted its verdict
        tags = client.get_model_version(version.name, version.number).tags
        outcome = Outcome(version, CHAMPION, tags.get(REASON_TAG, "it was made champion"))
    elif verdict is None or verdict.against != champion:
        return None
    elif verdict.passed:
        set_champion(client, version, verdict.reason, held.confirm)
        outcome = Outcome(version, CHAMPION, verdict.reason)
    else:
        held.confirm()
        set_alias(client, CHALLENGER, version)
        outcome = Outcome(version, CHALLENGER, verdict.reason)
    client.set_model_version_tag(version.name, version.number, JUDGED_TAG, str(outcome)[:5000])
    return outcome


def earlier_outcome(workspace: Workspace, version: Version) -> Outcome | None:
    """Return what became of a version whose verdict was carried out; None where it was not yet."""
    client = connect(workspace)
    with registry_errors(client.tracking_uri):
        if JUDGED_TAG not in client.get_model_version(version.name, version.number).tags:
            return None
        return Outcome(version, alias_of(client, version), "it was registered before")


def judge_once(
    workspace: Workspace, version: Version, probe: Probe | None = None
) -> Verdict | None:
    """Judge a version as `gate.judge` does, unless its verdict was carried out before."""
    return None if earlier_outcome(workspace, version) else judge(workspace, version, probe)


def promote(workspace: Workspace, uri: str, force: bool, reason: str) -> Outcome:
    """Make a version champion because a person says so.

    Args:
        workspace: with the test images.
        uri: of a registered version.
        force: even if it is not better or not sane. One that cannot be served is never promoted.
        reason: kept with the version.

    Raises:
        RegistryError: the gate refuses it, and the message says why; or it is forced without a
            reason.
    """
    if force and not reason.strip():
        raise RegistryError("To force a promotion takes a reason, which is kept with the version.")
    with Probe(store_address(workspace)) as probe:
        probe.start()  # it imports what it needs while this process does
        client = connect(workspace)
        found = Address.parse(uri).resolve(client)
        version = Version(found.name, str(found.version))
        with registry_errors(client.tracking_uri):
            while (champion := alias_version(client, version.name, CHAMPION)) != version.number:
                if force:
                    servable = check_servability(client, version, probe)
                    verdict = Verdict(champion, {"servability": servable}, None)
                else:
                    verdict = judge(workspace, version, probe)
                if not verdict.passed:
                    remedy = "" if force else " To promote it all the same: --force --reason WHY."
                    raise RegistryError(f"{version.uri} is not promoted: {verdict.reason}.{remedy}")
                why = f"by hand: {reason.strip() or verdict.reason}"
                with hold_lock(client, version.name) as held:
                    if alias_version(client, version.name, CHAMPION) != verdict.against:
                        continue  # another was promoted meanwhile: compare with that one
                    set_champion(client, version, why, held.confirm)
                    tag = (JUDGED_TAG, why[:5000])
                    client.set_model_version_tag(version.name, version.number, *tag)
                return Outcome(version, CHAMPION, why)
        return Outcome(version, CHAMPION, "it is already")


def rollback(name: str, reason: str) -> Outcome:
    """Make the champion before the present one champion again.

    Args:
        name: of the model.
        reason: kept with the version that was champion.

    Raises:
        RegistryError: there was none before, or it cannot be served any more.
    """
    client = connect()
    with registry_errors(client.tracking_uri):
        present, before = champion_before(client, name)
        servable = check_servability(client, before)
        if not servable.passed:
            raise RegistryError(f"{before.uri} cannot be champion again: {servable.reason}.")
        with hold_lock(client, name) as held:
            if champion_before(client, name) != (present, before):
                raise RegistryError(
                    f"{name}: version {present.number} is no longer champion; another was promoted "
                    f"meanwhile. See vaeflow models {name}, and run this again if it is to go."
                )
            note = f"{now()} to version {before.number}: {reason}"
            client.set_model_version_tag(name, present.number, ROLLED_BACK_TAG, note[:5000])
            held.confirm()
            set_alias(client, CHAMPION, before)
    return Outcome(before, CHAMPION, f"rolled back from version {present.number}")
