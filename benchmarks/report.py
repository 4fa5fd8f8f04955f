"""The results as Markdown and as a plot."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from contestants import BY_HAND, CAMKIT, HEATMAPS, LIBRARIES, METHODS, TEN_CAM, TEN_GRADCAM

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Row = Mapping[str, Any]

_OURS = [*METHODS, HEATMAPS, TEN_CAM, TEN_GRADCAM]
_GRADCAM = {library: f"{library}: Grad-CAM" for library in (*LIBRARIES, BY_HAND)}
_GRADIENTS = ("Grad-CAM", "Grad-CAM++", "XGrad-CAM", "HiResCAM", "LayerCAM")
_LARGE_HEADS = ("vgg16", "alexnet")
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

_INTRODUCTION = """# What camkit costs, beside its peers

Written by `python -m nox -s bench` (`python benchmarks/speed.py`), which measures again; the
numbers behind the tables are in [results.json](results.json).

All run in turn in one process, in every round in another order; before each turn garbage is
collected, and a pause lets threads that the one before has left spinning fall asleep. A ratio
divides what a call took by what one forward pass of the same batch in inference mode took **in the
same round**. Short calls are made several times, after one that does not count. A cell
is the median of the rounds, in brackets the quartiles. Threads that wait sleep
(`OMP_WAIT_POLICY=PASSIVE`): spinning would count as CPU time. Targets are for the medians of CPU
times, and for peak memory. Networks are torchvision's with random parameters, images 3 × 224 × 224,
float32.
"""

_MISSED = """
What is missed, and why:

- **Short passes.** A call looks at every module and at the images' sum, keeps the random states, and CAM
  checks its map against the logits: little work, of which the shortest passes show the most. On AlexNet's
  trunk, one image, 17 ms of CPU, measured apart on 2026-11-26: CAM 1.07; with neither the sum, the random
  states nor the check 1.05; by hand, a hook and a weighted sum, 1.01.
- **AlexNet.** Its head holds 96% of its weights; to read them is what the pass costs, and a
  gradient reads them once more. The column "by hand" is Grad-CAM without any library and without
  checks: about what no library can be below, up to noise. On one image, on 2026-11-26, it missed the
  target as well.
- **The memory of ViT.** A transformer's memory is flat over its blocks, so that the graph of the last
  one, which a gradient needs, is much of it: see "by hand" again.
- **Overlays of tensors.** Their table has the bins, the three look-ups and the weighted sum alone, unchecked
  and in place, in an order of memory that no user expects. Nothing that was tried is faster: measured apart
  on 2026-11-26 these steps reached 2.4 to 4.4 times, 1 to 8 images at a time 2.4 to 3.6, `grid_sample` or
  `gather` for the look-up, with the checks, 0.9 to 2.5. The peer rounds to bytes, so does `camkit.overlay`,
  by Pillow. What new memory costs differs between virtual machines, and from one process to the next: up to
  that day, pictures were 4.2 to 5.7 times as fast as the peer's. The peer's threads take twice the CPU time
  that the clock shows.
- **Noise.** The machine is shared: a median may lie 0.1 off, as the quartiles and "by hand" show, and which
  cells lie above differs from run to run.

Ablation-CAM does not run channels that are zero anyway.
"""

_ONE_PASS = """
Every library explains the predicted class at the layer that camkit finds, and its call includes the
forward pass and the choice of the class. Objects are made and hooks attached before the clock
starts, and taken off again before the next turn, as are the gradients that are left; camkit's dry
run, which finds the layer, is part of its first call and not timed. pytorch-grad-cam's call also
resizes to the input's size, as camkit's "heatmaps" column does; the others give maps of the layer's
size. Transformers get the reshape function that their users write; captum takes none, so its maps
of ViT and Swin mean nothing, and only its cost is of interest.

