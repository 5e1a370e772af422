"""Near-duplicates: found, and never in two splits."""

import csv
import io

import numpy as np
import pytest
from helpers import MNIST
from PIL import Image
from sklearn.datasets import load_sample_images

from vaeflow.common.workspace import Workspace
from vaeflow.config.schema import Prepare
from vaeflow.data.add import Addition, write_part
from vaeflow.data.io.reading import Images
from vaeflow.data.io.sources import read_images
from vaeflow.data.similar import Fingerprints, Pair, join_splits
from vaeflow.data.splits import LEFT_OUT, SplitRule, pixel_digests
from vaeflow.data.survey import Report, Survey, show_near_duplicates

RULE = Prepare(validation_fraction=0.3, test_fraction=0.3)


def crops(count, edge=48, seed=0):
    generator = np.random.default_rng(seed)
    photograph = load_sample_images().images[0]
    found = []
    while len(found) < count:
        top, left = (generator.integers(0, length - edge) for length in photograph.shape[:2])
        crop = photograph[top : top + edge, left : left + edge]
        if crop.std() > 30:  # there is something on it
            found.append(crop)
    return np.stack(found)


def images_of(pixels, splits=None):
    nothing = [None] * len(pixels)
    names = [f"x/{row}" for row in range(len(pixels))]
    digests = pixel_digests(pixels)
    return Images(pixels, digests, names, nothing, splits or nothing, digests)


@pytest.fixture
def fingerprints(tmp_path):
    found = Fingerprints(tmp_path / "cells")
    yield found
    found.close()
    assert not (tmp_path / "cells").exists()


def jpeg(image, quality):
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=quality)
    return np.asarray(Image.open(content))


