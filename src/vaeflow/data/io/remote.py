"""Read images from object stores and web servers, by URL: whatever fsspec knows.

What lies below a URL is read as if it lay in a folder here: the same files in the same order, by
the same rules, and named by the same paths below the source. Image files pass through memory, some
of them fetched ahead. Arrays, archives and tables are not read from front to back: they are fetched
into a temporary folder, an archive or a table at a time, the arrays of a source together.
"""

from __future__ import annotations

import io
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit

from vaeflow.config.schema import Limits
from vaeflow.data.io.archives import BYTES_PER_PIXEL_IN_FILE, is_archive
from vaeflow.data.io.arrays import as_text
from vaeflow.data.io.decoding import Picture
from vaeflow.data.io.listing import (
    EXPECTED,
    HIDDEN,
    LIST_SUFFIX,
    LONGEST_LIST,
    Contents,
    is_picture,
    list_file,
    set_labels_apart,
    sort_in,
)
from vaeflow.data.io.reading import Reading
from vaeflow.data.io.rows import IMAGES, INDEX, is_array, labels_candidates
from vaeflow.data.io.tables import is_table
from vaeflow.errors import BadImageError, DataError, hide_secrets

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
HERE = ("file://", "local://")
WEB = {"http", "https"}
KNOWN = "s3://, gs://, abfs://, https://, sftp://, file://"
SECONDS_TO_ANSWER = 60
SECONDS_TO_CONNECT = 20
# Before a request that failed is made again. An object store that is asked too much says so.
PAUSES = (0.5, 2, 8)
FETCHES = 16  # at once, as each waits for an answer most of the time
AHEAD = 2 * FETCHES  # files that may wait for the reader
BYTES_AHEAD = 64 << 20
USUAL_BYTES = 1 << 20  # what a file counts as that is no larger, or of which nobody says how large
# What fsspec takes from the environment: FSSPEC_PROTOCOL_ARGUMENT.
PUBLIC = {
    "s3": "Of a public bucket say so: FSSPEC_S3_ANON=true.",
    "gs": "Of a public bucket say so: FSSPEC_GS_TOKEN=anon.",
}
OWN_STORE = {"s3": "A store of your own is named by FSSPEC_S3_ENDPOINT_URL=https://HOST:PORT."}
MISSING, REFUSED, AWAY = "missing", "refused", "away"
MISSES = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
REFUSALS, MISTAKES = {401, 403}, {400, 404, 405, 410}  # by the status of an answer

T = TypeVar("T")


def is_url(source: Path | str) -> bool:
    """Return whether a source is read over fsspec: `s3://bucket/photos`, `zip://::https://...`."""
    text = str(source)
    return bool(URL.match(text)) and "://" in text and not text.startswith(HERE)


def local(source: Path | str) -> Path | str:
    """Return the path that a `file://` URL names; any other source as it is."""
    for protocol in HERE:
        if isinstance(source, str) and source.startswith(protocol):
            return source.removeprefix(protocol)
    return source


class Entry(NamedTuple):
    """What a listing says of a name in a folder."""

    name: str
    is_folder: bool
    size: int | None


