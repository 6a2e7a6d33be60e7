"""A plot beside a record, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

Content = dict[str, Any]


def draw(content: Content, path: Path) -> None:
    """Draw a record's table to ``path``; nothing where matplotlib is missing or there is no row yet."""
    rows = content.get("kernels") or content["results"]
    if importlib.util.find_spec("matplotlib") is None or not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.28 * min(len(rows), 40)))
    draw_table = _kernels if "kernels" in content else DRAWINGS.get(content["table"], _rates)
    draw_table(axes, content)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _rates(axes: Any, content: Content) -> None:
    """Tokens per second of each row, whiskers from the slowest call to the fastest."""
    rows = content["results"][::-1]
    names = [f"{row['name']}  (eps {row['eps']:.3g})" for row in rows]
    rates = [row["tokens_per_second"] for row in rows]
    spreads = [row["tokens_per_second"] * row["spread"] for row in rows]
    colours = ["tab:blue" if row["kind"] == "specc" else "tab:gray" for row in rows]
    axes.barh(range(len(rows)), rates, xerr=spreads, color=colours)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xlabel("tokens per second")
    axes.set_title(f"{content['pair']['shape']}, {content['dtype'].removeprefix('torch.')}", fontsize=9)


def _growth(axes: Any, content: Content) -> None:
    """Milliseconds per step over the context, a line per batch and drafts, and their floors dashed."""
    rows = content["results"]
    for number, line in enumerate(sorted({(row["batch"], row["drafts"]) for row in rows})):
        mine = [row for row in rows if (row["batch"], row["drafts"]) == line]
        mine.sort(key=lambda row: row["context"])
        contexts, colour = [row["context"] for row in mine], f"C{number % 10}"
        label = f"batch {line[0]}, {line[1]} drafts"
        axes.plot(contexts, [row["ms_per_step"] for row in mine], "o-", color=colour, label=label)
        axes.plot(contexts, [row["floor_ms"] for row in mine], "--", color=colour)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context")
    axes.set_ylabel("ms per step; dashed: floor")
    axes.legend(fontsize=7)


def _kernels(axes: Any, content: Content) -> None:
    rows = content["kernels"][:40][::-1]
    axes.barh(range(len(rows)), [row["microseconds"] for row in rows])
    labels = [f"{row['count']:g} x {row['name'][:60]}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.set_xlabel("microseconds per step")


DRAWINGS: dict[str, Callable[[Any, Content], None]] = {"growth": _growth}
