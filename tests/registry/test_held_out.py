from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from vaeflow.data.splits import SplitRule, pixel_digests
from vaeflow.errors import RegistryError
from vaeflow.registry.held_out import TRIES_TAG, HeldOut, choose_images, count_try, unseen_images
from vaeflow.registry.versions import Version
from vaeflow.tracking.runs import connect


@pytest.fixture
def held_out(digits):
    """All digits, sorted by label, as a folder a class has them."""
    from sklearn.datasets import load_digits

    labels = load_digits().target.astype(str).astype(object)
    order = np.argsort(labels, kind="stable")
    return HeldOut(pixel_digests(digits[order]), labels[order])


def everything(held_out):
    return np.ones(len(held_out.digests), bool)


def test_of_every_label_its_share_is_chosen(held_out):
    rows = choose_images(held_out, everything(held_out), 180)
    assert len(rows) == len(set(rows)) == 180
    assert rows.tolist() == sorted(rows)
    counts = Counter(held_out.labels[rows])
    whole = Counter(held_out.labels)
    for label, count in whole.items():
        assert abs(counts[label] - 180 * count / len(held_out.labels)) <= 1


def test_they_are_chosen_at_random_but_always_the_same(held_out):
    unlabelled = held_out._replace(labels=np.full(len(held_out.labels), None, object))
    rows = choose_images(unlabelled, everything(held_out), 300)
    # As many of each third of the rows as chance would have, within four standard deviations.
    thirds = np.histogram(rows, bins=3, range=(0, len(held_out.labels)))[0]
    assert (abs(thirds - 100) < 4 * np.sqrt(300 * 2 / 9)).all()
    backwards = HeldOut(unlabelled.digests[::-1], unlabelled.labels[::-1])
    again = choose_images(backwards, everything(held_out), 300)
    assert {bytes(row) for row in unlabelled.digests[rows]} == {
        bytes(row) for row in backwards.digests[again]
    }


def test_most_stay_when_images_are_added(held_out):
    some = np.random.default_rng(0).random(len(held_out.digests)) < 0.8
    before = set(choose_images(held_out, some, 300).tolist())
    after = set(choose_images(held_out, everything(held_out), 300).tolist())
    assert len(before & after) > 220  # four fifths of 300, or about that


def test_no_image_is_chosen_twice(held_out):
    doubled = HeldOut(np.repeat(held_out.digests, 2, axis=0), np.repeat(held_out.labels, 2))
    rows = choose_images(doubled, everything(doubled), 10_000)
    assert len(rows) == len(held_out.digests)
    assert len({bytes(row) for row in doubled.digests[rows]}) == len(rows)


def test_an_image_that_either_model_had_is_left_out(held_out):
    rules = {
        "version 1": SplitRule(0, 0.1, 0.5),
        "version 2": SplitRule(1, 0.1, 0.5),
    }
    unseen = unseen_images(held_out, {name: str(rule) for name, rule in rules.items()})
    expected = [rule.assign(held_out.digests) == "test" for rule in rules.values()]
    np.testing.assert_array_equal(unseen, expected[0] & expected[1])
    assert 0 < unseen.sum() < expected[0].sum()


@pytest.mark.parametrize("text", [None, "", "given, 0123abcd"])
def test_a_model_whose_split_is_not_known_is_not_compared(held_out, text):
    rules = {"version 1": text, "version 2": str(SplitRule(0, 0.1, 0.1))}
    with pytest.raises(RegistryError, match="which images version 1 was trained on is not known"):
        unseen_images(held_out, rules)


def test_too_few_images_that_are_new_to_both_are_an_error(held_out):
    rules = {f"version {seed}": str(SplitRule(seed, 0.1, 0.05)) for seed in (1, 2)}
    with pytest.raises(RegistryError, match=r"only \d of 1797 test images .* seed 1, validation"):
        unseen_images(held_out, rules)


def test_few_images_will_do_where_both_models_were_split_alike(held_out):
    digests = held_out.digests[SplitRule(0, 0.1, 0.01).assign(held_out.digests) == "test"]
    few = HeldOut(digests, np.full(len(digests), None, object))
    assert 2 <= len(digests) < 30
    rules = dict.fromkeys(["version 1", "version 2"], str(SplitRule(0, 0.1, 0.01)))
    assert unseen_images(few, rules).all()
    one = HeldOut(np.repeat(digests[:1], 5, axis=0), np.full(5, None, object))
    with pytest.raises(RegistryError, match="not two different test images"):
        choose_images(one, unseen_images(one, rules), 2000)


def test_images_whose_split_was_given_are_new_to_models_that_had_them_so(held_out):
    given = np.where(np.arange(len(held_out.labels)) < 900, "aa", "bb").astype(object)
    both = held_out._replace(given=given, all_given=frozenset({"aa", "bb"}))
    one = {"version 1": str(SplitRule(0, 0.1, 0.1, ("aa",)))}
    by_content = SplitRule(0, 0.1, 0.1).assign(held_out.digests) == "test"
    # The others it may have had by content, as long as nothing else is known.
    np.testing.assert_array_equal(unseen_images(both, one), (given == "aa") | by_content)
    alike = dict.fromkeys(["version 1", "version 2"], str(SplitRule(0, 0.1, 0.1, ("aa", "bb"))))
    assert unseen_images(both, alike).all()
    gone = held_out._replace(given=None, all_given=frozenset({"bb"}))
    with pytest.raises(RegistryError, match=r"\(aa\) are not in data/ any more"):
        unseen_images(gone, one)


RULES = [
    SplitRule(0, 0.1, 0.1),
    SplitRule(2**32 - 1, 1e-05, 1 / 3),
    SplitRule(0, 0.1, 0.1, ("0123456789abcdef", "f" * 16)),
]


@pytest.mark.parametrize("rule", RULES)
def test_a_split_is_read_as_it_was_written(rule):
    assert SplitRule.parse(str(rule)) == rule


# === Tries ===


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry with a model of three versions."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = connect()
    client.create_registered_model("digits-vae")
    for _ in range(3):
        client.create_model_version("digits-vae", "nowhere:/")
    return SimpleNamespace(client=client, versions=[Version("digits-vae", n) for n in "123"])


def test_tries_are_counted_while_most_of_the_images_stay(registry, held_out):
    client, (_, second, third) = registry.client, registry.versions
    images = held_out.digests
    assert count_try(client, second, "1", images[:800]) == 1
    assert count_try(client, third, "1", images[:800]) == 2
    # The same again, after a kill perhaps; then another champion, and some new images.
    assert count_try(client, third, "1", images[:800]) == 2
    assert count_try(client, third, "2", images[:800]) == 3
    assert count_try(client, third, "2", images[100:900]) == 4
    # Most are new: another life.
    assert count_try(client, third, "2", images[800:1600]) == 1
    # The first life goes on where it was, so that to and fro wins nothing.
    assert count_try(client, second, "1", images[:790]) == 5
    tags = client.get_registered_model("digits-vae").tags
    assert len([key for key in tags if key.startswith(TRIES_TAG)]) == 2
    assert all(len(value) < 600 for value in tags.values())
