"""How fast and in how much memory images become prepared splits.

    python benchmarks/data.py [arrays] [pictures] [tar]

measures, side by side in one run:

- an IDX file of 60,000 random images of 28x28 in `data/`, prepared, beside NumPy alone reading,
  hashing (SHA-256, image by image) and writing the same bytes; and `vaeflow data add` of that file,
  DVC's part included, then prepared;
- folders of 10,000 PNG files, colour crops from the two photographs that scikit-learn ships, of
  256x256 brought to 32x32, and of 128x128 as they are, and a zip and a Parquet table of the
  latter: decoded, checked, hashed, compared for near-duplicates and written as `vaeflow data add`
  does, before DVC takes over, beside a loop that decodes with Pillow on all cores, hashes and
  writes the same;
- the peak memory of preparing 1,000,000 images of 28x28, beside that of preparing 100;
- the peak memory of adding a tar of 1,000,000 small PNG files, beside that of one of 100, and with
  names that are 40 characters longer.

Writes `benchmarks/results/data.json`: a list of entries with `name`, `seconds` (the median of
interleaved warm runs, imports left out) or `peak_memory_mb` (of a process of its own), and the
machine; entries of ratios have `ratio` and the `aim`.
"""

import hashlib
import io
import itertools
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from machine import CORES, machine
from PIL import Image

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.add import Addition, add, write_part
from vaeflow.data.io.arrays import ArrayWriter
from vaeflow.data.io.conversion import Conversion
from vaeflow.data.prepare import prepare
from vaeflow.data.similar import Fingerprints
from vaeflow.data.survey import Report, Survey

RESULTS = Path(__file__).parent / "results" / "data.json"
IDX = "images-idx3-ubyte"
IMAGES, PICTURES = 60_000, 10_000


def write_idx(path: Path) -> None:
    """60,000 random images of 28x28."""
    path.parent.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *images.shape) + images.tobytes())


def read_hash_write(idx: Path, scratch: Path) -> None:
    """What must be done at the least: read, one SHA-256 an image, write."""
    images = np.fromfile(idx, np.uint8, offset=16).reshape(IMAGES, 28, 28, 1)
    digests = [hashlib.sha256(image).digest() for image in images]
    np.save(scratch / "copy.npy", images)
    np.save(scratch / "digests.npy", digests)


def write_pictures(folder: Path, edge: int) -> None:
    """10,000 colour crops as PNG."""
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    photographs = load_sample_images().images
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        photograph = photographs[number % len(photographs)]
        top, left = (generator.integers(0, length - edge) for length in photograph.shape[:2])
        crop = photograph[top : top + edge, left : left + edge]
        Image.fromarray(crop).save(folder / f"{number:05}.png")


Encoded = Path | bytes


def of_folder(folder: Path) -> Iterator[Encoded]:
    """The files of a folder."""
    yield from sorted(folder.iterdir())


