"""The configuration of Sphinx, and the parts of the documentation that are generated from the code."""

import inspect
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import camkit

project = "camkit"
author = "The camkit authors"
copyright = "2026, the camkit authors"
release = version = camkit.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"camkit {version}"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 2
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_type_aliases = {"ImageLike": "camkit.overlays.ImageLike", "Target": "camkit.targets.Target"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Names of other projects. Links to them would need their inventories, and so the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|np|numpy|PIL|Image|os|collections|typing|abc)(\..*)?"),
    (r"py:.*", r"(Tensor|Any|Path|PathLike|Sequence|Callable|Self|Literal|optional|ABC|NamedTuple)"),
    (r"py:class", r"(int|str|float|bool|tuple|dict|list|type|object|None|BaseException|TracebackType)"),
    (r"py:exc", r"(ValueError|TypeError|ImportError|NotImplementedError)"),
    # Types of attributes of Evidence that have no page, because only camkit makes objects of them.
    (r"py:class", r"camkit\.layers\.location\.Location|camkit\.targets\.binding\.Scores"),
]
doctest_global_setup = "import torch; torch.manual_seed(0)"


def equations_of(method: type[camkit.Method]) -> list[str]:
    """Returns the equations of a method's formula one by one, because a line has no room for several."""
    return [equation.strip(", ") for equation in method.formula.split(r"\qquad")]


class MethodTable(SphinxDirective):
    """The table of all methods, generated from ``camkit.METHODS``."""

    def run(self) -> list[nodes.Node]:
        # Sphinx rebuilds a page when its source changes. This table changes with the code instead.
        self.env.note_reread()
        rows = ["* - method, paper\n  - map, passes\n  - gradient"]
        for name, method in camkit.METHODS.items():
            title = f"{{class}}`~camkit.{name}`\n\n    {method.paper}"
            lines = [*(f"${equation}$" for equation in equations_of(method)), method.passes]
            formula = "\n\n    ".join(lines)
            rows.append(f"* - {title}\n  - {formula}\n  - {'yes' if method.needs_gradient else 'no'}")
        return self.parse_text_to_nodes("\n".join(["```{list-table}", ":header-rows: 1", "", *rows, "```"]))


def insert_formula(app: Sphinx, what: str, name: str, obj: Any, options: object, lines: list[str]) -> None:
    """Inserts the formula of a method after the first paragraph of its docstring."""
    if what == "class" and obj in camkit.METHODS.values():
        formula = r"\begin{gather*}" + r" \\ ".join(equations_of(obj)) + r"\end{gather*}"
        end = lines.index("")
        lines[end:end] = ["", ".. math::", "   :nowrap:", "", f"   {formula}"]


def find_source(app: Sphinx, module: str, attribute: str) -> str | None:
    """Returns the module whose file defines a public class; the class itself says that it lives in camkit."""
    kind = vars(camkit).get(attribute.partition(".")[0])
    if module != "camkit" or not isinstance(kind, type):
        return None
    homes = (f.__module__ for f in vars(kind).values() if inspect.isfunction(f))
    return next((home for home in homes if home and home.startswith("camkit.")), None)


def setup(app: Sphinx) -> None:
    app.add_directive("method-table", MethodTable)
    app.connect("autodoc-process-docstring", insert_formula)
    # Links to the source code, by the extension sphinx.ext.viewcode.
    app.connect("viewcode-follow-imported", find_source)
