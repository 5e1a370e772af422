"""Every kind of file that is read, or refused, with what writes it: not what reads it.

The table in `docs/reference/formats.md` is made of the list here: `python tests/formats.py`.
"""

import csv
import gzip
import io
import pickle
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, features
from pyarrow import parquet
from pyarrow import table as arrow_table
from scipy.io import savemat

from vaeflow.data.io.conversion import Conversion
from vaeflow.data.io.rules import parse_range

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "formats.md"
COUNT, HEIGHT, WIDTH = 40, 10, 12
RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (COUNT, HEIGHT, WIDTH, 1), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (COUNT, HEIGHT, WIDTH, 3), dtype=np.uint8)
ALPHA = np.concatenate([COLOUR, GREY], axis=-1)
DEEP = RANDOM.integers(0, 65_536, GREY.shape, dtype=np.uint16)
UNIT = RANDOM.random(GREY.shape, dtype=np.float32)
MASKS = (GREY > 128).astype(np.uint8)
SQUARE = RANDOM.integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8)
CIFAR = RANDOM.integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
# Blocks of 8 x 8 of one grey, which JPEG keeps as they are, and AVIF and HEIC nearly.
BLOCKS = np.kron(
    RANDOM.integers(2, 30, (COUNT, 2, 3, 1), dtype=np.uint8) * 8, np.ones((1, 8, 8, 1), np.uint8)
)


def over(background, images=ALPHA):
    """Alpha over a grey background, the nearest of 256 levels."""
    colour, alpha = images[..., :-1].astype(float), images[..., -1:].astype(float) / 255
    return np.rint(colour * alpha + background * (1 - alpha)).astype(np.uint8)


# === Writers ===


def png(image, kind, bits=8, chunks=b""):
    """A PNG of one image (W3C, Portable Network Graphics): no filter, all in one chunk."""

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    height, width = image.shape[:2]
    rows = image.astype(">u2" if bits == 16 else "u1").reshape(height, -1)
    content = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunks
        + chunk(b"IDAT", zlib.compress(content))
        + chunk(b"IEND", b"")
    )


def png_chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def bmp(image):
    """A BMP of 24 bits: blue, green, red, from the last row to the first, each a multiple of 4."""
    height, width = image.shape[:2]
    rows = [row[:, ::-1].tobytes() for row in image[::-1]]
    content = b"".join(row + b"\0" * (-len(row) % 4) for row in rows)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(content), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(content), 0, 0, 54) + head + content


def pnm(image, largest=255):
    height, width, channels = image.shape
    head = f"P{5 if channels == 1 else 6} {width} {height} {largest}\n".encode()
    return head + image.astype(">u2" if largest > 255 else "u1").tobytes()


def files(ending, write, images=COLOUR):
    """A writer of a folder of files, one an image."""

    def written(folder):
        for number, image in enumerate(images):
            content = write(image)
            (folder / f"{number:03}.{ending}").write_bytes(content)
        return folder

    return written


def pillow(kind, images, **how):
    """Where no other writer is at hand."""

    def write(image):
        content = io.BytesIO()
        Image.fromarray(image.squeeze()).save(content, kind, **how)
        return content.getvalue()

    return write


def saved(image_format, images=BLOCKS, ending=None, **how):
    return files(ending or image_format.lower(), pillow(image_format, images, **how), images)


def tiff(images=GREY, pages=1, **how):
    def written(folder):
        import tifffile

        for number, start in enumerate(range(0, len(images), pages)):
            stack = images[start : start + pages].squeeze()
            kind = "rgb" if images.shape[-1] == 3 else "minisblack"
            kept = {"photometric": kind} | how
            if kept.get("planarconfig") == "separate":
                stack = np.moveaxis(stack, -1, 0)
            tifffile.imwrite(folder / f"{number:03}.tif", stack, **kept)
        return folder

    return written


def animated(kind, ending, **how):
    """Ten files of four pages each."""

    def written(folder):
        for number in range(0, COUNT, 4):
            first, *rest = [Image.fromarray(image) for image in POSTER[number : number + 4]]
            name = folder / f"{number:03}.{ending}"
            first.save(name, kind, save_all=True, append_images=rest, **how)
        return folder

    return written


