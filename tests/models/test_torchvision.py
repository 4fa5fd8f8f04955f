"""Checks docs/models.md, the table of models and methods, by a run of every model."""

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
    # If this fails because torchvision renamed or added models, write the page again.
    assert list(ROWS) == torchvision.models.list_models()


@pytest.mark.filterwarnings("ignore")  # torchvision's warnings; the table shows those of camkit
@pytest.mark.parametrize("name", QUICK)
def test_a_row_of_the_page(name: str) -> None:
    assert "| " + " | ".join(models_table.row(name)) + " |" == ROWS[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torchvision's warnings; the table shows those of camkit
@pytest.mark.parametrize("name", [name for name in ROWS if name not in QUICK])
def test_every_row_of_the_page(name: str) -> None:
    test_a_row_of_the_page(name)
