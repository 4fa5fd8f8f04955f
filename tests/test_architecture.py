"""The structure that the architecture page draws, held against the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import camkit

PACKAGE = Path(camkit.__file__).parent

# From the ground up: a module imports only from the lines above its own.
FLOORS = [
    {"_modules"},
    {"_checks", "_nested", "_colormaps", "_process", "_random"},
    {"inputs", "layouts", "maps", "targets", "propagation"},
    {"trace"},
    {"positions"},
    {"dryrun", "overlays", "lrp", "deeplift"},
    {"layers"},
    {"tap", "surgery"},
    {"replay", "deployment"},
    {"evidence"},
    {"explainer"},
    {"methods._principal"},
    {
        "methods.cam",
        "methods.gradient",
        "methods.activation",
        "methods.perturbation",
        "methods.relevance",
        "methods.legrad",
        "methods.fullgrad",
        "smoothing",
    },
    {"methods.guided", "dataset"},
    {"methods"},
]


def modules() -> dict[str, Path]:
    paths = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p for p in paths
    }


def imports(path: Path) -> set[str]:
    """The camkit modules that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "camkit":
            inner = (node.module or "").removeprefix("camkit").removeprefix(".")
            names = {f"{inner}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= {name for name in names if name in modules()} or {inner}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("camkit.") for a in node.names if a.name.startswith("camkit.")}
    return found


def test_every_module_has_a_floor() -> None:
    assert set(modules()) == set().union(*FLOORS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_downwards(name: str) -> None:
    floor = next(i for i, names in enumerate(FLOORS) if name in names)
    below = set[str]().union(*FLOORS[:floor])
    assert imports(modules()[name]) <= below


def test_public_names_are_flat_and_documented() -> None:
    assert len(set(camkit.__all__)) == len(camkit.__all__)
    for name in camkit.__all__:
        assert (getattr(camkit, name).__doc__ or "").strip(), name


def test_importing_camkit_does_not_import_torchvision() -> None:
    code = "import sys, camkit; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
