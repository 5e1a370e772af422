"""The rooms of the package, in the order that `docs/explanation/architecture.md` gives."""

import ast
import re
from collections import defaultdict
from pathlib import Path

from helpers import REPOSITORY

PACKAGE = REPOSITORY / "src" / "vaeflow"
PAGE = (REPOSITORY / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def modules() -> dict[str, Path]:
    """Path by name, without the package's own: `model.vae`; the package itself is left out."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__").removesuffix("__init__")] = path
    del found[""], found["__main__"]
    return found


def imports() -> dict[str, set[str]]:
    """What every module imports of the package, wherever in it."""
    paths, found = modules(), defaultdict(set)
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vaeflow."):
                module = node.module.removeprefix("vaeflow.")
                inside = {f"{module}.{alias.name}" for alias in node.names}
                found[name] |= (inside & set(paths)) or {module}
            elif isinstance(node, ast.Import):
                names = (alias.name for alias in node.names)
                found[name] |= {n.removeprefix("vaeflow.") for n in names if "vaeflow." in n}
    return found


def test_a_room_imports_only_from_rooms_before_it():
    order = re.findall(r"^\| `(\w+)` \|", section("The rooms"), re.MULTILINE)
    rooms = {name.split(".")[0] for name in modules()}
    assert rooms == set(order)
    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if order.index(other.split(".")[0]) > order.index(name.split(".")[0])
    ]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    graph, done = imports(), set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_the_stations_are_there():
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE))
    # After its room a file may be named by itself, as in "`data/io/sources.py`, by `arrays.py`".
    known = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    known |= {path.name for path in (PACKAGE / "data" / "io").glob("*.py")}
    known |= {f"pipelines/{path.name}" for path in (REPOSITORY / "pipelines").glob("*.py")}
    assert named - known == set()
    assert "model/objective.py" in named
    for function, path in re.findall(r"`(\w+)` in `([\w/]+\.py)`", PAGE):
        assert f"def {function}(" in (PACKAGE / path).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([\w./-]+)\)", PAGE):
        assert (REPOSITORY / "docs" / "explanation" / link).exists(), link
