"""Processes that train together, on one machine or on many, each with its part of every batch.

JAX carries the arrays between them. It ends a process on the spot, with a stack trace, when another
one does not come or is gone. So they know of one another beside it: each is connected to the
leader, process 0, and gives signs of life. Then all end at once, and with a sentence that says
whose fault it was.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import keras
import numpy as np

from vaeflow.errors import ConfigError, TrainingError, VaeflowError

BEAT_SECONDS = 1.0
GRACE_SECONDS = (1.0, 4.0)  # in which to end: of the others, and of the leader
SECONDS_A_LOOK = 1.0  # how often processes ask one another whether to go on
TIMEOUTS_TO_COMPILE = 5  # before the first step, of which XLA first makes a program
LONGEST_LINE = 65_536


class Hosts:
    """The processes that train together, and which of them this one is.

    What they say to one another they must all say, at the same place of the program.

    Args:
        names: of each, `HOST`, the first `HOST:PORT`.
        process: this one's number, from 0.
    """

    def __init__(self, names: Sequence[str] = ("localhost",), process: int = 0) -> None:
        self.names = names
        self.process = process
        self.watch: Watch | None = None
        self.stopping = False  # as all of them have agreed
        self.left = False
        self._calls, self._look_after, self._looked_at = 0, 1, time.monotonic()

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.names)

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes: files, checkpoints, the tracked run."""
        return self.process == 0

    def name(self, process: int) -> str:
        """Name a process, as messages do."""
        host = self.names[process] if process else self.names[0].rpartition(":")[0]
        return f"process {process} ({host})"

    def from_leader(self, content: bytes) -> bytes:
        """Return what the leader has given; of the others it is ignored."""
        if self.count == 1:
            return content
        from jax.experimental import multihost_utils

        def sent(given: bytes) -> bytes:
            one = np.frombuffer(given, np.uint8)
            return np.asarray(multihost_utils.broadcast_one_to_all(one)).tobytes()

        size = int.from_bytes(sent(len(content).to_bytes(8, "big")), "big")
        return sent(content if self.leads else bytes(size))

    def arrays_from_leader(
        self, arrays: Mapping[str, np.ndarray] | None
    ) -> dict[str, np.ndarray] | None:
        """Return the arrays that the leader has given, if any; of the others they are ignored."""
        if self.count == 1:
            return None if arrays is None else dict(arrays)
        packed = io.BytesIO()
        if arrays is not None:
            np.savez(packed, **dict[str, Any](arrays))
        content = self.from_leader(packed.getvalue())
        if not content:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as kept:
            return dict(kept)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Return each process's values, on a new first axis; of one shape in all of them."""
        if self.count == 1:
            return values[None]
        from jax.experimental import multihost_utils

        # As bytes: JAX would make float32 of float64.
        content = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        gathered = np.asarray(multihost_utils.process_allgather(content))
        return gathered.view(values.dtype).reshape(self.count, *values.shape)

    def check_same(self, what: str, digest: str) -> None:
        """Refuse to go on with processes that are about something else.

        Args:
            what: the digest is of.
            digest: of as many characters in all of them.

        Raises:
            ConfigError: theirs differ.
        """
        digests = self.gather(np.frombuffer(digest.encode(), np.uint8))
        if other := [number for number, one in enumerate(digests) if (one != digests[0]).any()]:
            raise ConfigError(
                f"{' and '.join(map(self.name, other))} has other {what} than {self.name(0)}. Give "
                "all the same: git pull, dvc pull, dvc repro prepare, the same environment."
            )

    def step(self) -> None:
        """Show that this process goes on."""
        if self.watch:
            self.watch.steps += 1

    def leave(self) -> None:
        """Go on alone: all have come here, and nothing more is to be said."""
        if self.watch is None or self.left:
            return
        import jax

        self.watch.leave()
        jax.distributed.shutdown()
        self.left = True

    def agree(self, received: int, save: bool, *, now: bool = False) -> tuple[int, bool]:
        """Tell what this process has been told, and return what to do: the same in all of them.

        Called after each step. Several ask one another about once a second.

        Args:
            received: the number of the signal that told this process to stop; 0 for none.
            save: whether a checkpoint is due. The leader's clock counts.
            now: ask in any case.

        Returns:
            The signal that one of them was given, or 0; and whether to save.
        """
        if self.count == 1:
            return received, save
        self.step()
        self._calls += 1
        if self._calls < self._look_after and not now:
            return 0, False
        took = time.monotonic() - self._looked_at
        after = max(1, round(self._calls * SECONDS_A_LOOK / max(took, 1e-3)))
        said = self.gather(np.array([received, save, after], np.int32))
        self._calls, self._look_after = 0, int(said[0, 2])
        self._looked_at = time.monotonic()
        told = int(said[:, 0].max())
        self.stopping = told > 0
        return told, bool(said[0, 1])