Where CAM does not explain the network as it is (*), CAM and the ten classes at once are measured on
`camkit.attach_gap_head(model, 1000)`, by that network's own forward pass. Peak memory is that of
new tensors in a call, without parameters and input, by torch's profiler; what NumPy allocates is
not in it. An empty cell was not measured.
"""

_ACCELERATOR = """
The same libraries and calls, on the GPU, by CUDA events before the first call of a turn and after the
last: where the GPU waits for Python, Python's time is what they show, as for most of these networks
with few images. Peak memory is what torch's allocator had given out at most, the workspaces of cuDNN
with it. There are no targets for these numbers.
"""


def write(results: Mapping[str, Mapping[str, Row]], folder: Path) -> None:
    """Writes ``RESULTS.md`` and, if there is something to show, ``results.png``."""
    rows = _sorted(results.get("one-pass", {}))
    on_gpu = _sorted(results.get("accelerator", {}))
    parts = [_INTRODUCTION, *_environments(results), *_targets(rows, results), _MISSED]
    if rows:
        plot(rows, folder / "results.png")
        parts += ["## Methods of one pass", "![Grad-CAM of four libraries](results.png)", _ONE_PASS.strip()]
        parts += _one_pass(rows)
    if on_gpu:
        parts += ["## On a GPU", _ACCELERATOR.strip(), *_accelerator(on_gpu)]
    for name, title in (
        ("many-passes", "Methods of many passes"),
        ("overlays", "Overlays, 224 × 224"),
        ("import", "`import camkit`"),
        ("dataset", "`camkit.explain_dataset`"),
    ):
        if name in results:
            parts += [f"## {title}", *_lines(results[name].values())]
    text = "\n\n".join(part.strip() for part in parts)
    (folder / "RESULTS.md").write_text(text + "\n")


def _sorted(rows: Mapping[str, Row]) -> list[Row]:
    return sorted(rows.values(), key=lambda row: (list(_NAMES).index(row["model"]), row["batch"]))


def plot(rows: list[Row], path: Path) -> None:
    """Grad-CAM of each library: CPU time and peak memory by those of a forward pass."""
    batches = sorted({row["batch"] for row in rows})
    count = len({row["model"] for row in rows})
    size = (10, 1.6 + len(batches) * (0.7 + 0.42 * count))
    figure, axes = plt.subplots(len(batches), 2, figsize=size, squeeze=False, layout="constrained")
    for line, batch in zip(axes, batches, strict=True):
        shown = [row for row in rows if row["batch"] == batch]
        for axis, measure in zip(line, ("cpu", "memory"), strict=True):
            _draw(axis, shown, measure)
        line[0].set_title(f"batch {batch}: CPU time, median and quartiles", loc="left", fontsize=10)
        line[1].set_title(f"batch {batch}: peak memory", loc="left", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("by that of one forward pass in inference mode (log scale)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    title = "Grad-CAM: what it costs beyond the prediction"
    where = {"loc": "outside upper center", "ncols": len(labels)}
    figure.legend(handles, labels, title=title, title_fontsize=12, frameon=False, **where)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Any, rows: list[Row], measure: str) -> None:
    """One panel: a row for each network, a dot for each library."""
    for n, library in enumerate(LIBRARIES):
        found = [(y, row["results"].get(f"{library}: Grad-CAM", {})) for y, row in enumerate(rows)]
        measured = [(y + (n - 1.5) * 0.17, one[measure]) for y, one in found if measure in one]
        if not measured:
            continue
        places, values = zip(*measured, strict=True)
        style = {"fmt": "o", "ms": 5, "color": _COLOURS[library], "label": library, "elinewidth": 1.5}
        if measure == "memory":
            axis.errorbar(values, places, **style)
        else:
            medians = [value["median"] for value in values]
            low = [value["median"] - value["low"] for value in values]
            high = [value["high"] - value["median"] for value in values]
            axis.errorbar(medians, places, xerr=[low, high], **style)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    low, high = min(low, 0.8), max(high, 4.5)
    ticks = [tick for tick in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 20, 40) if low <= tick <= high]
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.axvline(1, color="0.6", linewidth=1, zorder=0)
    axis.grid(axis="x", color="0.9", zorder=0)
    axis.set_yticks(range(len(rows)), [_NAMES[row["model"]] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def limit(method: str, row: Row) -> float | None:
    """The most CPU time that a method of camkit's is to take."""
    if method == "CAM":
        return 1.05
    if method in (TEN_CAM, TEN_GRADCAM):
        return 1.2
    if method in _GRADIENTS:
        return 1.4 if row["model"] in _LARGE_HEADS else 1.15
    return None


