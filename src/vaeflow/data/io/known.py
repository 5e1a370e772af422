"""Known data sets: fetched from their publishers and compared with fixed digests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vaeflow.common.files import cache_folder, sha256_of
from vaeflow.data.io.listing import or_others
from vaeflow.data.io.reading import Images, Reading, varied
from vaeflow.data.io.sources import image_blocks
from vaeflow.data.splits import pixel_digests
from vaeflow.errors import DataError

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
# Which of them the publishers test on.
PUBLISHED = {FILES[0]: "train", FILES[2]: "test"}
DIGITS = "digits"


@dataclass(frozen=True)
class IdxSet:
    """A data set published as gzipped IDX files of images and labels.

    Attributes:
        address: the folder they are published in.
        sha256: digest by file name.
    """

    address: str
    sha256: dict[str, str]


def _set(address: str, *digests: str) -> IdxSet:
    return IdxSet(address, dict(zip(FILES, digests, strict=True)))


IDX_SETS = {
    # LeCun, Bottou, Bengio and Haffner 1998, whose page no longer serves the files; the Common
    # Visual Data Foundation does.
    "mnist": _set(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    # Xiao, Rasul and Vollgraf 2017
    "fashion-mnist": _set(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    # Clanuwat et al. 2018
    "kmnist": _set(
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    ),
}
COUNTS = {DIGITS: 1_797, **dict.fromkeys(IDX_SETS, 70_000)}
NAMES = tuple(COUNTS)


def known_blocks(
    name: str, reading: Reading, folder: Path | None = None, verify: bool = True
) -> Iterator[Images]:
    """Yield the images of a known data set, each named by its file and row.

    Args:
        name: one of `NAMES`.
        reading: how they are read.
        folder: where the files lie already; by default they are downloaded, once, into the cache.
        verify: whether a file that is not the published one, by its SHA-256, is refused.

    Raises:
        DataError: the files cannot be had, or are not the published ones.
    """
    if name == DIGITS:
        yield varied(_digits(reading), reading)
        return
    known = IDX_SETS[name]
    folder = _download(name, known) if folder is None else folder
    for file, expected in known.sha256.items():
        _check(folder / file, expected, verify)
    for file, published in PUBLISHED.items():
        split = None if reading.splits == "content" else or_others(published, PUBLISHED.values())
        for block in image_blocks(folder / file, reading=reading):
            count = len(block.pixels)
            names = [Path(row).name for row in block.names]
            yield block._replace(names=names, splits=[split] * count)


def _digits(reading: Reading) -> Images:
    """Load the 1,797 digits of 8x8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998).

    The grey levels 0..16 become 0..255 by rounding, so each can be told from the others.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., np.newaxis]
    names = [f"digits#{row}" for row in range(len(pixels))]
    pixels = reading.conversion.of_array(pixels)
    labels = digits.target.astype(str).tolist()
    digests = pixel_digests(pixels)
    return Images(pixels, digests, names, labels, [None] * len(names), digests)


def _download(name: str, known: IdxSet) -> Path:
    import pooch
    from requests.exceptions import RequestException

    folder = cache_folder() / "datasets" / name
    try:
        for file, digest in known.sha256.items():
            pooch.retrieve(known.address + file, f"sha256:{digest}", file, folder)
    except (RequestException, OSError) as error:
        files = "\n".join(f"  {known.address}{file}" for file in known.sha256)
        raise DataError(
            f"{name} cannot be downloaded ({type(error).__name__}). Fetch these files where there "
            f"is a network, put them into one folder, and name it:\n{files}\n"
            f"  vaeflow data add {name} --from FOLDER"
        ) from None
    except ValueError as error:  # pooch's word for another digest
        raise DataError(f"{name}: a download is not the published file: {error}") from None
    return folder


def _check(path: Path, expected: str, verify: bool) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; expected {', '.join(FILES)} beside each other.")
    found = sha256_of(path.read_bytes())
    if found == expected:
        return
    message = f"{path} is not the published file: its SHA-256 is {found}, expected {expected}."
    if verify:
        raise DataError(f"{message} Fetch it again; or, if you trust it, give --unverified.")
    print(f"note: {message}")
