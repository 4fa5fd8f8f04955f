"""Sphinx."""

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
napoleon_custom_sections = [("Departs from the paper", "returns_style")]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Other projects' names: their inventories are on the network, which a build must not need.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|np|numpy|PIL|Image|os|collections|typing|abc)(\..*)?"),
    (r"py:.*", r"(Tensor|Any|Path|PathLike|Sequence|Callable|Self|Literal|optional|ABC|NamedTuple)"),
    (r"py:class", r"(int|str|float|bool|tuple|dict|list|type|object|None|BaseException|TracebackType)"),
    (r"py:exc", r"(ValueError|TypeError|ImportError|NotImplementedError)"),
    (r"py:class", r"camkit\.layers\.location\.Location"),  # of Evidence, and not for users
]
doctest_global_setup = "import torch; torch.manual_seed(0)"


class MethodTable(SphinxDirective):
    """The table of all methods, read off the registry when the documentation is built."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()  # what it shows is in the code, and not in the page
        rows = ["* - method, paper\n  - map, passes\n  - gradient"]
        for name, method in camkit.METHODS.items():
            title = f"{{class}}`~camkit.{name}`\n\n    {method.paper}"
            formula = f"${method.formula}$\n\n    {method.passes}"
            rows.append(f"* - {title}\n  - {formula}\n  - {'yes' if method.needs_gradient else 'no'}")
        return self.parse_text_to_nodes("\n".join(["```{list-table}", ":header-rows: 1", "", *rows, "```"]))


def setup(app: Sphinx) -> None:
    app.add_directive("method-table", MethodTable)
