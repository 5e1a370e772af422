"""The documentation: complete, and true to the code, the results, and itself."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from helpers import REPOSITORY, SAMPLE
from ruamel.yaml import YAML

from vaeflow.cli import app
from vaeflow.config.schema import Parameters

DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "SECURITY.md",
    *sorted(DOCS.rglob("*.md")),
]
RESULTS = REPOSITORY / "benchmarks" / "results"
PROJECTS = REPOSITORY / "src" / "vaeflow" / "project" / "template" / "Makefile.jinja"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(kind: str) -> list[tuple[Path, str]]:
    return [
        (page, body) for page in PAGES for name, body in BLOCK.findall(text(page)) if name == kind
    ]


# === Reference ===


def test_every_parameter_is_documented_with_its_default_and_no_other():
    rows = re.findall(
        r"^\| `([\w.]+)` \| `(.*?)` \| (.+?) \| (.+?) \|$",
        text(DOCS / "reference" / "parameters.md"),
        re.MULTILINE,
    )
    documented = {key: default for key, default, _, _ in rows}
    expected = {
        key: json.dumps(value) if isinstance(value, list) else str(value)
        for key, value in Parameters().flat().items()
    }
    assert documented == expected


def test_the_shipped_parameters_are_all_there_are():
    shipped = YAML(typ="safe").load(SAMPLE / "params.yaml")
    keys = {f"{section}.{key}" for section, values in shipped.items() for key in values}
    assert keys == set(Parameters().flat())


def test_the_page_of_commands_is_what_help_says():
    """Made by `make docs`."""
    command = [sys.executable, "-m", "typer", "vaeflow.cli", "utils", "docs", "--name", "vaeflow"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text(DOCS / "reference" / "cli.md") == made.replace("# `vaeflow`", "# Commands", 1)


def test_every_page_is_in_the_sites_menu():
    def pages(menu):
        for entry in menu:
            for target in entry.values():
                yield from pages(target) if isinstance(target, list) else [target]

    settings = tomllib.loads(text(REPOSITORY / "zensical.toml"))
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(pages(settings["project"]["nav"])) == sorted(there)


# === Links, commands, code ===


def anchor_of(title: str) -> str:
    return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            if not file.exists():
                broken.append(f"{page.name}: {target}")
            elif anchor:
                titles = re.findall(r"^#+ (.*)$", text(file), re.MULTILINE)
                if anchor not in {
                    re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles
                }:
                    broken.append(f"{page.name}: {target}")
    assert not broken


def lines_of(body: str) -> list[list[str]]:
    """The commands of a shell block, as words; what `vaeflow` needs before it is left out."""
    joined = body.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def check_command(words: list[str]) -> str | None:
    """What the command line says is wrong with a command of `vaeflow`."""
    command = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        command.make_context(command.name, list(rest)).close()
    except Exception as error:  # of the library that Typer brings along
        return getattr(error, "message", "") or str(error)
    return None


def test_commands_and_targets_exist():
    def targets_of(page: Path) -> set[str]:
        """Those of the Makefile of a project, in the tutorial; else of this repository's."""
        makefile = PROJECTS if page.name == "tutorial.md" else REPOSITORY / "Makefile"
        return set(re.findall(r"^([a-z-]+):", text(makefile), re.MULTILINE))

    wrong, seen = [], 0
    for page, body in blocks("sh"):
        targets = targets_of(page) | {"release"}
        for words in lines_of(body):
            while "=" in words[0]:  # a variable for this one command
                words = words[1:]
            if words[0] == "vaeflow":
                seen += 1
                if problem := check_command(words):
                    wrong.append(f"{page.name}: {' '.join(words)}: {problem}")
            elif words[0] == "make":
                seen += 1
                asked = [word for word in words[1:] if "=" not in word]
                wrong += [
                    f"{page.name}: make {target}" for target in asked if target not in targets
                ]
    for page in PAGES:  # in a sentence, too
        targets = targets_of(page) | {"release"}
        for target in re.findall(r"`make ([a-z-]+)", text(page)):
            if target not in targets:
                wrong.append(f"{page.name}: make {target}")
    assert not wrong
    assert seen > 30


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("vaeflow trane", "no command trane"),
        ("vaeflow retrain --sett train.epochs=3", "No such option: --sett"),
        ("vaeflow drift outputs/scores.parquet --model m", "Missing parameter: out"),
        ("vaeflow drift --model m --out drift.json", "Missing parameter: scores"),
        ("vaeflow sample --model m --out s.png -c 64", "No such option: -c"),
        ("vaeflow sample --model m --out s.png --count many", "valid integer"),
    ],
)
def test_a_wrong_command_is_seen(words, problem):
    assert problem in check_command(words.split())