class Remote:
    """The files below a URL, or the one file at it.

    Each has a path below `folder`, where it would lie if it were fetched. What is read from there
    is named by the URL: see `named`.

    Args:
        url: of a folder or a file.

    Attributes:
        shown: the URL of the folder, as it is said and kept, without passwords.
        name: what a part of `data/` may be called by.
        folder: a temporary one; it is there while the object is entered.

    Raises:
        DataError: nothing is there, or it cannot be reached or may not be read.
    """

    def __init__(self, url: str) -> None:
        self._web = url.partition("://")[0] in WEB
        address = url.partition("?")[0].partition("#")[0] if self._web else url
        # Of Azure's, `abfs://container@account...`, the container is no secret.
        whole = _with_slash(
            as_text(address if address.startswith("abfs") else hide_secrets(address))
        )
        self.shown = whole
        with _clear_errors(whole):
            self._system, path = _open(url)
            self._address = path if self._web else path.rstrip("/")
            self._single: str | None = None
            self._size = 0
            if not self._is_folder(url):
                place = urlsplit(url).path if self._web else self._address
                self._single = place.rpartition("/")[2]
                # Of a chain, `zip://a.png::https://...`, the last part is not the file.
                self.shown = whole if "::" in url else _with_slash(whole.rpartition("/")[0])
        self._parent = self._address.partition("?")[0].rstrip("/")
        if self._single is not None:
            self._parent = self._parent.rpartition("/")[0]
            self._single = self._decoded(self._single)
        self.name = self._single or self._decoded(whole.rpartition("/")[2])
        self._sizes: dict[str, int] = {}  # of what is larger than usual, as far as it is listed

    def __enter__(self) -> Remote:
        self._scratch = TemporaryDirectory(prefix="vaeflow-")
        self.folder = Path(self._scratch.name)
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()

    def named(self, text: str) -> str:
        """Return a text with the URL for the folder in it."""
        return text.replace(str(self.folder), self.shown)

    @contextmanager
    def clear_names(self) -> Iterator[None]:
        """Name the URL in errors of what was read from the folder."""
        try:
            yield
        except BadImageError as error:
            raise BadImageError(self.named(error.name), self.named(error.reason)) from None
        except DataError as error:
            raise DataError(self.named(str(error))) from None

    def contents(self, reading: Reading) -> Contents:
        """List what there is to read, in the order of a folder here; see `list_source`.

        Nothing is fetched yet, so arrays of labels are among the arrays.
        """
        missing = "no images in this folder"
        if self._single is not None and self._size > USUAL_BYTES:
            self._sizes[f"{self.folder}/{self._single}"] = self._size
        if self._single is None:
            contents = Contents(self.folder)
            self._walk("", reading, contents)
        elif self._single.lower().endswith(LIST_SUFFIX):
            contents = self._listed(reading)
            missing = "no images in this list"
        else:
            contents, missing = list_file(self.folder / self._single, True, reading)
        if not contents:
            raise DataError(f"{self._whole()}: {missing}; expected {EXPECTED}.")
        return contents

    def fetch_arrays(self, contents: Contents, reading: Reading) -> None:
        """Fetch the arrays, and what says their labels, and take the labels out of the contents."""
        fetched = []
        for path in contents.arrays:
            try:
                self._fetch(path)
            except BadImageError as error:
                reading.on_bad(error)
                continue
            fetched.append(path)
            beside = [path.with_name(INDEX)] if path.name == IMAGES else []
            if self._single is not None:  # otherwise they were listed
                beside += labels_candidates(path)
            for companion in beside:
                with suppress(BadImageError):
                    self._fetch(companion)
        contents.arrays = fetched
        set_labels_apart(contents)

    @contextmanager
    def file(self, path: Path) -> Iterator[None]:
        """Have a file in the folder while the block runs.

        Raises:
            BadImageError: it is not there, or may not be read.
        """
        self._fetch(path)
        try:
            yield
        finally:
            path.unlink()

    def read(self, pictures: Iterator[Picture], reading: Reading) -> Iterator[Picture]:
        """Fetch image files: several at once, and no more than some megabytes ahead of the reader.

        Args:
            pictures: whose paths are below the folder.
            reading: says how large they may be; hears of those that cannot be had.

        Returns:
            The same, with their contents, in the same order.
        """
        limits = reading.limits
        waiting: deque[tuple[Picture, Future[bytes], int]] = deque()
        held = 0

        def eldest() -> Iterator[Picture]:
            nonlocal held
            picture, future, size = waiting.popleft()
            held -= size
            try:
                content = future.result()
            except BadImageError as error:
                reading.on_bad(error)
            else:
                yield picture._replace(content=content, path=None)

        # Only systems of asynchronous calls may be asked from several threads.
        with ThreadPoolExecutor(FETCHES if self._system.async_impl else 1) as pool:
            try:
                for picture in pictures:
                    size = self._sizes.get(picture.path or "", USUAL_BYTES)
                    while waiting and (len(waiting) == AHEAD or held + size > BYTES_AHEAD):
                        yield from eldest()
                    waiting.append((picture, pool.submit(self._content, picture, limits), size))
                    held += size
                while waiting:
                    yield from eldest()
            finally:  # the reader may have had enough
                pool.shutdown(cancel_futures=True)

    # === Listing ===

    def _is_folder(self, url: str) -> bool:
        if not self._web:
            found = self._ask("info", self._address)
            self._size = found.get("size") or 0
            return bool(found["type"] == "directory")
        # A web server has no folders, only pages that link to what is below them.
        parts = urlsplit(url)
        path = Path(unquote(parts.path))
        is_known = is_picture(path.name) or is_array(path) or is_archive(path) or is_table(path)
        known = is_known or path.suffix.lower() == LIST_SUFFIX
        if not (known or parts.query) and self._ask("ls", self._address):
            return True
        self._ask("info", self._address)
        return False

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Ask the system something that it should know at once."""
        if not self._system.async_impl:
            return getattr(self._system, method)(*arguments)
        from fsspec.asyn import sync

        call = getattr(self._system, f"_{method}")
        return sync(self._system.loop, call, *arguments, timeout=SECONDS_TO_ANSWER)

    def _walk(self, below: str, reading: Reading, contents: Contents) -> None:
        """List a folder and those in it; see `_list_folder`, whose order this is."""
        place = f"{self.folder}/{below}"
        try:
            entries = self._entries(below)
        except BadImageError as error:
            reading.on_bad(error)
            return
        for entry in entries:
            path = place + entry.name
            if HIDDEN.match(entry.name):
                reading.on_other(as_text(path))
            elif not _is_plain(entry.name):
                reading.on_bad(BadImageError(as_text(path), "a name that is none in a folder."))
            elif entry.is_folder:
                self._walk(f"{below}{entry.name}/", reading, contents)
            else:
                if entry.size is not None and entry.size > USUAL_BYTES:
                    self._sizes[path] = entry.size
                sort_in(path, True, reading, contents)

    def _entries(self, below: str) -> list[Entry]:
        folder = self._address_of(below).rstrip("/")
        # A web server would send another request to where the slash is.
        asked = self._address if not below else f"{folder}/" if self._web else folder
        with self._clear(f"{self.folder}/{below}".rstrip("/")):
            self._system.invalidate_cache()  # it would keep all listings, and all old ones
            found = _patiently(
                lambda: self._system.ls(asked, True)
            )  # with details: s3fs has them on request
        start = f"{folder}/".lstrip("/")
        entries = []
        for info in found:
            name = info["name"].lstrip("/")
            if name.startswith(start) and (name := name.removeprefix(start).rstrip("/")):
                is_folder = info["type"] == "directory"
                entries.append(Entry(self._decoded(name), is_folder, info.get("size")))
        return sorted(entries, key=lambda entry: entry[:2])

    def _listed(self, reading: Reading) -> Contents:
        """Read a list of paths, one a line, from the folder it lies in."""
        contents = Contents(self.folder, from_list=True)
        with self._clear(self._whole()):
            content = _patiently(lambda: self._system.cat_file(self._address))[:LONGEST_LIST]
        for line in content.decode(errors="surrogateescape").splitlines():
            if not line.strip():
                continue
            if is_url(line) or not all(map(_is_plain, line.split("/"))):
                fault = "a list at a URL names files beside it, by their paths from there."
                reading.on_bad(BadImageError(as_text(line), fault))
            else:
                sort_in(f"{self.folder}/{line}", True, reading, contents)
        return contents

    # === Fetching ===

    def _content(self, picture: Picture, limits: Limits) -> bytes:
        path = picture.path or picture.name
        _check_size(picture.name, self._sizes.get(path, 0), limits)
        address = self._address_of(self._below(path))

        def whole() -> bytes:
            content = _Bounded(picture.name, limits)
            if self._web:  # it lists no sizes: what goes on and on is not taken whole
                self._system.get_file(address, content)
            else:
                content.write(self._system.cat_file(address))
            return content.getvalue()

        with self._clear(picture.name):
            return _patiently(whole)

    def _fetch(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        address = self._address_of(self._below(str(path)))
        with self._clear(as_text(str(path))):
            _patiently(lambda: self._system.get_file(address, str(path)))

    @contextmanager
    def _clear(self, name: str) -> Iterator[None]:
        """Turn what a system raises for one file into an error that tells what to do.

        Raises:
            BadImageError: it is not there, or may not be read: others may be.
            DataError: the system does not answer any more.
        """
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            kind = _fault_of(error)
            if kind == AWAY:
                raise DataError(
                    f"{self.named(name)} cannot be fetched ({_said(error)}), and was tried "
                    f"{len(PAUSES) + 1} times. Run the same command again when it can be."
                ) from None
            fault = "does not exist." if kind == MISSING else f"may not be read ({_said(error)})."
            raise BadImageError(name, fault) from None

    # === Names ===

    def _whole(self) -> str:
        return self.shown if self._single is None else f"{self.shown}/{as_text(self._single)}"

    def _below(self, path: str) -> str:
        return path.removeprefix(f"{self.folder}/")

    def _address_of(self, below: str) -> str:
        """Return what the system calls a file by its path below the folder."""
        if self._single is not None and below == self._single:
            return self._address
        if self._web:
            below = quote(below, errors="surrogateescape")
        return f"{self._parent}/{below}" if self._parent else below

    def _decoded(self, name: str) -> str:
        return unquote(name, errors="surrogateescape") if self._web else name


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and what that calls it.

    Raises:
        DataError: there is none of this protocol, or its package is missing.
    """
    import fsspec

    protocols = [part.partition("://")[0] for part in url.split("::")]
    for protocol in protocols:
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError:
            raise DataError(
                f"{hide_secrets(url)}: {protocol}:// is no protocol that is known; expected a path "
                f"on this machine, or {KNOWN}."
            ) from None
        except ImportError as error:
            install = (
                f": pip install {packages}" if (packages := _packages(protocol, error)) else ""
            )
            raise DataError(
                f"{hide_secrets(url)}: for {protocol}:// a package is missing{install} ({error})."
            ) from None
    options = {}
    for protocol in WEB.intersection(protocols):
        import aiohttp

        # Its own would end every answer after five minutes, and a large one takes longer.
        seconds = {"sock_connect": SECONDS_TO_CONNECT, "sock_read": SECONDS_TO_ANSWER}
        timeout = aiohttp.ClientTimeout(total=None, **seconds)
        options[protocol] = {"client_kwargs": {"timeout": timeout}}
    system, path = fsspec.core.url_to_fs(url, **options)
    return system, str(path)


