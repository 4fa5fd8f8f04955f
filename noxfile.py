"""The checks of the project: ``python -m nox -s NAME`` runs one, ``python -m nox`` all but ``bench``."""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types", "tests", "docs", "build", "demo"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
POKEMON = "examples/pokemon"


def groups(*names: str) -> list[str]:
    return nox.project.dependency_groups(PYPROJECT, *names)


@nox.session
def demo(session: nox.Session) -> None:
    """Runs the Pokémon experiment on built-in data; arguments go to ``pokemon_cam run``."""
    session.install(".", f"./{POKEMON}")
    session.run("python", "-m", "pokemon_cam", "run", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Runs the quick tests; ``-- -m slow`` runs the slow ones, and ``-- -m ''`` runs all."""
    session.install("-e", ".", "-e", f"./{POKEMON}", *groups("tests"))
    arguments = session.posargs or ["-m", "not slow"]
    # Each test computes with one thread, so that several processes can run at once. With more than four,
    # each holding a large model, memory runs out.
    processes = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    session.run("python", "-m", "pytest", *processes, *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Checks the rules and the format with Ruff."""
    session.install(*groups("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Checks the types of the package, its tests and the example with mypy in strict mode."""
    session.install("-e", ".", "-e", f"./{POKEMON}", *groups("types"))
    session.run("mypy")


@nox.session
def bench(session: nox.Session) -> None:
    """Measures camkit and the peers, which takes an hour; arguments go to ``benchmarks/speed.py``."""
    session.install(".", *groups("bench"))
    session.run("python", "benchmarks/speed.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Builds the documentation with warnings as errors, and runs the examples in the docstrings."""
    session.install("-e", ".", *groups("docs"))
    for builder in ("html", "doctest"):
        session.run("sphinx-build", "-W", "-n", "-q", "-b", builder, "docs", f"docs/_build/{builder}")


@nox.session
def build(session: nox.Session) -> None:
    """Builds and checks the wheel and the source distribution; imports camkit from the installed wheel."""
    session.install(*groups("build"))
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--installer", "uv")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))
    (wheel,) = Path("dist").glob("*.whl")
    session.install(str(wheel))
    here = session.create_tmp()  # outside the repository, so that Python can only import the wheel
    with session.chdir(here):
        session.run("python", "-c", "import camkit; print(camkit.__version__, camkit.__file__)")
