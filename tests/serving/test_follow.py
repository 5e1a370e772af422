import threading

import httpx
import pytest
from onnx import TensorProto
from onnx import helper as make
from serving_helpers import register_champion, serving, wait_for

from vaeflow.bundle.manifest import MANIFEST, describe_files

pytestmark = pytest.mark.slow  # a real bundle has to be made first


def version(server):
    return httpx.get(f"{server.url}/v2/models/digits-vae").json()["versions"]


def described_anew(folder):
    """What a manifest says of the files of a bundle."""
    described = describe_files(folder)
    del described[MANIFEST]
    return {name: file.model_dump() for name, file in described.items()}


def endless() -> bytes:
    """An encoder that has all the right shapes, and never answers."""
    value, flag = make.make_tensor_value_info, TensorProto.BOOL
    pixels = [TensorProto.FLOAT, ["N", 8, 8, 1]]
    body = make.make_graph(
        [make.make_node("Identity", ["go"], ["on"]), make.make_node("Identity", ["in"], ["out"])],
        "body",
        [value("turn", TensorProto.INT64, []), value("go", flag, []), value("in", *pixels)],
        [value("on", flag, []), value("out", *pixels)],
    )
    nodes = [
        make.make_node("Loop", ["", "true", "images"], ["kept"], body=body),
        make.make_node("Flatten", ["kept"], ["f"]),
        make.make_node("MatMul", ["f", "w"], ["mean"]),
        make.make_node("MatMul", ["f", "w"], ["log_variance"]),
    ]
    graph = make.make_graph(
        nodes,
        "endless",
        [value("images", *pixels)],
        [value(name, TensorProto.FLOAT, ["N", 8]) for name in ("mean", "log_variance")],
        [
            make.make_tensor("w", TensorProto.FLOAT, [64, 8], [0.0] * 512),
            make.make_tensor("true", flag, [], [True]),
        ],
    )
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    return made.SerializeToString()


def test_a_new_champion_takes_over_and_a_bad_one_does_not(bundled):
    assert register_champion(bundled) == "1"
    with serving("models:/digits-vae@champion", bundled.root, "--follow", "1s") as server:
        assert version(server) == ["1"]
        statuses, versions, done = [], [], threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=30) as client:
                while not done.is_set():
                    answer = client.post("/sample")
                    statuses.append(answer.status_code)
                    versions.append(answer.headers["x-model-version"])

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            wait_for(lambda: "1" in versions)
            assert register_champion(bundled, metrics={"elbo": 1.0}) == "2"
            wait_for(lambda: version(server) == ["2"])

            decoder, encoder = (bundled.bundle / name for name in ("decoder.onnx", "encoder.onnx"))
            sound = decoder.read_bytes(), encoder.read_bytes()
            for number, changed, content in (
                ("3", decoder, b"as its manifest says, but no model"),
                ("4", encoder, endless()),
            ):
                decoder.write_bytes(sound[0])
                changed.write_bytes(content)
                files = described_anew(bundled.bundle)
                assert register_champion(bundled, files=files) == number
                refusals = f"vaeflow_refused_models_total {int(number) - 2}.0"
                wait_for(lambda text=refusals: text in httpx.get(f"{server.url}/metrics").text, 120)
                assert version(server) == ["2"]
            encoder.write_bytes(sound[1])
            files = described_anew(bundled.bundle)
            assert register_champion(bundled, files=files, metrics={"elbo": 2.0}) == "5"
            wait_for(lambda: version(server) == ["5"])
        finally:
            done.set()
            asking.join()
        assert "decoder.onnx: not a readable ONNX model" in server.log.read_text()
        assert "did not load and answer within 30 seconds" in server.log.read_text()
        assert set(statuses) == {200}
        assert list(dict.fromkeys(versions)) == ["1", "2", "5"]  # never back
        assert server.stop() == 0
