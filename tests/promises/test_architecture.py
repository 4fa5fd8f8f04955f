"""Checks the imports of the package against the floors and rooms of the architecture page."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import camkit

PACKAGE = Path(camkit.__file__).parent

# A room is a folder or a single file of the package; the lowest floor comes first. A file may import from all
# rooms on lower floors, and from the files of its own room that are listed before it. An ``__init__.py`` may
# import every file of its room.
FLOORS: list[dict[str, list[str]]] = [
    {"_tools": ["checks", "nested", "noise", "colormaps"], "functions": []},
    {
        "maps": [],
        "targets": ["binding", "classes", "outputs"],
        "model": ["modules", "inputs", "standin", "state"],
    },
    {
        "layers": ["layouts", "trace", "tokens", "dryrun", "location", "attention", "head", "search"],
        "backward": ["gradients", "propagation", "lrp", "deeplift"],
        "overlays": [],
    },
    {"passes": ["tap", "replay", "attention", "biases", "evidence"], "surgery": []},
    {
        "methods": [
            *("base", "explainer", "smoothing", "principal", "activation", "cam", "gradient", "guided"),
            *("perturbation", "relevance", "fullgrad", "legrad"),
        ],
        "deployment": [],
    },
    {"dataset": ["files", "loader", "manifest", "processes", "job"]},
]
ROOMS = {room: files for floor in FLOORS for room, files in floor.items()}
LONGEST = 350  # lines in a file
# One family of methods stays together in one file, although that file is longer.
MAY_BE_LONGER = {"methods.perturbation"}
MOST_ENTRIES = 15


def files() -> dict[str, Path]:
    """Every file of the package by its dotted name; an ``__init__.py`` has the name of its folder."""
    paths = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p for p in paths
    }


def imports(path: Path) -> set[str]:
    """The camkit files that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "camkit":
            inner = (node.module or "").removeprefix("camkit").removeprefix(".")
            names = {f"{inner}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= {name for name in names if name in files()} or {inner}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("camkit.") for a in node.names if a.name.startswith("camkit.")}
    return found


def allowed(name: str) -> set[str]:
    """The files that a file may import."""
    room, _, file = name.partition(".")
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    below = {lower for rooms in FLOORS[:floor] for lower in rooms}
    neighbours = ROOMS[room][: ROOMS[room].index(file)] if file else ROOMS[room]
    return {n for n in files() if n.partition(".")[0] in below} | {f"{room}.{n}" for n in neighbours}


def test_every_file_has_its_room() -> None:
    listed = {f"{room}.{file}" if file else room for room, files in ROOMS.items() for file in ("", *files)}
    assert set(files()) == listed


@pytest.mark.parametrize("name", sorted(files()))
def test_imports_go_downwards(name: str) -> None:
    assert imports(files()[name]) <= allowed(name)


@pytest.mark.parametrize("name", sorted(files()))
def test_no_file_is_too_long(name: str) -> None:
    assert len(files()[name].read_text().splitlines()) <= LONGEST or name in MAY_BE_LONGER


def test_every_file_has_its_tests_and_every_test_file_its_source() -> None:
    """``tests/unit`` mirrors the package: ``model/state.py`` is tested in ``unit/model/test_state.py``."""
    sources = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    unit = Path(__file__).parents[1] / "unit"
    tests = {path.relative_to(unit) for path in unit.rglob("*.py")}
    assert tests == {path.with_name(f"test_{path.name}") for path in sources}


def test_the_root_has_few_entries() -> None:
    assert len([p for p in PACKAGE.iterdir() if p.name not in ("__pycache__", "py.typed")]) <= MOST_ENTRIES


def test_public_names_are_flat_and_documented() -> None:
    assert len(set(camkit.__all__)) == len(camkit.__all__)
    for name in camkit.__all__:
        assert (getattr(camkit, name).__doc__ or "").strip(), name


def test_importing_camkit_does_not_import_torchvision() -> None:
    code = "import sys, camkit; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_classes_live_in_camkit() -> None:
    public = [getattr(camkit, name) for name in camkit.__all__]
    classes = [value for value in public if isinstance(value, type)]
    assert len(classes) > 30
    for kind in classes:
        assert kind.__module__ == "camkit"
        assert pickle.loads(pickle.dumps(kind)) is kind
    # A pickled object names its class by the public name, not by the file that defines it.
    pickled = pickle.dumps(camkit.Layout(-1, (2, 3)))
    assert b"camkit\x94" in pickled
    assert b"layouts" not in pickled