@contextmanager
def joined(hosts: str | None, process: int | None, timeout: float) -> Iterator[Hosts]:
    """Have this process be one of several inside; with no hosts, it is the only one.

    Call it before anything is computed.

    Args:
        hosts: the names of all, as `HOST:PORT,HOST,...`; the first is the leader's.
        process: the number of this one among them, from 0.
        timeout: seconds after which a process is given up that does not join, gives no sign of
            life or makes no step.

    Raises:
        ConfigError: they cannot be understood, or Keras's backend cannot do it.
        TrainingError: one of them did not join.
    """
    if hosts is None:
        yield Hosts()
        return
    names = [name.strip() for name in hosts.split(",")]
    _check(names, process)
    import jax

    assert process is not None
    us = Hosts(names, process)
    us.watch = Watch(us, timeout)
    try:
        us.watch.join()
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM over
        jax.distributed.initialize(
            names[0],
            len(names),
            process,
            initialization_timeout=round(timeout) + 1,
            heartbeat_timeout_seconds=4 * round(timeout) + 60,  # ours comes first, with a name
            cluster_detection_method="deactivate",
        )
        us.watch.start()
        try:
            yield us
        except SystemExit:
            if not us.stopping:
                raise
            us.leave()
            raise
        us.leave()
    except BaseException as error:
        if us.left:
            raise
        # What JAX does at its own end would wait for those who wait for this one.
        us.watch.fail(error)


def _check(names: Sequence[str], process: int | None) -> None:
    """Refuse what cannot be meant.

    Raises:
        ConfigError: it is.
    """
    if keras.backend.backend() != "jax":
        raise ConfigError(
            "several processes train on JAX: set KERAS_BACKEND=jax. TensorFlow's "
            "MultiWorkerMirroredStrategy does not work with Keras 3."
        )
    _, _, port = names[0].rpartition(":")
    if not all(names) or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--hosts {','.join(names)}: expected the names of all, the first with a port that is "
            "free on it: HOST:PORT,HOST,HOST."
        )
    if process is None or not 0 <= process < len(names):
        raise ConfigError(
            f"--process {process}: expected which of the {len(names)} hosts this is, from 0 to "
            f"{len(names) - 1}."
        )