def smaller(image):
    half = [edge // 2 for edge in image.shape[:2]]
    return np.asarray(Image.fromarray(image).resize(half).resize(image.shape[:2]))


SAVED_AGAIN = {
    "JPEG of quality 50": lambda image: jpeg(image, 50),
    "darker": lambda image: (image * 0.7).astype(np.uint8),
    "of half the size and back": smaller,
    "a little noisy": lambda image: np.clip(
        image + np.random.default_rng(1).normal(0, 4, image.shape), 0, 255
    ).astype(np.uint8),
    "grey": lambda image: np.repeat(
        np.rint(image.mean(axis=2, keepdims=True)).astype(np.uint8), 3, 2
    ),
}


@pytest.mark.parametrize("how", SAVED_AGAIN)
def test_the_same_picture_is_found_however_it_was_saved_again(fingerprints, how):
    pictures = crops(150, 128)
    again = np.stack([SAVED_AGAIN[how](picture) for picture in pictures[:50]])
    for part in (pictures, again):
        fingerprints.add(images_of(part), np.full(len(part), "train"))
    found = set(fingerprints.pairs())
    expected = {Pair(row, 150 + row) for row in range(50)}
    assert len(found & expected) >= 48
    # Crops overlap, so that some are truly nearly the same; others must not be found.
    flat = np.concatenate([pictures, again]).mean(axis=3).reshape(200, -1)
    for left, right in found - expected:
        assert np.corrcoef(flat[left], flat[right])[0, 1] > 0.9


def test_different_digits_are_not_near_duplicates(fingerprints, digits):
    fingerprints.add(images_of(digits), np.full(len(digits), "train"))
    assert fingerprints.pairs() == []


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not here")
def test_hardly_any_two_images_of_mnist_are(fingerprints):
    images = read_images(MNIST / "train-images-idx3-ubyte.gz")
    fingerprints.add(images, np.full(len(images.pixels), "train"))
    assert len(fingerprints.pairs()) < 20


def test_exact_copies_and_images_of_one_colour_do_no_harm(fingerprints):
    pictures = crops(5)
    flat = np.full((4, 48, 48, 3), 9, np.uint8)
    both = np.concatenate([pictures, flat, pictures])
    fingerprints.add(images_of(both), np.full(len(both), "train"))
    found = fingerprints.pairs()
    assert {Pair(row, row + 9) for row in range(5)} <= set(found)
    assert {Pair(5, row) for row in (6, 7, 8)} <= set(found)


def test_thousands_that_share_a_hash_end_soon(fingerprints):
    noise = np.random.default_rng(0).integers(0, 3, (6_000, 16, 16, 1), dtype=np.uint8)
    alike = np.clip(crops(1, 16)[..., :1].astype(int) // 2 + noise, 0, 255).astype(np.uint8)
    fingerprints.add(images_of(alike), np.full(len(alike), "train"))
    later = {pair.later for pair in fingerprints.pairs()}
    assert len(later) > 5_900


def test_a_later_image_joins_the_split_of_the_earlier(fingerprints):
    pictures = crops(3)
    darker = SAVED_AGAIN["darker"]
    fingerprints.add(images_of(pictures), np.array(["test", "train", "validation"]))
    fingerprints.add(images_of(np.stack([darker(p) for p in pictures])), np.full(3, "train"))
    joined = join_splits(fingerprints, 3, [None] * 3, published=False)
    assert joined.splits == {3: "test", 5: "validation"}
    assert (joined.images, joined.left_out, joined.straddling) == (3, 0, 0)


def test_between_two_splits_it_is_left_out(fingerprints):
    picture = crops(1)[0]
    three = np.stack([picture, jpeg(picture, 60), SAVED_AGAIN["darker"](picture)])
    fingerprints.add(images_of(three[:2]), np.array(["test", "train"]))
    fingerprints.add(images_of(three[2:]), np.array(["train"]))
    joined = join_splits(fingerprints, 2, [None], published=False)
    assert joined.splits == {2: LEFT_OUT}
    assert joined.left_out == 1


def test_what_was_there_before_stays(fingerprints):
    picture = crops(1)[0]
    two = np.stack([picture, jpeg(picture, 60)])
    fingerprints.add(images_of(two), np.array(["test", "train"]))
    assert join_splits(fingerprints, 2, [], published=False).splits == {}


def test_a_published_test_set_stays_whole(fingerprints):
    picture = crops(1)[0]
    two = np.stack([picture, jpeg(picture, 60)])
    fingerprints.add(images_of(two), np.array(["train", "test"]))
    joined = join_splits(fingerprints, 0, ["train or validation", "test"], published=True)
    assert joined.splits == {}
    assert joined.straddling == 1


def test_the_part_that_is_written_keeps_them_together(tmp_path, fingerprints):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(crops(60)):
        Image.fromarray(picture).save(folder / f"{number:03}-a.png")
        Image.fromarray(jpeg(picture, 70)).save(folder / f"{number:03}-b.png")
    place = Workspace(tmp_path)
    place.data.mkdir()
    report = Report(Survey(RULE))
    written = write_part(
        place.data / "part", Addition(str(folder)), RULE, report, fingerprints, set()
    )
    assert written.near.images >= 55
    assert sum(report.survey.splits.values()) + report.survey.left_out == 120
    with (place.data / "part" / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = read_images(place.data)
    splits = SplitRule.of(RULE).assign(images.digests, images.splits)
    assert [row["split"] for row in rows] == [split or "" for split in images.splits]
    again = Survey(RULE)
    again.add(images)
    assert again.splits == report.survey.splits
    pairs = fingerprints.pairs()
    apart = [p for p in pairs if len({splits[p.earlier], splits[p.later]} - {LEFT_OUT}) > 1]
    assert len(pairs) >= 55
    assert apart == []
    lines = show_near_duplicates(place, RULE, tmp_path / "near.png", 8)
    assert "in two splits: 0 pairs" in lines[0]
    assert len(lines) == 9
    with Image.open(tmp_path / "near.png") as sheet:
        assert sheet.height > 100
