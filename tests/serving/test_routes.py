import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from serving_helpers import npy

import vaeflow

pytestmark = pytest.mark.slow  # a real bundle has to be made first

NPY = "application/x-npy"


@pytest.fixture(scope="module")
def model(finished):
    return vaeflow.load(finished / "outputs" / "bundle")


def picture(image, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format=kind)
    return stream.getvalue()


def post(client, path, body, kind=NPY, accept=NPY, **options):
    headers = {"Content-Type": kind, "Accept": accept}
    return client.post(path, content=body, headers=headers, **options)


def array(answer):
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))


def test_arrays_are_answered_as_the_bundle_does(client, model, digits):
    images = digits[:20]
    mean, log_variance = model.encode(images)
    np.testing.assert_allclose(array(post(client, "/encode", npy(images))), mean, atol=1e-5)
    answer = post(client, "/encode", npy(images), accept="application/json").json()
    np.testing.assert_allclose(answer["log_variance"], log_variance, atol=1e-5)
    np.testing.assert_allclose(
        array(post(client, "/decode", npy(mean))), model.decode(mean), atol=1e-5
    )
    np.testing.assert_allclose(
        array(post(client, "/reconstruct", npy(images))), model.reconstruct(images), atol=1e-5
    )
    scores = model.score(images, samples=4, seed=3)
    answer = post(client, "/score?samples=4&seed=3", npy(images), accept="*/*").json()
    np.testing.assert_allclose(answer["score"], scores, rtol=1e-4)
    np.testing.assert_allclose(answer["percentile"], 100 * model.score_rank(scores), atol=0.1)
    sampled = client.post("/sample?count=3&seed=5", headers={"Accept": NPY})
    np.testing.assert_allclose(array(sampled), model.sample(3, 5), atol=1e-5)


def test_pixels_are_drawn_alike_however_many_ask_at_once(client, model):
    def ask(_):
        return array(client.post("/sample?count=3&seed=5&pixels=true", headers={"Accept": NPY}))

    expected = model.sample(3, 5, pixels=True)
    assert set(np.unique(expected)) <= {0, 1}  # black or white, as its likelihood has it
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(ask, range(40)):
            np.testing.assert_array_equal(found, expected)


def test_alarms_go_with_the_score(client, model, digits):
    images = np.concatenate([digits[:20], 255 - digits[:5]])
    expected = model.detect(images, maps=True)
    answer = post(client, "/score?map=true", npy(images), accept="*/*").json()
    names = {"score", "percentile", "anomaly", "p_value", "anomalous", "anomaly_map"}
    assert set(answer) == names
    np.testing.assert_allclose(answer["anomaly"], expected.anomaly, rtol=1e-3)
    np.testing.assert_allclose(answer["p_value"], expected.p_value, atol=0.02)
    assert answer["anomalous"] == expected.anomalous.tolist()
    assert all(answer["anomalous"][20:])
    np.testing.assert_allclose(answer["anomaly_map"], expected.maps, atol=0.02)
    assert set(post(client, "/score", npy(images), accept="*/*").json()) == names - {"anomaly_map"}
    # It was calibrated with the default draws; of others there is the score alone.
    other = post(client, "/score?samples=4", npy(images), accept="*/*").json()
    assert set(other) == {"score", "percentile"}
    refused = post(client, "/score?seed=4&map=true", npy(images))
    assert refused.status_code == 422
    assert refused.json() == {"error": "map: it is of the default draws only.", "field": "map"}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f4", "<f8", "<f2"])
def test_every_layout_of_an_array_is_read(client, model, digits, dtype, order):
    images = digits[:5] if dtype == "u1" else digits[:5] / 255
    sent = np.asarray(images, dtype=dtype, order=order)
    expected = model.encode(digits[:5]).mean
    np.testing.assert_allclose(array(post(client, "/encode", npy(sent))), expected, atol=1e-2)


