"""Writes the tables and the plot from the results."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from contestants import BY_HAND, CAMKIT, HEATMAPS, LIBRARIES, METHODS, TEN_CAM, TEN_GRADCAM
from results import Race, Results

matplotlib.use("Agg")  # This backend needs no display.
from matplotlib import pyplot as plt

_NAMES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vgg16": "VGG16",
    "alexnet": "AlexNet",
    "densenet121": "DenseNet-121",
    "efficientnet_b0": "EfficientNet-B0",
    "vit_b_16": "ViT-B/16",
    "swin_t": "Swin-T",
}
_COLOURS = dict(zip(LIBRARIES, ("#0072b2", "#d55e00", "#e69f00", "#009e73"), strict=True))
_CALLS = [*METHODS, HEATMAPS, TEN_CAM, TEN_GRADCAM]
_GRADIENTS = ["Grad-CAM", "Grad-CAM++", "XGrad-CAM", "HiResCAM", "LayerCAM"]
_LARGE_HEADS = ["vgg16", "alexnet"]
_OTHERS = [name for name in _NAMES if name not in _LARGE_HEADS]
#: Targets of camkit on the CPU: title, highest allowed ratio, measure, calls, networks.
_TARGETS = [
    ("CAM", 1.05, "cpu", ["CAM"], list(_NAMES)),
    ("Gradient methods", 1.15, "cpu", _GRADIENTS, _OTHERS),
    ("Gradient methods, VGG16 and AlexNet", 1.4, "cpu", _GRADIENTS, _LARGE_HEADS),
    ("Ten classes at once, global pooling", 1.2, "cpu", [TEN_CAM, TEN_GRADCAM], list(_NAMES)),
    ("Peak memory of all calls", 1.1, "memory", _CALLS, list(_NAMES)),
]
_HIGHEST = {
    (f"{CAMKIT}: {call}", measure, model): highest
    for _, highest, measure, calls, models in _TARGETS
    for call in calls
    for model in models
}

_INTRODUCTION = """# Tables of the benchmark

`python benchmarks/speed.py` writes this page from [results.json](results.json).
[RESULTS.md](RESULTS.md) explains how the numbers are measured, and sums them up.

