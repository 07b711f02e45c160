"""Rooms import only from rooms to their left, and inside functions only what is optional."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sui_fast"
ROOMS = [
    ["_errors", "_memory", "_waiting"],
    ["ops"],
    ["jacobians"],
    ["spectra"],
    ["loo"],
    ["measures"],
    ["previews", "review"],
    ["losses", "outputs", "targets", "scores", "showing", "runcard"],
    ["projections"],
    ["aims"],
    ["operations", "processes"],
    ["footprint"],
    ["timing"],
    ["planning"],
    ["checks"],
    ["extremes", "probing", "streaming"],
    ["parts"],
    ["runs"],
    ["scoring", "training"],
    ["merging"],
    ["apps"],
    ["report", "compat"],
    ["demo", "doctor"],
    ["demo_text"],
    ["cli"],
    ["__init__", "__main__"],
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
INSIDE = {  # drawn only when asked for; optional packages
    ("scores", "report"),
    ("apps", "matplotlib"),
    ("demo", "sklearn"),
    ("report", "PIL"),
    ("report", "matplotlib"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path, node):
    """Rooms that a relative or absolute import of our own package reaches."""
    if isinstance(node, ast.Import):
        return [name.name.split(".")[1] for name in node.names if name.name.startswith("sui_fast.")]
    base = list(path.relative_to(PACKAGE).parts[: -node.level]) if node.level else None
    if base is None:
        parts = (node.module or "").split(".")
        if parts[0] != "sui_fast":
            return []
        base = parts[1:]
    elif node.module:
        base = base + node.module.split(".")
    return [base[0]] if base else [name.name for name in node.names if name.name in RANK]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_left(path):
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body)) | {id(n) for b in tree.body if isinstance(b, ast.If | ast.Try) for n in ast.walk(b)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in imported_rooms(path, node):
                if id(node) in top:
                    assert target == room(path) or RANK[target] < RANK[room(path)], f"{path}:{node.lineno} -> {target}"
                else:
                    assert (room(path), target) in INSIDE, f"{path}:{node.lineno} imports {target} inside a function"
            if id(node) not in top and isinstance(node, ast.ImportFrom) and not node.level:
                assert (room(path), node.module.split(".")[0]) in INSIDE, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_room_is_known_and_files_stay_short(path):
    assert room(path) in RANK
    assert len(path.read_text().splitlines()) <= 440


def test_import_loads_neither_triton_nor_cupy():
    code = "import sys, sui_fast; print([m for m in sys.modules if m.split('.')[0] in ('triton', 'cupy')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_documented():
    import sui_fast

    for name in sui_fast.__all__:
        assert getattr(sui_fast, name).__doc__, name