def test_pictures_and_json_are_the_same_as_arrays(client, model, digits):
    expected = model.encode(digits[:1]).mean
    grey = digits[0, ..., 0]
    for image in (grey, np.stack([grey] * 3, axis=-1)):
        got = array(post(client, "/encode", picture(image), "image/png"))
        np.testing.assert_allclose(got, expected, atol=1e-5)
    jpeg = array(post(client, "/encode", picture(grey, "JPEG"), "image/jpeg"))
    assert jpeg.shape == expected.shape
    for images, dtype in (
        (digits[:1].tolist(), "uint8"),
        ((digits[:1] / 255).tolist(), "float32"),
    ):
        body = json.dumps({"images": images, "dtype": dtype})
        got = array(post(client, "/encode", body, "application/json; charset=utf-8"))
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_images_are_answered_as_png(client, model, digits):
    answer = post(client, "/reconstruct", npy(digits[:1]), accept="text/html, image/png;q=0.5")
    assert answer.headers["content-type"] == "image/png"
    pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
    np.testing.assert_allclose(pixels, 255 * model.reconstruct(digits[:1])[0, ..., 0], atol=0.51)
    sheet = Image.open(
        io.BytesIO(post(client, "/reconstruct", npy(digits[:9]), accept="image/*").content)
    )
    assert sheet.size == (3 * 50 + 2, 3 * 50 + 2)
    assert post(client, "/encode", npy(digits[:1]), accept="image/png").status_code == 406


def test_an_answer_names_its_version(client, digits, finished):
    from vaeflow.bundle.manifest import bundle_sha256

    answer = post(client, "/encode", npy(digits[:1]))
    expected = bundle_sha256(finished / "outputs" / "bundle")[:12]
    assert answer.headers["x-model-version"] == expected
    assert f'version="{expected}"' in client.get("/metrics").text


def nan(images):
    images = images.astype(np.float32) / 255
    images[0, 0, 0, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        (nan, 422, "NaN"),
        (lambda images: images.astype(np.float32), 422, "scale them"),
        (lambda images: images.astype(np.int64), 422, "int64"),
        (lambda images: images[:, :7], 422, "(8, 8, 1)"),
        (lambda images: images[:0], 422, "no images"),
        (lambda images: np.repeat(images, 600, axis=0), 413, "1024"),
    ],
)
def test_wrong_arrays_are_refused_and_the_field_named(client, digits, change, status, named):
    answer = post(client, "/encode", npy(change(digits[:2])))
    assert answer.status_code == status
    assert named in answer.json()["error"]
    assert answer.json()["field"]


def test_a_pickle_or_a_header_that_promises_more_is_refused(client, digits):
    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    for body in (
        stream.getvalue(),
        npy(digits[:2])[:-1],
        npy(digits[:2]) + b"x",
        b"",
        b"\x93NUMPY",
    ):
        answer = post(client, "/encode", body)
        assert (answer.status_code, answer.json()["field"]) == (422, "images")


def test_a_bomb_is_refused_from_its_header(client):
    bomb = picture(np.zeros((9000, 9000), np.uint8))
    assert len(bomb) < 200_000
    answer = post(client, "/encode", bomb, "image/png")
    assert answer.status_code == 422
    assert "9000" in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{}",
        '{"images": null}',
        '{"images": [[["1"]]]}',
        '{"images": [[[NaN]]]}',
        '{"images": [[[1], [1, 2]]]}',
        '{"images": ' + "[" * 10_000 + "]" * 10_000 + "}",
        '{"images": [[[[1' + "0" * 400 + "]]]]}",
    ],
)
def test_wrong_json_is_refused(client, body):
    assert post(client, "/encode", body, "application/json").status_code == 422


def test_other_types_and_too_large_bodies_are_refused(client):
    assert post(client, "/encode", b"x", "text/plain").status_code == 415
    large = bytes(1 << 20)
    assert post(client, "/encode", large * 17).status_code == 413
    chunked = (large for _ in range(17))
    assert post(client, "/encode", chunked).status_code == 413
    assert post(client, "/decode", npy(np.full((1, 8), 3e38, np.float32))).status_code in (200, 422)


def infer(client, header, raw=b"", name="digits-vae"):
    content = json.dumps(header).encode()
    headers = {"Inference-Header-Content-Length": str(len(content))} if raw else {}
    return client.post(f"/v2/models/{name}/infer", content=content + raw, headers=headers)


