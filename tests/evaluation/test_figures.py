import keras
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA

from vaeflow.common.pictures import shrunk
from vaeflow.config.model import VAEConfig
from vaeflow.evaluation.bounds import quantiles
from vaeflow.evaluation.evaluate import read_labels
from vaeflow.evaluation.figures import (
    draw_latent_dimensions,
    draw_latent_map,
    draw_reconstructions,
    draw_samples,
    draw_scores,
    draw_traversals,
    plane,
)
from vaeflow.model.vae import VAE


def colours(path):
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(1_000_000)}


def test_the_plane_is_that_of_the_principal_components():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + 3
    expected = PCA(2).fit_transform(means)
    actual = plane(means)
    signs = np.sign((actual * expected).sum(axis=0))
    np.testing.assert_allclose(actual * signs, expected, rtol=1e-6, atol=1e-6)


def test_one_and_two_dimensions_are_a_plane_already():
    means = np.random.default_rng(0).normal(size=(9, 2))
    np.testing.assert_array_equal(plane(means), means)
    np.testing.assert_array_equal(plane(means[:, :1]), means[:, :1] * [1, 0])


def test_the_map_has_a_colour_for_each_label(tmp_path):
    means = np.random.default_rng(0).normal(size=(200, 3))
    for name, labels in {
        "none": None,
        "two": (np.arange(200) % 2).astype(str),
        "many": np.arange(200).astype(str),
    }.items():
        draw_latent_map(tmp_path / f"{name}.png", means, labels)
    orange, blue = (213, 94, 0), (0, 114, 178)
    assert blue in colours(tmp_path / "none.png")
    assert orange not in colours(tmp_path / "none.png")
    assert {blue, orange} <= colours(tmp_path / "two.png")
    assert len(colours(tmp_path / "many.png")) > 200


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **kw: (kept.append(figure), save(figure, *a, **kw))
    )
    return kept


def test_traversals_change_one_dimension_a_row(tmp_path, drawn):
    """The decoder's output is set to depend on one latent alone: only its row changes."""
    keras.utils.set_random_seed(0)
    vae = VAE(VAEConfig((8, 8, 1), latent_dim=3, filters=(4,), hidden_units=8))
    hidden = vae.decoder.get_layer("hidden")
    kernel = np.zeros((3, 8), np.float32)
    kernel[1] = 5
    hidden.set_weights([kernel, hidden.get_weights()[1]])
    kl = np.array([3.0, 1.0, 2.0])
    draw_traversals(tmp_path / "rows.png", vae, np.zeros(3), kl, spread=np.ones(3))
    (axis,) = drawn[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "0: 3.00 nats",
        "2: 2.00 nats",
        "1: 1.00 nats",
    ]
    assert axis.get_title() == "the 3 of 3 latent dimensions with the most KL"
    pixels = axis.images[0].get_array()[..., 0]
    tile = 48 + 2
    rows = [pixels[2 + tile * row :][:48] for row in range(3)]
    first, last = ([row[:, 2 + tile * column :][:, :48] for row in rows] for column in (0, 10))
    assert [bool(np.any(a != b)) for a, b in zip(first, last, strict=True)] == [False, False, True]


@pytest.mark.parametrize("shape", [(8, 8, 1), (40, 12, 3), (600, 500, 2)])
def test_sheets_fit_a_page_whatever_the_size_of_images(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, (50, *shape), dtype=np.uint8)
    vae = FakeVAE(shape)
    draw_reconstructions(tmp_path / "pairs.png", vae, images)
    draw_samples(tmp_path / "samples.png", vae, seed=0)
    for name in ("pairs", "samples"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert max(picture.size) <= 1_620
            assert min(picture.size) >= 200


class FakeVAE:
    """Grey pictures of a size."""

    def __init__(self, shape):
        self.shape = shape
        self.config = VAEConfig((8, 8, 1), latent_dim=2, filters=(4,), hidden_units=8)

    def __call__(self, images):
        return {"reconstruction": np.full(images.shape, 0.5)}

    def sample(self, noise):
        return np.full((len(noise), *self.shape), 0.5)


def test_images_are_shrunk_to_the_mean_of_areas():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 2), dtype=np.uint8)
    small = shrunk(images, 6)
    expected = images.reshape(3, 4, 2, 6, 2, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(small, expected, atol=1)
    np.testing.assert_array_equal(shrunk(images, 12), images)
    assert shrunk(images / 255, 12).dtype == np.uint8


def test_scores_and_dimensions_are_drawn(tmp_path):
    scores = {"validation": np.random.default_rng(0).normal(size=100), "test": np.ones(1)}
    draw_scores(tmp_path / "scores.png", scores, quantiles(scores["validation"]))
    draw_latent_dimensions(tmp_path / "dimensions.png", np.arange(7.0))
    for name in ("scores", "dimensions"):
        assert len(colours(tmp_path / f"{name}.png")) > 10


@pytest.mark.parametrize("labelled", [True, False])
def test_labels_are_in_the_order_of_the_splits_array(tmp_path, labelled):
    labels = ["cat", "1", None, "1", "dog"] if labelled else [None] * 5
    columns = {
        "split": ["train", "test", "test", "validation", "test"],
        "label": pyarrow.array(labels, pyarrow.string()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "index.parquet")
    read = read_labels(tmp_path, "test")
    if labelled:
        assert read.tolist() == ["1", "none", "dog"]
    else:
        assert read is None
