"""What a compile did, for people: dump folders (``SPECC_DUMP``) and artifacts in ``TORCH_TRACE``."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from specc.compat import compile_id, trace_artifact
from specc.errors import OptionError
from specc.options import Options
from specc.passes.framework import Level, Observer, Pass, PassResult, Remark

DUMP_VARIABLE = "SPECC_DUMP"


def dump_folder(options: Options) -> Path | None:
    """Where this compile is dumped: the option, else SPECC_DUMP, else nowhere."""
    folder = options.dump or os.environ.get(DUMP_VARIABLE)
    return Path(folder).expanduser() if folder else None


def observers_for(options: Options) -> list[Observer]:
    folder = dump_folder(options)
    trace: list[Observer] = [TraceReport()]
    return [*trace, DumpReport(folder)] if folder else trace


def readable(gm: GraphModule) -> str:
    return gm.print_readable(print_output=False, include_stride=True, include_device=True, expanded_def=True)


class TraceReport:
    """Sends every pass's graph, diff and remarks to torch's structured log.

    While that is off, no payload is asked for, and nothing is formatted.
    """

    def __init__(self) -> None:
        self._before = ""
        self._text = ""

    def graph(self, level: Level, gm: GraphModule) -> None:
        trace_artifact(f"specc_{level}_before", lambda: self._advanced(gm))

    def after_pass(self, run: Pass, gm: GraphModule, result: PassResult) -> None:
        name = f"specc_{run.level}_{run.name}"
        trace_artifact(f"{name}_after", lambda: self._advanced(gm))
        trace_artifact(f"{name}_diff", lambda: _diff(name, self._before, self._text))
        trace_artifact(f"{name}_remarks", lambda: _remarks_json(result.remarks))

    def _advanced(self, gm: GraphModule) -> str:
        self._before, self._text = self._text, readable(gm)
        return self._text


class DumpReport:
    """Writes one folder per captured graph.

    ``NN_<level>_<pass>.before.py``, ``.after.py`` and ``.diff`` for each pass in running order,
    ``remarks.json`` and ``remarks.txt``, and beside the graphs' folders an ``index.md`` and
    ``index.json`` over all of them.
    """

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._compile_id = compile_id()
        self._folder: Path | None = None
        self._text = ""
        self._passes: list[dict[str, Any]] = []
        self._remarks: list[Remark] = []

    def graph(self, level: Level, gm: GraphModule) -> None:
        self._text = readable(gm)
        if self._folder is None:
            self._folder = _next_folder(self._root)

    def after_pass(self, run: Pass, gm: GraphModule, result: PassResult) -> None:
        if self._folder is None:
            raise RuntimeError("DumpReport.graph must be called before the first pass")
        before, self._text = self._text, readable(gm)
        name = f"{len(self._passes):02d}_{run.level}_{run.name}"
        (self._folder / f"{name}.before.py").write_text(before)
        (self._folder / f"{name}.after.py").write_text(self._text)
        (self._folder / f"{name}.diff").write_text(_diff(name, before, self._text))
        counts = {"matched": result.matched, "refused": result.refused}
        self._passes.append({"name": run.name, "level": run.level, **counts})
        self._remarks += result.remarks
        (self._folder / "remarks.json").write_text(_remarks_json(self._remarks))
        (self._folder / "remarks.txt").write_text("".join(f"{each}\n" for each in self._remarks))
        self._write_index()

    def _write_index(self) -> None:
        assert self._folder is not None
        entry = {"compile_id": self._compile_id, "passes": self._passes}
        _write_whole(self._folder / "graph.json", json.dumps(entry, indent=1))
        graphs = {
            path.parent.name: json.loads(path.read_text())
            for path in sorted(self._root.glob("graph_*/graph.json"))
        }
        _write_whole(self._root / "index.json", json.dumps(graphs, indent=1))
        _write_whole(self._root / "index.md", _index_page(graphs))


def _write_whole(path: Path, text: str) -> None:
    """Write a file that another process dumping there may read at any time."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


def check_dump_folder(options: Options) -> None:
    """Make the dump folder, if one is asked for. Raises OptionError where that cannot be done."""
    folder = dump_folder(options)
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot write dumps to {folder} ({error}): choose another folder") from error
    if not os.access(folder, os.W_OK):
        raise OptionError(f"cannot write dumps to {folder}: choose a folder you may write to")


def _next_folder(root: Path) -> Path:
    number = len(list(root.glob("graph_*")))
    while True:
        folder = root / f"graph_{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _diff(name: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        f"{name}.before.py",
        f"{name}.after.py",
    )
    return "".join(lines)


def _remarks_json(remarks: list[Remark]) -> str:
    return json.dumps([dataclasses.asdict(remark) for remark in remarks], indent=1)


def _index_page(graphs: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Graphs captured by specc",
        "",
        "| graph | compile | pass | level | fired | refused |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for folder, graph in graphs.items():
        for number, each in enumerate(graph["passes"]):
            link = f"{folder}/{number:02d}_{each['level']}_{each['name']}.diff"
            lines.append(
                f"| [{folder}]({folder}/remarks.txt) | {graph['compile_id']} | [{each['name']}]({link}) "
                f"| {each['level']} | {each['matched']} | {each['refused']} |"
            )
    return "\n".join(lines) + "\n"