def _packages(protocol: str, error: ImportError) -> str:
    """Return what to install for a protocol; nothing where that is not said."""
    from fsspec.registry import known_implementations

    module = str(known_implementations[protocol]["class"]).partition(".")[0]
    return module if module != "fsspec" else " ".join(re.findall(r'"([\w-]+)"', str(error)))


def _is_plain(name: str) -> bool:
    """Return whether a name can be that of a file in a folder, and leads nowhere else."""
    return name not in {"", ".", ".."} and "/" not in name and "\0" not in name


def _with_slash(url: str) -> str:
    """Return a URL to which a slash and a name can be added: `memory://` loses one of its own."""
    url = url.rstrip("/")
    return f"{url}/" if url.endswith(":") and not url.endswith("::") else url


class _Bounded(io.BytesIO):
    """The content of one image file, refused as soon as it is larger than one may be."""

    def __init__(self, name: str, limits: Limits) -> None:
        super().__init__()
        self._name, self._limits = name, limits

    def write(self, content: Any) -> int:
        _check_size(self._name, self.tell() + len(content), self._limits)
        return super().write(content)


def _check_size(name: str, size: int, limits: Limits) -> None:
    """Refuse a file of more bytes than that of an image may have.

    Raises:
        BadImageError: it has.
    """
    largest = limits.max_pixels * BYTES_PER_PIXEL_IN_FILE
    if size > largest:
        raise BadImageError(
            name,
            f"has more than {largest:,} bytes, the most that an image at a URL may have "
            f"({limits.raised_by}).",
        )


