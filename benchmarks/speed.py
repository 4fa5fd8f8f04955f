"""camkit beside pytorch-grad-cam, torchcam and captum: what an explanation costs beyond the prediction.

``python benchmarks/speed.py`` measures all sections and writes ``RESULTS.md``, its plot ``results.png`` and
the numbers behind both, ``results.json``. What a run does not measure again (``--only``, ``--models``,
``--batches``) stays as it was. It needs grad-cam, torchcam, captum and matplotlib.
"""

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

MODELS = ("resnet18", "resnet50", "vgg16", "alexnet", "densenet121", "efficientnet_b0", "vit_b_16", "swin_t")
SECTIONS = ("one-pass", "accelerator", "many-passes", "overlays", "import", "dataset")


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8), metavar="N")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    return parser.parse_args()


def main() -> None:
    """Measures, and writes after each row."""
    given = arguments()
    # A thread that waits for another would otherwise spin, which is CPU time too, and more than all the rest
    # while other processes run. It is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import report
    import sections

    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    measured = {"date": datetime.date.today().isoformat(), "environment": sections.environment()}
    for name in given.only:
        for key, row in sections.SECTIONS[name](given):
            results.setdefault(name, {})[key] = row | measured
            print(f"{name}: {key}", flush=True)
            path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            report.write(results, given.output)


if __name__ == "__main__":
    main()