def test_the_inference_protocol_in_json_and_in_binary(client, model, digits):
    images = (digits[:3] / 255).astype(np.float32)
    tensor = {"name": "images", "shape": [3, 8, 8, 1], "datatype": "FP32"}
    mean = model.encode(images).mean
    answer = infer(client, {"id": "7", "inputs": [{**tensor, "data": images.ravel().tolist()}]})
    content = answer.json()
    assert (content["id"], content["model_name"]) == ("7", "digits-vae")
    assert [output["name"] for output in content["outputs"]] == ["mean", "log_variance"]
    np.testing.assert_allclose(content["outputs"][0]["data"], mean.ravel(), atol=1e-5)

    binary = {**tensor, "parameters": {"binary_data_size": images.nbytes}}
    asked = [
        {"name": "score"},
        {"name": "reconstruction", "parameters": {"binary_data": True}},
    ]
    answer = infer(client, {"inputs": [binary], "outputs": asked}, images.tobytes())
    length = int(answer.headers["inference-header-content-length"])
    score, reconstruction = json.loads(answer.content[:length])["outputs"]
    np.testing.assert_allclose(score["data"], model.score(images), rtol=1e-4)
    assert reconstruction["parameters"]["binary_data_size"] == len(answer.content) - length
    got = np.frombuffer(answer.content[length:], "<f4").reshape(reconstruction["shape"])
    np.testing.assert_allclose(got, model.reconstruct(images), atol=1e-5)

    for change in (
        {"shape": [2, 8, 8, 1]},
        {"datatype": "INT64"},
        {"name": "other"},
        {"parameters": {"binary_data_size": 5}},
    ):
        wrong = infer(client, {"inputs": [{**binary, **change}]}, images.tobytes())
        assert wrong.status_code == 422
        assert list(wrong.json()) == ["error"]
        assert wrong.json()["error"].startswith("inputs.0")
    for name in ("other", "digits-vae/infer%0A?", "digits%2Dvae/other"):
        assert infer(client, {"inputs": [binary]}, images.tobytes(), name).status_code == 404
    assert client.get("/v2/models/digits-vae/infer").status_code == 405


def test_the_inference_protocol_gives_alarms_and_maps(client, model, digits):
    images = np.concatenate([digits[:3], 255 - digits[:2]])
    expected = model.detect(images, maps=True)
    tensor = {"name": "images", "shape": images.shape, "datatype": "UINT8"}
    names = ["anomalous", "anomaly_map", "p_value"]
    outputs = [{"name": name, "parameters": {"binary_data": True}} for name in names]
    header = {"inputs": [{**tensor, "data": images.ravel().tolist()}], "outputs": outputs}
    answer = infer(client, header)
    length = int(answer.headers["inference-header-content-length"])
    described = json.loads(answer.content[:length])["outputs"]
    assert [output["datatype"] for output in described] == ["BOOL", "FP32", "FP64"]
    assert [output["shape"] for output in described] == [[5], [5, 8, 8], [5]]
    raw = answer.content[length:]
    np.testing.assert_array_equal(np.frombuffer(raw[:5], bool), expected.anomalous)
    maps = np.frombuffer(raw[5:-40], "<f4").reshape(5, 8, 8)
    np.testing.assert_allclose(maps, expected.maps, atol=0.02)
    np.testing.assert_allclose(np.frombuffer(raw[-40:]), expected.p_value, atol=0.02)
    described = {o["name"]: o for o in client.get("/v2/models/digits-vae").json()["outputs"]}
    assert described["anomalous"] == {"name": "anomalous", "datatype": "BOOL", "shape": [-1]}
    assert described["anomaly_map"]["shape"] == [-1, 8, 8]


def examples(content):
    content = content["application/json"]
    yield from [content["example"]] if "example" in content else []
    yield from (named["value"] for named in content.get("examples", {}).values())


def test_the_examples_of_the_openapi_page_are_true(client):
    """Each example of a request is answered, and the first as the example of an answer says."""
    tried = 0
    version = client.get("/v2/models/digits-vae").json()["versions"][0]
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        path = path.replace("{version}", version)
        described = methods.get("post", {})
        for body in examples(
            described.get("requestBody", {}).get("content", {"application/json": {}})
        ):
            answer = client.post(path.replace("{name}", "digits-vae"), json=body)
            assert answer.status_code == 200, answer.text
            for expected in examples(
                described["responses"]["200"].get("content", {"application/json": {}})
            ):
                assert expected.keys() == answer.json().keys()
                for name, values in expected.items():
                    np.testing.assert_allclose(answer.json()[name], values, atol=0.05, rtol=0.01)
            tried += 1
    assert tried == 8


def test_there_is_a_page_to_walk_in_the_latent_space(client, model):
    first, again = client.get("/explore"), client.get("/explore")
    assert first.status_code == 200
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    assert first.headers["x-model-version"] == client.post("/sample").headers["x-model-version"]
    assert 'id="explorer"' in first.text
    assert model.manifest.name in first.text
    assert again.content == first.content


def test_pages_need_no_other_server(client):
    """`/docs` with all its scripts, and `/`, which points to what there is."""
    page = client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(sources) >= 3
    for source in sources:
        assert client.get(source).status_code == 200, source
    links = re.findall(r'href="([^"]+)"', client.get("/").text)
    assert {"docs", "explore", "metrics"} <= set(links)
    for link in links:
        assert client.get(f"/{link}").status_code == 200, link
