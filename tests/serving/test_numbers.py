"""JSON of numbers beside a parser of any JSON: the same arrays, or a refusal."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from vaeflow.serving import numbers
from vaeflow.serving.refusals import RefusedError

FLOAT, BYTE = np.dtype(np.float32), np.dtype(np.uint8)
SHAPES = arrays_of.array_shapes(min_dims=1, max_dims=5, max_side=5)
FLOATS = arrays_of.arrays(np.float32, SHAPES, elements=st.floats(-9, 9, width=32))
BYTES = arrays_of.arrays(np.uint8, SHAPES)


def read(text: str | bytes, dtype: np.dtype = FLOAT, most: int = 10**6):
    body = text if isinstance(text, bytes) else text.encode()
    rest, found = numbers.parse(body, "images")
    content = json.loads(rest)
    return content, found[content["images"]].read(dtype, "images", most)


@settings(deadline=None)
@given(FLOATS | BYTES, st.sampled_from([None, 1]), st.integers(0, 3))
def test_what_json_writes_is_read(array, indent, before):
    content = {"id": '"images": [1]', **{str(n): ["x", [1]] for n in range(before)}}
    content |= {"images": array.tolist(), "dtype": "any", "end": [[]]}
    rest, found = read(json.dumps(content, indent=indent), array.dtype)
    np.testing.assert_array_equal(found, array)
    assert found.shape == array.shape
    assert {**rest, "images": 0} == {**content, "images": 0}


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), FLOATS | BYTES, max_size=3))
def test_what_is_written_json_reads(arrays):
    assert json.loads(numbers.write(arrays)) == {k: v.tolist() for k, v in arrays.items()}
    for array in arrays.values():
        assert json.loads(numbers.write_flat(array)) == array.ravel().tolist()


def test_more_than_a_piece_is_read_and_written():
    array = np.random.default_rng(0).normal(size=(300, 7, 9, 3)).astype(np.float32)
    assert array.size > numbers.PIECE
    written = numbers.write({"images": array, "flags": array[:, 0, 0, 0] > 0})
    content, found = read(written)
    np.testing.assert_array_equal(found, array)
    assert content["flags"] == (array[:, 0, 0, 0] > 0).tolist()


@pytest.mark.parametrize(
    "images",
    [
        "[1 2]",
        "[1,,2]",
        "[,1]",
        "[1,]",
        "[1[2]]",
        "[[1][2]]",
        "[[1],2]",
        "[[1],[1,2]]",
        "[[],[]]",
        "[1]]",
        "[[1]",
        "[01]",
        "[.5]",
        "[+1]",
        "[1.]",
        "[1e]",
        "[--1]",
        "[true]",
        "[null]",
        '["1"]',
        "[{}]",
        "[NaN]",
        "[Infinity]",
        "[1" + "0" * 400 + "]",
        "[" * 9 + "1" + "]" * 9,
        "[" * 100_000 + "]" * 100_000,
        "[" + " " * 100_000 + "1, " + " " * 100_000 + "]",
    ],
)
def test_what_is_no_list_of_numbers_is_refused(images):
    with pytest.raises(RefusedError) as raised:
        read(f'{{"images": {images}}}')
    assert raised.value.status == 422


@settings(deadline=None, max_examples=500)
@given(st.text(alphabet='[]{}",:0123456789.eE+- \n\\aimges', max_size=60))
def test_any_text_is_refused_or_read_as_json_does(text):
    body = f'{{"images": {text}}}'
    try:
        _, found = read(body)
    except (RefusedError, ValueError, KeyError, TypeError, IndexError):
        return
    expected = np.asarray(json.loads(body)["images"], FLOAT)
    if found.size:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"x": "' + "a" * 100_000 + '"}', 413),
        ("[" + '"",' * 100_000 + "1]", 413),
        ('{"x": [' + "1," * 100_000 + "1]}", 413),
        (" " * 100_000 + "{}", 413),
    ],
)
def test_much_beside_the_numbers_is_refused(text, status):
    with pytest.raises(RefusedError) as raised:
        numbers.parse(text.encode(), "images")
    assert raised.value.status == status


def test_integers_must_fit_and_there_may_be_so_many():
    _, found = read('{"images": [0, 255]}', BYTE)
    assert found.tolist() == [0, 255]
    for images in ("[256]", "[-1]", "[1.0]", "[1e2]"):
        with pytest.raises(RefusedError, match=r"integers 0\.\.255"):
            read(f'{{"images": {images}}}', BYTE)
    read('{"images": [1, 2, 3]}', most=3)
    with pytest.raises(RefusedError, match="4 numbers; one request may have 3"):
        read('{"images": [1, 2, 3, 4]}', most=3)
