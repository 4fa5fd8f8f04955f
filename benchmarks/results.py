"""Reading and writing the results file, which has one row for each baseline and each measured cell.

A race compares several calls with one baseline. The first row of a race describes the baseline: the time of
one call in milliseconds, the peak memory in MiB, the date and the environment. Each further row is a cell,
which holds the measurements of one call relative to the baseline:

- ``cpu`` and ``wall``: ``[median, lower quartile, upper quartile]``, or ``[value]`` if measured once;
- ``memory``: the ratio of the peak memories;
- ``target``: the target for the median of ``cpu``, if the section sets one;
- ``raised``: the error that the call raised; the row then has no numbers.
"""

import json
from pathlib import Path
from typing import Any

#: The fields of the baseline, and under ``"cells"`` the cells by the name of the call.
Race = dict[str, Any]
#: The races, by section and then by name.
Results = dict[str, dict[str, Race]]


def load(path: Path) -> Results:
    """Returns the races in a results file, or an empty dict if the file does not exist."""
    results: Results = {}
    stored = json.loads(path.read_text()) if path.exists() else {"rows": []}
    for row in stored["rows"]:
        section, name, call = (row.pop(key) for key in ("section", "race", "name"))
        races = results.setdefault(section, {})
        if name in races:
            races[name]["cells"][call] = row
        else:
            row["environment"] = stored["environments"][row["environment"]]
            races[name] = {"name": call} | row | {"cells": {}}
    return results


def save(results: Results, path: Path) -> None:
    """Writes the results with one row per line and three significant digits per number."""
    environments: list[dict[str, str]] = []
    rows = []
    for section, races in results.items():
        for name, race in races.items():
            if race["environment"] not in environments:
                environments.append(race["environment"])
            baseline = race | {"environment": environments.index(race["environment"])}
            cells = baseline.pop("cells")
            calls = [baseline, *({"name": call} | cell for call, cell in cells.items())]
            rows += [{"section": section, "race": name} | call for call in calls]
    # Parsing the JSON again rounds every float, however deeply nested. Integers are counts and stay exact.
    rounded = json.loads(json.dumps(rows), parse_float=lambda number: float(f"{float(number):.3g}"))
    lists = [("environments", environments), ("rows", rounded)]
    lines = (
        (key, ",\n".join(json.dumps(row, ensure_ascii=False) for row in values)) for key, values in lists
    )
    path.write_text("{" + ",\n".join(f'"{key}": [\n{text}\n]' for key, text in lines) + "}\n")