class Watch:
    """Connections from each process to the leader, on which they give signs of life.

    Args:
        hosts: who they are.
        timeout: seconds without a sign, or without a step, after which all end.
    """

    def __init__(self, hosts: Hosts, timeout: float) -> None:
        self.hosts = hosts
        self.timeout = timeout
        self.steps = 0  # of this process
        self._connections: dict[int, socket.socket] = {}
        # Of each: its steps, and when their number changed.
        self._seen: dict[int, tuple[int, float]] = {}
        self._left: set[int] = set()  # properly
        self._gone: set[int] = set()
        self._reason: str | None = None  # to end, first come
        self._lock = threading.Lock()

    # === Join ===

    def join(self) -> None:
        """Wait until all are there.

        Raises:
            TrainingError: some did not come in time, or were refused.
        """
        if self.hosts.leads:
            self._wait_for_others()
        else:
            self._call_leader()

    def _wait_for_others(self) -> None:
        port = int(self.hosts.names[0].rpartition(":")[2])
        deadline = time.monotonic() + self.timeout
        try:
            server = _listen_on(port)
        except OSError as error:
            raise TrainingError(
                f"port {port} of {self.hosts.names[0]} cannot be used: {error.strerror}. Give "
                "--hosts another one."
            ) from None
        with server:
            while missing := self._missing():
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, address = server.accept()
                except TimeoutError:
                    reason = (
                        f"{' and '.join(map(self.hosts.name, missing))} did not join within "
                        f"{self.timeout:g} s. Start the same command there, with its own --process."
                    )
                    self._tell({"error": reason})
                    raise TrainingError(reason) from None
                self._take_in(connection, address[0].removeprefix("::ffff:"))
        self._tell({"joined": True})

    def _missing(self) -> list[int]:
        return [n for n in range(1, self.hosts.count) if n not in self._connections]

    def _take_in(self, connection: socket.socket, address: str) -> None:
        """Keep a connection, if it is that of a process that is missing."""
        connection.settimeout(5)
        try:
            said = json.loads(_read_line(connection) or "{}")
            process, names = int(said["process"]), said["hosts"]
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()  # somebody else's
            return
        reason = None
        if names != list(self.hosts.names):
            reason = f"{address} was given other --hosts than {self.hosts.name(0)}."
        elif process not in self._missing():
            reason = f"{address} is not the only {self.hosts.name(process)}: give each its own."
        if reason is None:
            self._connections[process] = connection
            return
        with suppress(OSError):
            _send(connection, {"error": reason})
        connection.close()

    def _call_leader(self) -> None:
        host, _, port = self.hosts.names[0].rpartition(":")
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TrainingError(
                        f"{self.hosts.name(0)} could not be reached at {host}:{port} within "
                        f"{self.timeout:g} s ({error.strerror or error})."
                    ) from None
                time.sleep(0.2)
        self._connections[0] = connection
        about = {"process": self.hosts.process, "hosts": list(self.hosts.names)}
        connection.settimeout(self.timeout + 10)  # the leader's time ends first, and it says why
        try:
            _send(connection, about)
            said = json.loads(_read_line(connection) or "{}")
        except (OSError, ValueError):
            said = {}
        if not said.get("joined"):
            raise TrainingError(said.get("error") or f"{self.hosts.name(0)} is gone.")

    # === Watch ===

    def start(self) -> None:
        """Give signs of life, and look at those of others, until `leave`."""
        now = time.monotonic()
        self._seen = dict.fromkeys(range(self.hosts.count), (0, now))
        for process, connection in self._connections.items():
            connection.settimeout(self.timeout)
            threading.Thread(target=self._listen, args=(process, connection), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _listen(self, process: int, connection: socket.socket) -> None:
        """Note what a process says; end this one when it says no more."""
        reason = None
        while reason is None:
            try:
                line = _read_line(connection)
            except TimeoutError:
                reason = f"{self.hosts.name(process)} gave no sign of life for {self.timeout:g} s"
                break
            except OSError:
                line = ""
            if not line:
                self._gone.add(process)
                if process in self._left:
                    return
                reason = f"{self.hosts.name(process)} is gone"
                break
            said = json.loads(line)
            if "left" in said:
                self._left.add(process)
            elif "steps" in said and said["steps"] != self._seen[process][0]:
                self._seen[process] = said["steps"], time.monotonic()
            reason = said.get("error")
        self._end(reason)

    def _beat(self) -> None:
        while self.hosts.process not in self._left:
            self._tell({"steps": self.steps})
            if self.steps != self._seen[self.hosts.process][0]:
                self._seen[self.hosts.process] = self.steps, time.monotonic()
            if self.hosts.leads:
                self._look_for_stuck()
            time.sleep(BEAT_SECONDS)

    def _look_for_stuck(self) -> None:
        """End all when nobody has made a step for too long; it is those with the fewest."""
        fewest = min(steps for steps, _ in self._seen.values())
        allowed = self.timeout * (1 if fewest else TIMEOUTS_TO_COMPILE)
        if time.monotonic() - max(when for _, when in self._seen.values()) < allowed:
            return
        behind = [number for number, (steps, _) in self._seen.items() if steps == fewest]
        self._end(
            f"nobody has made a step for {allowed:g} s; behind, after {fewest}: "
            f"{' and '.join(map(self.hosts.name, behind))}"
        )

    def _end(self, reason: str) -> None:
        """End this process, whatever it waits for, and tell the others why."""
        if self._say(f"{reason}. All end; the same command goes on from the last checkpoint."):
            self._tell({"error": reason})
            # What this one waits for may fail meanwhile, and it end by itself: see `fail`.
            time.sleep(GRACE_SECONDS[self.hosts.leads])
            _exit(2)

    def _say(self, reason: str) -> bool:
        """Print why this process ends; return whether it is the first reason."""
        with self._lock:
            first, self._reason = self._reason is None, self._reason or reason
            if first:
                print(f"vaeflow: {reason}", file=sys.stderr, flush=True)
            return first

    # === Leave ===

    def leave(self) -> None:
        """Say that this process is done."""
        self._left.add(self.hosts.process)
        self._tell({"left": True})

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of an error, and tell the others."""
        message, status = str(error), 2
        if isinstance(error, SystemExit | KeyboardInterrupt):
            code = getattr(error, "code", 128 + signal.SIGINT)
            message, status = "told to stop", code if isinstance(code, int) else 1
        elif not isinstance(error, VaeflowError):
            message, status = f"{type(error).__name__}: {error}", 1
            time.sleep(1)  # if it is that another one is gone, then that is about to be known
            if self._reason is None:
                sys.excepthook(type(error), error, error.__traceback__)
        if self._say(message):
            self._tell({"error": f"{self.hosts.name(self.hosts.process)}: {message}"})
        # JAX has the others end with a stack trace as soon as the leader is gone.
        deadline = time.monotonic() + GRACE_SECONDS[self.hosts.leads]
        while self._gone < self._connections.keys() and time.monotonic() < deadline:
            time.sleep(0.05)
        _exit(status)

    def _tell(self, said: Mapping[str, Any]) -> None:
        for connection in self._connections.values():
            with suppress(OSError):
                _send(connection, said)


def _exit(status: int) -> NoReturn:
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _listen_on(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _send(connection: socket.socket, said: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(said).encode() + b"\n")


def _read_line(connection: socket.socket) -> str:
    """Read a line; without one, the connection has been closed.

    Raises:
        OSError: nothing came in time, or the connection is broken.
    """
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            return ""
        line += byte
        if len(line) > LONGEST_LINE:
            raise OSError("a line without an end")
    return line.decode()
