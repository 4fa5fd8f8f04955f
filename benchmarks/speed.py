"""Measures the cost of explanations by camkit, pytorch-grad-cam, torchcam and captum.

Most costs are relative to one forward pass of the same network.

``python benchmarks/speed.py`` measures all sections and writes ``results.json``. From this file it makes
``TABLES.md`` and the plot ``results.png``. The options ``--only``, ``--models`` and ``--batches`` select
measurements; the results of all others are kept. ``--only`` without a section measures nothing and writes the
tables again. The script needs grad-cam, torchcam, captum and matplotlib.
"""

import argparse
import datetime
import os
from pathlib import Path

MODELS = ("resnet18", "resnet50", "vgg16", "alexnet", "densenet121", "efficientnet_b0", "vit_b_16", "swin_t")
SECTIONS = ("one-pass", "accelerator", "many-passes", "overlays", "import", "dataset")


def parse_arguments() -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8), metavar="N")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    return parser.parse_args()


def main() -> None:
    """Runs the measurements, saves the results after each race, and writes the tables at the end."""
    given = parse_arguments()
    # Let waiting threads sleep. Otherwise they spin, and while other processes run, that takes more CPU time
    # than the measured work. torch reads this variable at its import, so set it before the imports below.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import report
    import results
    import sections

    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / "results.json"
    found = results.load(path)
    measured = {"date": datetime.date.today().isoformat(), "environment": sections.describe_environment()}
    for section in given.only:
        for name, race in sections.SECTIONS[section](given):
            found.setdefault(section, {})[name] = race | measured
            print(f"{section}: {name}", flush=True)
            results.save(found, path)
    report.write(results.load(path), given.output)


if __name__ == "__main__":
    main()