Numbers have three significant digits: the median of the rounds, with the quartiles in brackets. Times and
peak memory are relative to one forward pass of the same batch in inference mode, where a table names no other
baseline. On a GPU the wall time is that of CUDA events, and the CPU time that of the process. A cell in bold
misses its target; an empty cell was not measured. CAM does not explain networks marked with * as they are.
For them CAM and the ten classes at once run on `camkit.attach_gap_head(model, 1000)`, relative to the forward
pass of that network."""


def write(results: Results, folder: Path) -> None:
    """Writes ``TABLES.md`` and, if methods of one pass were measured on the CPU, ``results.png``."""
    parts = [_INTRODUCTION, _environment_list(results), "## Targets", _target_table(results)]
    on_host = _sort_races(results.get("one-pass", {}).values())
    if on_host:
        plot(on_host, folder / "results.png")
    parts += _network_tables("Methods of one pass", on_host)
    on_gpu = _sort_races(results.get("accelerator", {}).values())
    for dtype in sorted({race["dtype"] for race in on_gpu}, reverse=True):
        parts += _network_tables(f"GPU, {dtype}", [race for race in on_gpu if race["dtype"] == dtype])
    for section, title in (
        ("many-passes", "Methods of many passes"),
        ("overlays", "Overlays, 224 × 224"),
        ("import", "`import camkit`"),
        ("dataset", "`camkit.explain_dataset`"),
    ):
        if section in results:
            parts += [f"## {title}", _call_table(results[section].values())]
    (folder / "TABLES.md").write_text("\n\n".join(parts) + "\n")


def plot(races: list[Race], path: Path) -> None:
    """Draws the CPU time and the peak memory of Grad-CAM in each library."""
    batches = sorted({race["batch"] for race in races})
    count = len({race["model"] for race in races})
    size = (10, 1.6 + len(batches) * (0.7 + 0.42 * count))
    figure, axes = plt.subplots(len(batches), 2, figsize=size, squeeze=False, layout="constrained")
    for line, batch in zip(axes, batches, strict=True):
        for axis, measure in zip(line, ("cpu", "memory"), strict=True):
            _draw_panel(axis, [race for race in races if race["batch"] == batch], measure)
        line[0].set_title(f"batch {batch}: CPU time, median and quartiles", loc="left", fontsize=10)
        line[1].set_title(f"batch {batch}: peak memory", loc="left", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("relative to one forward pass in inference mode (log scale)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    title = "Grad-CAM: cost relative to the prediction"
    where = {"loc": "outside upper center", "ncols": len(labels)}
    figure.legend(handles, labels, title=title, title_fontsize=12, frameon=False, **where)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(axis: Any, races: list[Race], measure: str) -> None:
    """Draws one panel: a row for each network, a dot for each library."""
    for n, library in enumerate(LIBRARIES):
        found = [(y, race["cells"].get(f"{library}: Grad-CAM", {})) for y, race in enumerate(races)]
        measured = [(y + (n - 1.5) * 0.17, cell[measure]) for y, cell in found if measure in cell]
        if not measured:
            continue
        places, values = zip(*measured, strict=True)
        style = {"fmt": "o", "ms": 5, "color": _COLOURS[library], "label": library, "elinewidth": 1.5}
        if measure == "memory":
            axis.errorbar(values, places, **style)
        else:
            medians = [value[0] for value in values]
            # After a single round there are no quartiles, so the median takes their place.
            errors = [[v[0] - v[1 % len(v)] for v in values], [v[-1] - v[0] for v in values]]
            axis.errorbar(medians, places, xerr=errors, **style)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    low, high = min(low, 0.8), max(high, 4.5)
    ticks = [tick for tick in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 20, 40) if low <= tick <= high]
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.axvline(1, color="0.6", linewidth=1, zorder=0)
    axis.grid(axis="x", color="0.9", zorder=0)
    axis.set_yticks(range(len(races)), [_NAMES[race["model"]] for race in races])
    axis.set_ylim(len(races) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _sort_races(races: Iterable[Race]) -> list[Race]:
    return sorted(races, key=lambda race: (list(_NAMES).index(race["model"]), race["batch"]))


def _environment_list(results: Results) -> str:
    """Lists the environments, with the sections that were measured in each and the dates."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for section, races in results.items():
        for race in races.values():
            environment = ", ".join(f"{key} {value}" for key, value in race["environment"].items())
            sections, dates = found.setdefault(environment, (set(), set()))
            sections.add(section)
            dates.add(race["date"])
    return "\n".join(
        f"- {', '.join(sorted(sections))} ({' to '.join(sorted({min(dates), max(dates)}))}): {environment}."
        for environment, (sections, dates) in found.items()
    )


def _target_table(results: Results) -> str:
    """Returns a table of the targets, with a measurement for each.

    For methods of one pass it shows the highest ratio, and how many cells meet the target unless all do.
    """
    lines = []
    for title, highest, measure, calls, models in _TARGETS:
        cells = [
            (_median_or_ratio(race["cells"][f"{CAMKIT}: {call}"][measure]), call, race)
            for race in results.get("one-pass", {}).values()
            for call in calls
            if race["model"] in models and measure in race["cells"].get(f"{CAMKIT}: {call}", {})
        ]
        if cells:
            value, call, race = max(cells, key=lambda cell: cell[0])
            good = sum(_meets_target(value, f"≤ {highest}") for value, *_ in cells)
            met = "yes" if good == len(cells) else f"**no**: {good} of {len(cells)}"
            where = f"{call}, {_NAMES[race['model']]}, batch {race['batch']}"
            lines.append([title, f"≤ {highest}", f"at most {_format_number(value)} ({where})", met])
    lines += [
        [
            name,
            cell["target"],
            _format_spread(cell["cpu"]),
            "yes" if _meets_target(cell["cpu"][0], cell["target"]) else "**no**",
        ]
        for section, races in results.items()
        for race in races.values()
        for name, cell in race["cells"].items()
        if "target" in cell and "cpu" in cell
    ]
    return _format_table(["call", "target", "measured", "met"], lines)