# Few enough colours for the palette of a GIF.
POSTER = np.kron(
    RANDOM.integers(0, 4, (COUNT, 5, 6, 3), dtype=np.uint8) * 85, np.ones((1, 2, 2, 1), np.uint8)
)


def npy(array, name="a.npy"):
    def written(folder):
        np.save(folder / name, array)
        return folder / name

    return written


def npy_each(arrays):
    def written(folder):
        for number, array in enumerate(arrays):
            np.save(folder / f"{number:03}.npy", array)
        return folder

    return written


def npz(**arrays):
    def written(folder):
        np.savez_compressed(folder / "a.npz", **arrays)
        return folder / "a.npz"

    return written


def idx(folder):
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", *GREY.shape[:3])
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(head + GREY.tobytes()))
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", COUNT) + bytes(range(COUNT))
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    return path


def hdf5(folder):
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("deep/images", data=COLOUR, chunks=True, compression="gzip")
        file["deep/labels"] = np.arange(COUNT)
    return folder / "a.h5"


HWCN = COLOUR.transpose(1, 2, 3, 0)


def matlab5(folder):
    labels = np.arange(COUNT)[:, None].astype(float)
    savemat(folder / "a.mat", {"X": HWCN, "y": labels}, do_compression=True)
    return folder / "a.mat"


def matlab73(folder):
    path = folder / "a.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["X"] = HWCN.T  # as MATLAB has it: the axes in reverse
        file["y"] = np.arange(COUNT, dtype=float)[None]
    content = path.read_bytes()
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(512, b" ") + content[512:])
    return path


def cifar(folder):
    planes = CIFAR.transpose(0, 3, 1, 2).reshape(COUNT, -1)
    rows = np.column_stack([np.arange(COUNT, dtype=np.uint8), planes])
    (folder / "data_batch_1.bin").write_bytes(rows.tobytes())
    return folder / "data_batch_1.bin"


def pickled(folder):
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}))
    return folder / "data_batch_1"


PNGS = [png(image, 2) for image in COLOUR]


def pngs(folder, below="some/where"):
    place = folder / below
    place.mkdir(parents=True)
    for number, content in enumerate(PNGS):
        (place / f"{number:03}.png").write_bytes(content)
    return folder


def zipped(folder):
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, content in enumerate(PNGS):
            archive.writestr(f"some/{number:03}.png", content)
    return folder / "a.zip"


def tarred(option, ending):
    def written(folder):
        names = [f"./some/where/{number:03}.png" for number in range(COUNT)]
        pngs(folder / "in")
        command = ["tar", f"-c{option}f", folder / f"a.{ending}", "-C", folder / "in", *names]
        subprocess.run(command, check=True)
        return folder / f"a.{ending}"

    return written


def parquet_of(column):
    def written(folder):
        columns = {"image": column(PNGS), "label": list(range(COUNT))}
        parquet.write_table(arrow_table(columns), folder / "a.parquet")
        return folder / "a.parquet"

    return written


