"""The gate's probe without a process of its own, for tests of what comes of its answer.

A process takes two seconds to import what it needs, and some tests judge dozens of times. That a
fresh one with an empty cache is asked has tests of its own: those marked `fresh_process`.
"""

from vaeflow.registry import gate, probe


class SameProcess(probe.Probe):
    """Asks everything that the process would be asked, of the same store, here."""

    def start(self) -> None:
        """There is nothing to start."""

    def ask(self, address: str) -> str | None:
        """As `Probe.ask`, but for the cache."""
        return probe.find_fault(address)


def install() -> None:
    """Have the gate use it in this process."""
    gate.Probe = SameProcess