def _network_tables(title: str, races: list[Race]) -> Iterator[str]:
    """Yields the tables of the methods of one pass.

    The first compares Grad-CAM in all libraries, and each of the others shows the methods of one library.
    """
    if not races:
        return
    yield f"## {title}"
    columns = {"Grad-CAM": {library: f"{library}: Grad-CAM" for library in (*LIBRARIES, BY_HAND)}}
    for library in LIBRARIES[:-1]:  # The last library, captum, has Grad-CAM only.
        calls = _CALLS if library == CAMKIT else [call for call in METHODS if library in METHODS[call]]
        columns[library] = {call: f"{library}: {call}" for call in calls}
    for measure, name in (("cpu", "CPU time"), ("wall", "wall time"), ("memory", "peak memory")):
        for subject, names in columns.items():
            yield f"### {title}, {name}: {subject}"
            lines = [
                [_format_label(race), *(_format_cell(race, call, measure) for call in names.values())]
                for race in races
            ]
            yield _format_table(["network, batch", *names], lines)
    yield f"### {title}, one forward pass"
    header = [
        "network, batch",
        "layer",
        "CPU time, ms",
        "wall time, ms",
        "peak memory, MiB",
        "rounds",
        "date",
    ]
    lines = []
    for race in races:
        numbers = [_format_number(race[key]) for key in ("cpu_ms", "wall_ms", "memory_mib")]
        lines.append([_format_label(race), f"`{race['layer']}`", *numbers, str(race["rounds"]), race["date"]])
    yield _format_table(header, lines)


def _call_table(races: Iterable[Race]) -> str:
    """Returns a table with one row for each call, which also names the baseline of the call."""
    lines = []
    for race in races:
        units = (("cpu_ms", "ms of CPU time"), ("wall_ms", "ms of wall time"))
        taken = ", ".join(f"{_format_number(race[key])} {unit}" for key, unit in units if key in race)
        baseline = f"{race['name']}: {taken}" if taken else race["name"]
        for name, cell in race["cells"].items():
            if "raised" in cell:
                lines.append([name, baseline, f"raises {cell['raised']}", "", "", ""])
                continue
            target = cell.get("target", "")
            met = {True: "yes", False: "**no**"}[_meets_target(cell["cpu"][0], target)] if target else ""
            lines.append(
                [name, baseline, _format_spread(cell["cpu"]), _format_spread(cell["wall"]), target, met]
            )
    return _format_table(["call", "relative to", "CPU time", "wall time", "target", "met"], lines)


def _format_cell(race: Race, name: str, measure: str) -> str:
    """Returns the text of a cell: a number, in bold if it misses its target, or the kind of error raised."""
    cell = race["cells"].get(name)
    if cell is None:
        return ""
    if "raised" in cell:
        return f"raises {cell['raised'].partition(':')[0]}"
    text = _format_number(cell[measure]) if measure == "memory" else _format_spread(cell[measure])
    highest = _HIGHEST.get((name, measure, race["model"]), math.inf)
    if "dtype" in race or _meets_target(
        _median_or_ratio(cell[measure]), f"≤ {highest}"
    ):  # There are no targets on a GPU.
        return text
    return f"**{text}**"


def _meets_target(value: float, target: str) -> bool:
    """Returns whether a number, rounded to two decimals, meets a target such as ``≤ 1.05``."""
    sign, limit = target.split()
    value = round(value, 2)
    return value <= float(limit) if sign == "≤" else value >= float(limit)


def _format_label(race: Race) -> str:
    return f"{_NAMES[race['model']]}{'' if race['pooled'] else '*'}, {race['batch']}"


def _median_or_ratio(value: Any) -> float:
    """Returns the median of a time, or the ratio of a peak memory."""
    return value[0] if isinstance(value, list) else value


def _format_spread(values: list[float]) -> str:
    median, *quartiles = map(_format_number, values)
    return f"{median} ({'–'.join(quartiles)})" if quartiles else median


def _format_number(value: float) -> str:
    """Returns a number with three significant digits, for example ``0.944``, ``17.0`` or ``1310``."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f}"


def _format_table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
