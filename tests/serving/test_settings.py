import pytest

from vaeflow.errors import ServingError
from vaeflow.serving.settings import hosts_of, read_token


def test_a_token_comes_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    assert read_token(file, "other") == "s3cret"
    assert read_token(None, "other") == "other"
    assert read_token(None, None) == ""


@pytest.mark.parametrize("text", ["", " ", "two words", "naïve", "tab\tbed"])
def test_what_is_no_token_never_means_an_open_server(tmp_path, text):
    file = tmp_path / "token"
    file.write_text(text, encoding="utf-8")
    for path, variable in ((file, None), (None, text)):
        with pytest.raises(ServingError, match="has no token"):
            read_token(path, variable)
    with pytest.raises(ServingError, match="cannot be read"):
        read_token(tmp_path / "none", None)


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("127.0.0.1", [], {"localhost", "127.0.0.1", "[::1]"}),
        ("127.0.0.9", [], {"localhost", "127.0.0.1", "[::1]", "127.0.0.9"}),
        ("LocalHost", [], {"localhost", "127.0.0.1", "[::1]"}),
        ("::1", [], {"localhost", "127.0.0.1", "[::1]"}),
        ("0.0.0.0", [], set()),
        ("models.example", [], set()),
        ("127.0.0.1", ["*"], set()),
        ("0.0.0.0", ["Models.Example"], {"models.example"}),
    ],
)
def test_which_names_a_server_goes_by(host, allowed, expected):
    assert set(hosts_of(host, allowed)) == expected