def _environments(results: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """Where and when it was measured; several, if not all was in one environment."""
    found: dict[tuple[tuple[str, str], ...], tuple[set[str], set[str]]] = {}
    for section, rows in results.items():
        for row in rows.values():
            sections, dates = found.setdefault(tuple(row["environment"].items()), (set(), set()))
            sections.add(section)
            dates.add(row["date"])
    parts = []
    for environment, (sections, dates) in found.items():
        of = f" ({', '.join(sorted(sections))})" if len(found) > 1 else ""
        when = " to ".join(sorted({min(dates), max(dates)}))
        parts.append(f"Measured {when}{of}: " + ", ".join(f"{k} {v}" for k, v in environment) + ".")
    return parts


def _targets(rows: list[Row], results: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """Each target, what was measured, and whether it is met."""
    table = [
        _target("CAM", rows, ["CAM"]),
        _target("Gradient methods", rows, _GRADIENTS, lambda row: row["model"] not in _LARGE_HEADS),
        _target(
            "Gradient methods, VGG16 and AlexNet", rows, _GRADIENTS, lambda row: row["model"] in _LARGE_HEADS
        ),
        _target("Ten classes at once, global pooling", rows, [TEN_CAM, TEN_GRADCAM]),
        _memory_target(rows),
    ]
    for section in ("many-passes", "overlays", "import", "dataset"):
        for row in results.get(section, {}).values():
            for line in row["lines"]:
                if "target" in line:
                    met = "yes" if line["met"] else "**no**"
                    table.append(f"| {line['what']} | {line['target']} | {_spread(line['cpu'])} | {met} |")
    found = [line for line in table if line]
    return ["## Targets", "\n".join(["| what | target | measured | met |", "|---|---|---|---|", *found])]


def _target(
    what: str, rows: list[Row], methods: Any, chosen: Callable[[Row], bool] = lambda row: True
) -> str:
    """A line for methods of one pass: the worst of them, and how many there are."""
    found = [
        (row["results"][f"{CAMKIT}: {method}"]["cpu"]["median"], limit(method, row), method, row)
        for row in rows
        if chosen(row)
        for method in methods
        if "cpu" in row["results"].get(f"{CAMKIT}: {method}", {})
    ]
    return _worst(what, found)


def _memory_target(rows: list[Row]) -> str:
    found = [
        (result["memory"], 1.1, name.removeprefix(f"{CAMKIT}: "), row)
        for row in rows
        for name, result in row["results"].items()
        if name.startswith(f"{CAMKIT}: ") and "memory" in result
    ]
    return _worst("Peak memory, all of camkit's", found)


def _worst(what: str, found: list[tuple[float, Any, str, Row]]) -> str:
    if not found:
        return ""
    value, most, method, row = max(found, key=lambda one: one[0])
    good = sum(round(value, 2) <= most for value, most, *_ in found)
    met = "yes" if good == len(found) else f"**no**: {good} of {len(found)}"
    where = f"{method}, {_NAMES[row['model']]}, batch {row['batch']}"
    return f"| {what} | ≤ {most} | at most {value:.2f} ({where}) | {met} |"


def _one_pass(rows: list[Row]) -> Iterator[str]:
    """The tables of the methods of one pass."""
    reasons: list[str] = []
    for measure, title in (("cpu", "CPU time"), ("wall", "Wall time"), ("memory", "Peak memory")):
        yield f"### {title}: Grad-CAM"
        yield _table(rows, _GRADCAM, measure, reasons)
    for measure, title in (("cpu", "CPU time"), ("wall", "Wall time"), ("memory", "Peak memory")):
        for library in LIBRARIES[:-1]:  # the last has Grad-CAM only
            methods = _OURS if library == CAMKIT else [m for m, kinds in METHODS.items() if library in kinds]
            yield f"### {title}: {library}"
            yield _table(rows, {method: f"{library}: {method}" for method in methods}, measure, reasons)
    yield "### One forward pass"
    yield _forward_passes(rows)
    yield from _reasons(reasons)


def _accelerator(rows: list[Row]) -> Iterator[str]:
    """The tables of a GPU, of each type."""
    reasons: list[str] = []
    for dtype in sorted({row["dtype"] for row in rows}, reverse=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        yield f"### {dtype}, time: Grad-CAM"
        yield _table(chosen, _GRADCAM, "wall", reasons)
        yield f"### {dtype}, time: camkit"
        yield _table(chosen, {method: f"{CAMKIT}: {method}" for method in _OURS}, "wall", reasons)
        yield f"### {dtype}, peak memory: Grad-CAM"
        yield _table(chosen, _GRADCAM, "memory", reasons)
        yield f"### {dtype}, one forward pass"
        yield _forward_passes(chosen)
    yield from _reasons(reasons)


def _reasons(reasons: list[str]) -> Iterator[str]:
    if reasons:
        yield "### What raises"
        yield "\n".join(f"{n}. {reason}" for n, reason in enumerate(reasons, 1))


def _table(rows: list[Row], columns: Mapping[str, str], measure: str, reasons: list[str]) -> str:
    """Rows of networks; what misses its target is bold, what raises has a number in the list of reasons."""
    lines = [f"| network, batch | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        cells = [_cell(row, method, name, measure, reasons) for method, name in columns.items()]
        star = "" if row["pooled"] else "*"
        lines.append(f"| {_NAMES[row['model']]}{star}, {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row, method: str, name: str, measure: str, reasons: list[str]) -> str:
    result = row["results"].get(name)
    if result is None:
        return ""
    if "raised" in result:
        reason = f"{name}, {_NAMES[row['model']]}: {result['raised']}"
        if reason not in reasons:
            reasons.append(reason)
        return f"raises ({reasons.index(reason) + 1})"
    value = result[measure]
    text = f"{value:.2f}" if measure == "memory" else _spread(value)
    on_gpu = "dtype" in row  # where there are no targets
    if not name.startswith(f"{CAMKIT}: ") or measure == "wall" or on_gpu:
        return text
    most = 1.1 if measure == "memory" else limit(name.removeprefix(f"{CAMKIT}: "), row)
    number = value if measure == "memory" else value["median"]
    return f"**{text}**" if most is not None and round(number, 2) > most else text


def _forward_passes(rows: list[Row]) -> str:
    """What the ratios are of; on a GPU the wall time is that of its events."""
    columns = ("network, batch", "layer", "CPU, ms", "wall, ms", "peak memory, MiB", "rounds", "measured")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        taken = row["forward"]
        numbers = f"{1000 * taken['cpu']:.2f} | {1000 * taken['wall']:.2f} | {taken['memory'] / 2**20:.1f}"
        name = f"{_NAMES[row['model']]}, {row['batch']}"
        lines.append(f"| {name} | `{row['layer']}` | {numbers} | {row['rounds']} | {row['date']} |")
    return "\n".join(lines)


def _lines(rows: Any) -> Iterator[str]:
    """A table for each yardstick."""
    by: dict[str, list[Row]] = {}
    for row in rows:
        by.setdefault(row["by"], []).extend(row["lines"])
    for yardstick, lines in by.items():
        table = [f"| {yardstick} | CPU | wall | target | met |", "|---|---|---|---|---|"]
        for line in lines:
            if "raised" in line:
                table.append(f"| {line['what']} | raises {line['raised']} | | | |")
                continue
            met = {True: "yes", False: "**no**", None: ""}[line.get("met")]
            numbers = f"{_spread(line['cpu'])} | {_spread(line['wall'])}"
            table.append(f"| {line['what']} | {numbers} | {line.get('target', '')} | {met} |")
        yield "\n".join(table)


def _spread(value: Mapping[str, float]) -> str:
    if value["low"] == value["high"]:
        return f"{value['median']:.2f}"
    return f"{value['median']:.2f} ({value['low']:.2f}–{value['high']:.2f})"
