"""The table in ``docs/models.md``, compared with a run of every model of torchvision."""

import pytest
import torchvision

from helpers import models_table

SHOWN = [line.split(" | ") for line in models_table.PAGE.read_text().splitlines() if line.startswith("| `")]
ROWS = {cells[0].strip("| `"): "| " + " | ".join(cells).strip("| ") + " |" for cells in SHOWN}
QUICK = [
    "resnet18",
    "lraspp_mobilenet_v3_large",
    "ssdlite320_mobilenet_v3_large",
    "quantized_shufflenet_v2_x0_5",
]


def test_the_page_has_every_model() -> None:
    # Those that torch has renamed or added since the page was written are a reason to write it again.
    assert list(ROWS) == torchvision.models.list_models()


@pytest.mark.filterwarnings("ignore")  # of torchvision's own; camkit's are cells of the table
@pytest.mark.parametrize("name", QUICK)
def test_a_row_of_the_page(name: str) -> None:
    assert "| " + " | ".join(models_table.row(name)) + " |" == ROWS[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torchvision's own; camkit's are cells of the table
@pytest.mark.parametrize("name", [name for name in ROWS if name not in QUICK])
def test_every_row_of_the_page(name: str) -> None:
    test_a_row_of_the_page(name)