def _patiently(call: Callable[[], T]) -> T:
    """Ask a system for something, again after a while where it fails as networks do."""
    for pause in PAUSES:
        try:
            return call()
        except DataError:
            raise
        except Exception as error:
            if _fault_of(error) != AWAY:
                raise
        time.sleep(pause)
    return call()


# === Errors ===


@contextmanager
def _clear_errors(shown: str) -> Iterator[None]:
    """Turn whatever a system raises at first into one paragraph on what to do."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        said, fault = _said(error), _fault_of(error)
        if fault == MISSING:
            raise DataError(
                f"{shown} does not exist. Compare it with what the store lists; capitals count."
            ) from None
        if fault == REFUSED:
            raise DataError(
                f"{shown} may not be read ({said}). Log in as the store's own programs ask for: "
                f"their variables and files are used here, too.{_remedy(shown, PUBLIC)}"
            ) from None
        raise DataError(
            f"{shown} cannot be reached ({said}). Look at the name of the host and at the network."
            f"{_remedy(shown, OWN_STORE)}"
        ) from None


def _remedy(url: str, remedies: dict[str, str]) -> str:
    found = (text for protocol, text in remedies.items() if f"{protocol}://" in url)
    return next((f" {text}" for text in found), "")


def _said(error: Exception) -> str:
    cause = error.__cause__ or error
    return as_text((str(cause).strip() or type(cause).__name__).partition("\n")[0])


def _fault_of(error: Exception) -> str:
    """Return what is wrong: `MISSING`, `REFUSED`, or `AWAY`: then to try again may be of use."""
    errors = [error, *([error.__cause__] if error.__cause__ else [])]
    statuses = set(map(_status, errors))
    if any(map(_is_refusal, errors)) or statuses & REFUSALS:
        return REFUSED
    if statuses & MISTAKES:
        return MISSING
    # fsspec says of a web server that is off, too, that a file is not found.
    if isinstance(error, MISSES) and not _is_of_network(error.__cause__):
        return MISSING
    return AWAY


def _is_refusal(error: BaseException) -> bool:
    kind = type(error).__name__
    return isinstance(error, PermissionError) or "Credential" in kind or "Authentication" in kind


def _is_of_network(error: BaseException | None) -> bool:
    return _is_of_web(error) or (isinstance(error, OSError) and not isinstance(error, MISSES))


def _is_of_web(error: BaseException | None) -> bool:
    return type(error).__module__.startswith("aiohttp")


def _status(error: BaseException) -> int:
    """Return the status of an answer, by the names that the stores' clients have for it; or 0."""
    response = getattr(error, "response", None)  # of botocore
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    # What aiohttp has as a `code` is its own word for an answer that was cut off.
    names = ("status",) if _is_of_web(error) else ("status", "status_code", "code")
    found = (getattr(error, name, None) for name in names)
    return next((status for status in found if isinstance(status, int)), 0)