def of_zip(path: Path) -> Iterator[Encoded]:
    """The files of a zip."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            yield archive.read(name)


def of_parquet(path: Path) -> Iterator[Encoded]:
    """The cells of a column."""
    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(256, columns=["image"]):
            yield from (cell.as_py() for cell in batch.column("image"))


def decode(some: list[Encoded], size: tuple[int, int] | None) -> tuple[np.ndarray, list[bytes]]:
    """Decode with Pillow and hash."""
    images = []
    for source in some:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as picture:
            if size:
                picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2)
            images.append(np.asarray(picture))
    return np.stack(images), [hashlib.sha256(image).digest() for image in images]


def loop(encoded: Iterator[Encoded], part: Path, size: tuple[int, int] | None) -> None:
    """What a careful person would write: threads, some files each, results in their order."""
    part.mkdir()
    digests, writer = [], None
    with ThreadPoolExecutor(CORES) as pool:
        waiting: deque[Future] = deque()

        def finish() -> None:
            nonlocal writer
            images, some = waiting.popleft().result()
            writer = writer or ArrayWriter(part / "images.npy", images.shape[1:])
            writer.write(images)
            digests.extend(some)

        while some := list(itertools.islice(encoded, 64)):
            waiting.append(pool.submit(decode, some, size))
            if len(waiting) > 4 * CORES:
                finish()
        while waiting:
            finish()
    writer.close()
    np.save(part / "digests.npy", digests)


def add_pictures(source: Path, part: Path, size: tuple[int, int] | None) -> None:
    """`vaeflow data add`, up to where DVC takes over."""
    rule = Prepare()
    addition = Addition(str(source), conversion=Conversion(size))
    with closing(Fingerprints(part.with_name("cells"))) as fingerprints:
        write_part(part, addition, rule, Report(Survey(rule)), fingerprints, set())


def add_and_prepare(place: Workspace, idx: Path) -> None:
    """From a file elsewhere to a version and its splits."""
    add(place, Prepare(), Addition(str(idx)))
    prepare(place, Prepare())


def dvc_workspace(root: Path) -> Workspace:
    """An empty one, under git and DVC."""
    root.mkdir()
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=root, check=True)
    return Workspace(root)


def medians(tasks: dict[str, Callable], runs: int, output: Path | None = None) -> list[dict]:
    """Wall time of each task, interleaved; the first round warms up.

    `output` is a folder that tasks write, removed beforehand, and the disk left to rest.
    """
    seconds = {name: [] for name in tasks}
    for run in range(runs + 1):
        for name, task in tasks.items():
            if output:
                shutil.rmtree(output, ignore_errors=True)
                os.sync()
            start = time.perf_counter()
            task()
            if run:
                seconds[name].append(time.perf_counter() - start)
    return [
        {"name": name, "seconds": round(statistics.median(times), 4), "runs": runs}
        for name, times in seconds.items()
    ]


def peak_memory(root: Path, count: int) -> dict:
    """Peak resident memory of `prepare` on random images, in a process of its own."""
    (root / "data").mkdir(parents=True)
    generator = np.random.default_rng(0)
    writer = ArrayWriter(root / "data" / "images.npy", (28, 28, 1))
    for start in range(0, count, 10_000):
        shape = (min(10_000, count - start), 28, 28, 1)
        writer.write(generator.integers(0, 256, shape, dtype=np.uint8))
    writer.close()
    # VmHWM: what getrusage calls the maximum begins at the parent's.
    script = (
        "import sys; from pathlib import Path; from vaeflow.config.schema import Prepare\n"
        "from vaeflow.data.prepare import prepare; from vaeflow.common.workspace import Workspace\n"
        "prepare(Workspace(Path(sys.argv[1])), Prepare())\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", script, root]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    megabytes = round(int(done.stdout) / 1024, 1)
    return {"name": f"prepare, {count:,} images of 28x28", "peak_memory_mb": megabytes}


TAR = """
import io, sys, tarfile
from pathlib import Path
from contextlib import closing
from PIL import Image
from vaeflow.config.schema import Prepare
from vaeflow.data.add import Addition, write_part
from vaeflow.data.similar import Fingerprints
from vaeflow.data.survey import Report, Survey
tar, part = map(Path, sys.argv[1:])
rule = Prepare()
with closing(Fingerprints(part.with_name("cells"))) as fingerprints:
    write_part(part, Addition(str(tar)), rule, Report(Survey(rule)), fingerprints, set())
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def write_tar(path: Path, count: int, prefix: str) -> None:
    """Small PNG files, each another picture."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            content = io.BytesIO()
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(content, "PNG", compress_level=0)
            info = tarfile.TarInfo(f"{prefix}{number:08}.png")
            info.size = content.tell()
            content.seek(0)
            archive.addfile(info, content)


def tar_memory(root: Path, count: int, prefix: str = "images/") -> dict:
    """Peak resident memory of adding a tar, in a process of its own."""
    root.mkdir()
    write_tar(root / "a.tar", count, prefix)
    command = [sys.executable, "-c", TAR, root / "a.tar", root / "part"]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = round(time.perf_counter() - start, 1)
    shutil.rmtree(root)
    name = f"add a tar of {count:,} PNG files of 8x8, names of {len(prefix) + 12}"
    return {
        "name": name,
        "peak_memory_mb": round(int(done.stdout) / 1024, 1),
        "seconds_in_all": seconds,
    }


def measure_pictures(
    scratch: Path, edge: int, size: tuple[int, int] | None, how: str, kinds: tuple[str, ...]
) -> list[dict]:
    """Adding pictures, and the loop."""
    folder, part = scratch / f"pictures-{edge}", scratch / "part"
    write_pictures(folder, edge)
    sources = {"folder": folder, "zip": scratch / "a.zip", "Parquet": scratch / "a.parquet"}
    if "zip" in kinds:
        with zipfile.ZipFile(sources["zip"], "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, path.name)
    if "Parquet" in kinds:
        cells = {"image": [path.read_bytes() for path in sorted(folder.iterdir())]}
        pyarrow.parquet.write_table(pyarrow.table(cells), sources["Parquet"])
    peers = {"folder": of_folder, "zip": of_zip, "Parquet": of_parquet}
    tasks: dict[str, Callable] = {}
    for kind in kinds:
        name = f"{kind} of 10,000 PNG files of {edge}x{edge} {how}"
        tasks[f"vaeflow: {name}"] = partial(add_pictures, sources[kind], part, size)
        tasks[f"loop: {name}"] = lambda kind=kind: loop(peers[kind](sources[kind]), part, size)
    return medians(tasks, runs=5, output=part)


def measure(scratch: Path, parts: list[str]) -> list[dict]:
    """All entries; those of ratios last in each part."""
    entries = []
    if "arrays" in parts:
        entries += measure_arrays(scratch)
    if "pictures" in parts:
        measured = measure_pictures(scratch, 256, (32, 32), "to 32x32", ("folder",))
        kinds = ("folder", "zip", "Parquet")
        measured += measure_pictures(scratch, 128, None, "as they are", kinds)
        entries += measured
        for ours, theirs in zip(measured[::2], measured[1::2], strict=True):
            name = ours["name"].removeprefix("vaeflow: ")
            least = 0.9 if name.startswith("folder") else 0.85
            ratio = theirs["seconds"] / ours["seconds"]
            entries.append(as_ratio(f"rate, {name} / the loop's", ratio, f"at least {least}"))
    if "tar" in parts:
        small, large, longer = (
            tar_memory(scratch / "tar", 100),
            tar_memory(scratch / "tar", 1_000_000),
            tar_memory(scratch / "tar", 1_000_000, "images/" + "a" * 40),
        )
        more = large["peak_memory_mb"] - small["peak_memory_mb"]
        a_name = (longer["peak_memory_mb"] - large["peak_memory_mb"]) * 2**20 / 1_000_000
        entries += [
            small,
            large,
            longer,
            as_ratio("MB of a tar of 1,000,000 PNG files more than of 100", more, "at most 300"),
            as_ratio("bytes a file for names that are 40 longer", a_name, "0"),
        ]
    return entries


def as_ratio(name: str, value: float, aim: str) -> dict:
    """An entry that is compared with an aim."""
    return {"name": name, "ratio": round(value, 3), "aim": aim}


def measure_arrays(scratch: Path) -> list[dict]:
    """Arrays, and the memory of preparing them."""
    place = Workspace(scratch / "prepared")
    idx = place.data / IDX
    write_idx(idx)
    versioned = dvc_workspace(scratch / "versioned")
    entries = medians(
        {
            "IDX of 60,000 images to prepared splits": lambda: prepare(place, Prepare()),
            "NumPy reads, hashes and writes the same": lambda: read_hash_write(idx, scratch),
        },
        runs=9,
    )
    prepared, numpy_alone = (entry["seconds"] for entry in entries)
    entries += medians(
        {"vaeflow data add IDX, then prepare": lambda: add_and_prepare(versioned, idx)}, runs=3
    )
    small, large = (peak_memory(scratch / str(count), count) for count in (100, 1_000_000))
    more = large["peak_memory_mb"] - small["peak_memory_mb"]
    return [
        *entries,
        small,
        large,
        as_ratio("time of IDX to splits / NumPy's", prepared / numpy_alone, "at most 2"),
        as_ratio("MB of 1,000,000 images more than 100", more, "at most 300"),
    ]


def main() -> None:
    """Measure, print, write the JSON: the parts that are named, by default all."""
    parts = sys.argv[1:] or ["arrays", "pictures", "tar"]
    with tempfile.TemporaryDirectory() as scratch:
        entries = [{**entry, **machine()} for entry in measure(Path(scratch), parts)]
    names = {entry["name"] for entry in entries}
    kept = json.loads(RESULTS.read_text()) if len(parts) < 3 and RESULTS.is_file() else []
    kept = [entry for entry in kept if entry["name"] not in names]
    RESULTS.write_text(json.dumps([*kept, *entries], indent=2) + "\n")
    for entry in entries:
        print(" ".join(f"{value!s:<64}" for value in list(entry.values())[:3]))


if __name__ == "__main__":
    main()