def csv_of(rows, header=None):
    def written(folder):
        with (folder / "a.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            if header:
                writer.writerow(header)
            writer.writerows(rows)
        return folder / "a.csv"

    return written


FLAT = SQUARE.reshape(COUNT, -1)
LABELLED = np.column_stack([np.arange(COUNT), FLAT]).tolist()
PIXEL_NAMES = [f"pixel{number}" for number in range(FLAT.shape[1])]


def listed(folder):
    pngs(folder)
    path = folder / "list.txt"
    path.write_text("".join(f"some/where/{number:03}.png\n" for number in range(COUNT)))
    return path


NUMBERED = [str(number) for number in range(COUNT)]


@dataclass
class Kind:
    """One row of the table.

    Attributes:
        name: the format and what is in it.
        write: writes files into a folder and returns the source.
        expected: pixels, or what an error says.
        how: of the addition.
        labels: expected.
        within: levels that a lossy format may be off.
        extra: which it needs.
        note: for the table.
        needed: whether what writes it is there.
    """

    name: str
    write: Callable[[Path], Path]
    expected: np.ndarray | str
    how: dict = field(default_factory=dict)
    labels: list[str] | None = None
    within: int = 0
    extra: str = ""
    note: str = ""
    needed: Callable[[], bool] = lambda: True


def conversion(**how):
    return {"conversion": Conversion(**how)}


def ranged(text):
    value = parse_range(text)
    return conversion(pictures=value, integers=value, floats=value)


PALETTE = png_chunk(b"PLTE", bytes(range(48))) + png_chunk(b"tRNS", bytes([0, 128]))
INDEXED = RANDOM.integers(0, 16, GREY.shape, dtype=np.uint8)
PALETTE_RGBA = np.column_stack(
    [np.arange(48, dtype=np.uint8).reshape(16, 3), np.array([0, 128] + [255] * 14, np.uint8)]
)
TWELVE = (DEEP >> 4).astype(np.uint16)
MEDMNIST = {
    f"{split}_{what}": array[part]
    for split, part in (("train", slice(24)), ("val", slice(24, 32)), ("test", slice(32, COUNT)))
    for what, array in (("images", COLOUR), ("labels", np.arange(COUNT)[:, None]))
}

KINDS = [
    Kind("PNG, grey", files("png", lambda i: png(i, 0), GREY), GREY),
    Kind("PNG, colour", files("png", lambda i: png(i, 2)), COLOUR),
    Kind(
        "PNG, colour with alpha",
        files("png", lambda i: png(i, 6), ALPHA),
        over(0),
        note="over black, or `--background`",
    ),
    Kind(
        "PNG, colour with alpha, `--background white`",
        files("PNG", lambda i: png(i, 6), ALPHA),
        over(255),
        conversion(background="#ffffff"),
    ),
    Kind(
        "PNG, grey with alpha",
        files("png", lambda i: png(i, 4), ALPHA[..., 2:]),
        over(0, ALPHA[..., 2:]),
        note="over black, or `--background`",
    ),
    Kind(
        "PNG, palette with transparency",
        files("png", lambda i: png(i, 3, chunks=PALETTE), INDEXED),
        over(0, PALETTE_RGBA[INDEXED[..., 0]]),
        note="over black, or `--background`",
    ),
    Kind(
        "PNG, grey of 16 bits",
        files("png", lambda i: png(i, 0, 16), DEEP),
        np.rint(DEEP / 257).astype(np.uint8),
        note="0..65535 is black to white, or `--range`",
    ),
    Kind(
        "PNG, grey of 16 bits, `--range 0..4095`",
        files("png", lambda i: png(i, 0, 16), TWELVE),
        np.rint(TWELVE / 4095 * 255).astype(np.uint8),
        ranged("0..4095"),
    ),
    Kind(
        "PNG, colour of 16 bits",
        files("png", lambda i: png(i, 2, 16), COLOUR.astype(np.uint16) * 256 + 200),
        COLOUR,
        note="the upper 8 bits",
    ),
    Kind(
        "PNG, masks of 0 and 1",
        files("png", lambda i: png(i, 0), MASKS),
        "every value is 0 or 1",
        note="name the range: `--range 0..1`",
    ),
    Kind(
        "PNG, masks of 0 and 1, `--range 0..1`",
        files("png", lambda i: png(i, 0), MASKS),
        MASKS * 255,
        ranged("0..1"),
    ),
    Kind("JPEG", saved("JPEG", quality=100), BLOCKS),
    Kind("JPEG named .jfif", saved("JPEG", ending="jfif", quality=100), BLOCKS),
    Kind("WebP", saved("WEBP", COLOUR, lossless=True), COLOUR),
    Kind("WebP, colour with alpha", saved("WEBP", ALPHA, lossless=True, exact=True), over(0)),
    Kind("WebP, animated", animated("WEBP", "webp", lossless=True), POSTER, note="an image a page"),
    Kind(
        "AVIF",
        saved("AVIF", quality=100),
        BLOCKS,
        within=2,
        needed=lambda: features.check("avif"),
    ),
    Kind(
        "HEIC",
        lambda folder: heif(folder),
        np.repeat(BLOCKS, 3, -1),
        within=3,
        extra="formats",
        note="as colour",
        needed=lambda: bool(heif_library()),
    ),
    Kind("BMP", files("bmp", bmp), COLOUR),
    Kind("GIF", saved("GIF", POSTER), POSTER, note="as colour"),
    Kind("GIF, animated", animated("GIF", "gif"), POSTER, note="an image a page"),
    Kind("GIF, animated, `--pages first`", animated("GIF", "gif"), POSTER[::4], {"pages": "first"}),
    Kind("PGM", files("pgm", pnm, GREY), GREY),
    Kind("PPM", files("ppm", pnm), COLOUR),
    Kind(
        "PGM of 16 bits",
        files("pgm", lambda i: pnm(i, 65_535), DEEP),
        np.rint(DEEP / 257).astype(np.uint8),
        note="by the largest value it declares",
    ),
    Kind("TIFF, grey", tiff(), GREY),
    Kind("TIFF, colour, deflated", tiff(COLOUR, compression="zlib"), COLOUR),
    Kind("TIFF, planes of colour apart", tiff(COLOUR, planarconfig="separate"), COLOUR),
    Kind("TIFF of several pages", tiff(pages=4), GREY, note="an image a page"),
    Kind("TIFF, grey of 16 bits", tiff(DEEP), np.rint(DEEP / 257).astype(np.uint8)),
    Kind(
        "TIFF, floating point",
        tiff(UNIT),
        np.rint(UNIT * 255).astype(np.uint8),
        note="0..1 is black to white, or `--range`",
    ),
    Kind(
        "TIFF, floating point, `--range -1..1`",
        tiff(UNIT * 2 - 1),
        np.rint(UNIT * 255).astype(np.uint8),
        ranged("-1..1"),
        within=1,
    ),
    Kind("TIFF, white is 0", tiff(255 - GREY, photometric="miniswhite"), GREY),
    Kind(
        "TIFF, white is 0, of 16 bits",
        tiff(DEEP, photometric="miniswhite"),
        "0 stands for white in 16 bits",
        note="save it with 0 for black",
    ),
    Kind(
        "TIFF, planes of 16 bits apart",
        tiff(COLOUR.astype(np.uint16) * 256, planarconfig="separate"),
        "planes of colour of 16 bits apart",
        note="save it with 8 bits a channel",
    ),
    Kind(
        "TIFF, signed 8 bits",
        tiff((GREY.astype(int) - 128).astype(np.int8)),
        "signed numbers of 8 bits",
        note="save it unsigned",
    ),
    Kind(
        "TIFF, signed 16 bits",
        tiff(DEEP.astype(np.int16)),
        "signed numbers; say which are black and white",
        note="name the range: `--range -1024..3071`",
    ),
    Kind(
        "TIFF, integers of 32 bits",
        tiff(DEEP.astype(np.uint32)),
        "integers of 32 bits",
        note="save it with 16, or as `.npy`",
    ),
    Kind("`.npy`, (images, height, width)", npy(GREY[..., 0]), GREY),
    Kind("`.npy`, channels last", npy(COLOUR), COLOUR),
    Kind("`.npy`, channels first", npy(COLOUR.transpose(0, 3, 1, 2)), COLOUR),
    Kind("`.npy`, images last, as in SVHN", npy(HWCN), COLOUR),
    Kind("`.npy`, stored by columns", npy(np.asfortranarray(COLOUR)), COLOUR),
    Kind("`.npy`, four channels", npy(ALPHA), over(0), note="colour with alpha, or `--channels 4`"),
    Kind("`.npy`, four channels, `--channels 4`", npy(ALPHA), ALPHA, conversion(channels=4)),
    Kind("`.npy` files of one grey image each", npy_each(GREY[..., 0]), GREY),
    Kind("`.npy` files of one colour image each", npy_each(COLOUR), COLOUR),
    Kind(
        "`.npy` files of one image each, channels first",
        npy_each(COLOUR.transpose(0, 3, 1, 2)),
        COLOUR,
    ),
    Kind("`.npy`, booleans", npy(MASKS.astype(bool)), MASKS * 255),
    Kind("`.npy`, integers 0 and 1", npy(MASKS), MASKS * 255, note="the range is found out"),
    Kind("`.npy`, int64 of 0..255", npy(COLOUR.astype(np.int64)), COLOUR),
    Kind("`.npy`, floats of 0..1", npy(UNIT), np.rint(UNIT * 255).astype(np.uint8)),
    Kind(
        "`.npy`, floats of -1..1",
        npy(UNIT.astype(float) * 2 - 1),
        np.rint(UNIT * 255).astype(np.uint8),
        within=1,
    ),
    Kind("`.npy`, floats of 0..255", npy(COLOUR.astype(np.float16)), COLOUR),
    Kind("`.npy`, uint16", npy(DEEP), np.rint(DEEP / 257).astype(np.uint8)),
    Kind(
        "`.npy`, uint16 of 12 bits",
        npy(TWELVE),
        "which of them are black and white is not known",
        note="name the range: `--range 0..4095`",
    ),
    Kind(
        "`.npy`, (3, height, width), alone",
        npy(COLOUR[0].transpose(2, 0, 1)),
        "it is not known which axis is which",
        note="name them: `--layout CHW` or `NHW`",
    ),
    Kind(
        "`.npy`, pickled objects",
        npy(np.array([{}, 1], dtype=object)),
        "pickled Python objects, which are never opened",
    ),
    Kind("`.npz`, labels beside", npz(x=COLOUR, y=np.arange(COUNT)), COLOUR, labels=NUMBERED),
    Kind(
        "`.npz` of MedMNIST",
        npz(**MEDMNIST),
        COLOUR,
        labels=NUMBERED,
        note="train, val and test stay so",
    ),
    Kind("IDX, gzipped, labels beside", idx, GREY, labels=NUMBERED),
    Kind("HDF5", hdf5, COLOUR, labels=NUMBERED),
    Kind("MATLAB 5 `.mat`, images last", matlab5, COLOUR, labels=NUMBERED),
    Kind("MATLAB 7.3 `.mat`, images last", matlab73, COLOUR, labels=NUMBERED),
    Kind("CIFAR-10 `.bin`", cifar, CIFAR, labels=NUMBERED),
    Kind(
        "CIFAR-10, pickled",
        pickled,
        "a pickle, which can run code, is never opened",
        note="the command that converts it",
    ),
    Kind("`.zip` of image files", zipped, COLOUR, note="not unpacked to disk"),
    Kind("`.tar`", tarred("", "tar"), COLOUR, note="not unpacked to disk"),
    Kind("`.tar.gz`, `.tgz`", tarred("z", "tar.gz"), COLOUR),
    Kind("`.tar.xz`", tarred("J", "tar.xz"), COLOUR),
    Kind("`.tar.bz2`", tarred("j", "tar.bz2"), COLOUR),
    Kind("Parquet, a column of bytes", parquet_of(list), COLOUR, labels=NUMBERED),
    Kind(
        "Parquet, `{bytes, path}`",
        parquet_of(lambda all_: [{"bytes": one, "path": "a.png"} for one in all_]),
        COLOUR,
        labels=NUMBERED,
    ),
    Kind(
        "CSV, a label and pixels",
        csv_of(LABELLED, ["label", *PIXEL_NAMES]),
        SQUARE,
        labels=NUMBERED,
        note="square, or `--pixels HEIGHTxWIDTH`",
    ),
    Kind("CSV without names, label first", csv_of(LABELLED), SQUARE, labels=NUMBERED),
    Kind(
        "CSV with a column `pixels`",
        csv_of(
            [[n, " ".join(map(str, row)), "Training"] for n, row in enumerate(FLAT)],
            ["emotion", "pixels", "Usage"],
        ),
        SQUARE,
        labels=NUMBERED,
    ),
    Kind("`.txt` with a path a line", listed, COLOUR, note="`-`: on standard input"),
]


def heif_library():
    try:
        import pillow_heif
    except ImportError:
        return None
    return pillow_heif


def heif(folder):
    for number, image in enumerate(BLOCKS):
        file = heif_library().from_pillow(Image.fromarray(np.repeat(image, 3, -1)))
        file.save(folder / f"{number:03}.heic", quality=-1, chroma=444)
    return folder


def table():
    """The rows of the page."""
    lines = ["| format | | |", "|---|---|---|"]
    for kind in KINDS:
        status = "refused" if isinstance(kind.expected, str) else "read"
        status = f"extra `{kind.extra}`" if kind.extra else status
        lines.append(f"| {kind.name} | {status} | {kind.note} |")
    return "\n".join(lines)


if __name__ == "__main__":
    text = PAGE.read_text()
    first = text.index("| format |")
    last = text.index("\n\n", first)
    PAGE.write_text(text[:first] + table() + text[last:])
