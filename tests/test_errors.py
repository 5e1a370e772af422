import pickle

import pytest
from helpers import free_port, run

from vaeflow.errors import BadImageError, RegistryError, hide_secrets

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"at http://me:{SECRET}@host:5000/api: refused", "at http://***@host:5000/api: refused"),
        (f"postgresql+psycopg2://me:{SECRET}@db/x", "postgresql+psycopg2://***@db/x"),
        (f"https://{SECRET}@github.com/a/b.git", "https://***@github.com/a/b.git"),
        (f"https://h/x?a=1&api_key={SECRET}&b=2", "https://h/x?a=1&api_key=***&b=2"),
        (f"sqlite:///x.db?password={SECRET}", "sqlite:///x.db?password=***"),
        ("models:/digits-vae@champion", "models:/digits-vae@champion"),
        ("http://host/a@b and me@host", "http://host/a@b and me@host"),
    ],
)
def test_an_address_is_shown_without_its_secrets(text, shown):
    assert hide_secrets(text) == shown
    assert str(RegistryError(text)) == shown


def test_a_password_in_the_trackings_address_is_nowhere(workspace, monkeypatch):
    address = f"http://me:{SECRET}@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for command in (
        ["retrain"],
        ["models"],
        ["pull", "models:/a/1", "b"],
        ["retrain", "--verbose"],
    ):
        done = run(workspace, "vaeflow", *command, status=2)
        assert "***@127.0.0.1" in done.stderr
        assert SECRET not in done.stdout + done.stderr
    for path in workspace.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_what_is_wrong_with_an_image_comes_whole_from_another_process():
    error = pickle.loads(pickle.dumps(BadImageError("a.png#3", "cut off.")))
    assert (error.name, error.reason, str(error)) == ("a.png#3", "cut off.", "a.png#3: cut off.")