def test_python_blocks_are_python():
    found = blocks("python")
    for _, body in found:
        ast.parse(body)
    assert len(found) >= 3


# === Tables ===


def cells(page: Path, first: str) -> list[str]:
    """The row of a page's tables that begins with a cell."""
    (row,) = re.findall(rf"^\| {re.escape(first)} \| (.*) \|$", text(page), re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def results(name: str):
    return json.loads(text(RESULTS / f"{name}.json"))


def speed(name: str, batch_size: int) -> str:
    (found,) = (
        entry["images_per_second"]
        for entry in results("train")
        if entry["name"] == name
        and entry.get("batch_size") == batch_size
        and "images_per_second" in entry
    )
    return f"{found:,}"


def nats(name: str) -> str:
    (entry,) = (entry for entry in results("mnist_likelihood") if entry["name"] == name)
    kind = "estimated_" if "estimated_nll" in entry else ""
    return f"{entry[f'{kind}nll']:.1f} ± {entry[f'{kind}standard_error']:.1f}"


def test_the_main_jobs_take_what_their_results_say():
    page = DOCS / "explanation" / "benchmarks.md"
    seconds = {entry["name"]: entry["seconds"] for entry in results("main_job")}
    for name, took in seconds.items():
        assert cells(page, name) == [f"{took:.1f}"]
    whole = seconds["vaeflow init, to the champion of 1,000 images"]
    assert f"take {whole:.0f} s, to the champion" in text(REPOSITORY / "README.md")


def test_the_readmes_table_is_that_of_the_results():
    readme = REPOSITORY / "README.md"
    ours = [nats("vaeflow"), speed("vaeflow", 512)]
    assert cells(readme, "vaeflow, `presets/mnist.yaml`") == ours
    assert cells(readme, "PyTorch's example VAE") == [nats("pytorch-examples-vae"), ""]
    theirs = [nats("keras-io-vae"), speed("keras-io", 512)]
    assert cells(readme, "keras.io's example VAE") == theirs
    compiled = ["", speed("torch-compile", 512)]
    assert cells(readme, "the same network in PyTorch, `torch.compile`") == compiled


def test_the_tables_of_benchmarks_are_those_of_the_results():
    page = DOCS / "explanation" / "benchmarks.md"
    for label, name in (
        ("vaeflow, `presets/mnist.yaml`, 150 epochs", "vaeflow"),
        ("vaeflow, `presets/mnist-flow.yaml`, 60 epochs instead of 150", "vaeflow-flow"),
        (
            "the same for 20 epochs, training images drawn black and white only once",
            "vaeflow-flow-fixed",
        ),
        ("PyTorch's example VAE (dense layers, 20 latent dimensions)", "pytorch-examples-vae"),
        ("keras.io's example VAE (two latent dimensions)", "keras-io-vae"),
        ("pythae's VAE, with its convolutional network", "pythae-vae"),
        ("pythae's importance-weighted VAE, with the same", "pythae-iwae"),
    ):
        assert cells(page, label)[0] == nats(name)
    until = {
        entry["name"]: f"{entry['seconds']:.0f} s"
        for entry in results("train")
        if "until_nats" in entry
    }
    for label, name in (
        ("vaeflow", "vaeflow"),
        ("keras.io's example with that network", "keras-io"),
        ("PyTorch", "torch-eager"),
        ("PyTorch, `torch.compile`", "torch-compile"),
    ):
        assert cells(page, label) == [speed(name, 128), speed(name, 512), until[name]]


def test_what_auto_chooses_is_as_far_from_the_best_as_the_search_says():
    """Both after as many epochs as `auto` chooses, the last rung."""
    page = DOCS / "explanation" / "benchmarks.md"
    last = [trial for trial in results("search") if trial["rung"] is None]
    for label, name in (
        ("8x8 digits", "digits"),
        ("MNIST, grey", "mnist"),
        ("photographs, grey, 28x28", "grey"),
        ("photographs, colour, 64x64", "colour"),
    ):
        trials = [trial for trial in last if trial["set"] == name]
        (auto,) = (-trial["bound"] for trial in trials if not trial["changes"])
        best = min(-trial["bound"] for trial in trials)
        assert len(trials) > 1
        apart = f"{100 * (auto - best) / best:.1f} %"
        assert cells(page, label)[:3] == [f"{auto:,.1f}", f"{best:,.1f}", apart]


def test_the_presets_table_has_all_trials_of_its_search():
    page = DOCS / "explanation" / "benchmarks.md"
    found = {
        json.dumps(trial["changes"]): f"{-trial['bound']:.1f}"
        for trial in results("search")
        if trial["set"] == "mnist-binarized"
    }
    labels = {
        "learned prior, 16 couplings": {"prior": "flow", "prior_couplings": 16},
        "learned prior": {"prior": "flow"},
        "learned prior, twice the filters": {"prior": "flow", "filters": [64, 128]},
        "half the batch": {"batch_size": 64},
        "twice the filters": {"filters": [64, 128]},
        "the preset": {},
        "two layers at each size": {"depth": 2},
        "residual network, a quarter of the hidden units": {
            "network": "residual",
            "hidden_units": 256,
        },
        "half the latent dimensions": {"latent_dim": 20},
        "a quarter of the hidden units": {"hidden_units": 256},
        "twice the batch, `learning_rate` 0.003": {"batch_size": 256, "learning_rate": 0.003},
        "`learning_rate` 0.001": {"learning_rate": 0.001},
    }
    for label, changes in labels.items():
        assert cells(page, label) == [found.pop(json.dumps(changes))]
    assert not found


def test_the_table_of_serving_is_that_of_the_results():
    page = text(DOCS / "explanation" / "benchmarks.md")
    servers = ("bare", "vaeflow", "mlserver", "litserve", "mlflow")

    def milliseconds(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value < 1 else f"{value:.1f}"

    for network, values in results("serve")["networks"].items():
        rows = []
        for count in ("1", "32", "256"):
            label = f"`presets/{network}.yaml`, 1 image" if count == "1" else f"{count} images"
            latency = [values["latency_ms"][count][server]["p50"] for server in servers]
            rows.append(" | ".join([f"| {label}", *map(milliseconds, latency)]) + " |")
        rates = values["images_per_second"]
        ours = [rates["batched"], *(rates[server] for server in servers[2:])]
        cells_of = " | ".join(f"{rate:,}" for rate in ours)
        rows.append(f"| 32 clients of 1 image, images/s | | {cells_of} |")
        assert "\n".join(rows) in page


def test_the_table_of_anomalies_is_that_of_the_results():
    """And what it shows is what was asked for, on the photographs."""
    page = DOCS / "explanation" / "benchmarks.md"
    sets = [entry for entry in results("anomalies") if entry["part"] == "spoilt"]
    ours, score = "all statistics, weight 100", "minus the ELBO"
    for kind in sets[0]["auroc"]:
        areas = [entry["auroc"][kind] for entry in sets]
        assert cells(page, kind) == [
            f"{area[what]:.3f}" for area in areas for what in (ours, score)
        ]
    means = [f"{entry['mean'][what]:.3f}" for entry in sets for what in (ours, score)]
    assert cells(page, "mean") == means
    for entry in sets:
        for rate, alarms in entry["false_alarms"].items():
            assert alarms["mean"] <= float(rate) + 2 * alarms["standard_error"]


def test_the_page_on_gpus_is_that_of_the_results():
    """Also what no card has measured yet is empty there."""
    entries = results("gpu")
    paper = [entry for entry in entries if entry["part"] == "paper"]
    cards = [entry for entry in entries if entry["device"].startswith("GPU")]
    page = text(DOCS / "explanation" / "gpu.md")
    assert ("No card has been measured yet" in page) == (not cards)
    assert len(paper) == 8
    for entry in paper:
        arithmetic = entry["precision"].removeprefix("mixed_")
        first = f"| {entry['network']}, {entry['batch_size']:,}, {arithmetic} |"
        row = (
            f"{first} {entry['operations_per_image'] / 1e6:,.0f} "
            f"| {entry['bytes_per_image'] / 1e3:,.0f} | {entry['xla_bytes_per_image'] / 1e3:,.0f} "
            f"| {entry['limit_images_per_second']:,} | {entry['bounded_by']} |"
        )
        assert row in page
        key = ("network", "batch_size", "precision")
        measured = {
            other["name"]: other
            for other in reversed(cards)  # several cards: the first
            if other["part"] == "rates" and all(other[name] == entry[name] for name in key)
        }
        rates = [
            measured.get(name, {}).get("images_per_second")
            for name in ("vaeflow", "jax-plain", "torch-compile", "torch-eager")
        ]
        found = [f"{rate:,}" if rate else "-" for rate in rates]
        share = measured.get("vaeflow", {}).get("share_of_limit", "-")
        assert f"{first} {' | '.join(found)} | {share} |" in page
        # XLA counts the same operations as we do.
        counted = entry["xla_operations_per_image"] / entry["operations_per_image"]
        assert abs(counted - 1) < 0.08
