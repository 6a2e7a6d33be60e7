"""Dumps and traces: complete, readable, and without effect on results."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from specc.passes import PASSES
from tests.families import tiny


def greedy(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits[:, -1]
    return torch.softmax(logits, dim=-1).topk(1).indices


def compiled(**options: Any) -> Any:
    return torch.compile(greedy, backend="specc", options={"inductor": False, **options}, fullgraph=True)


IDS = torch.arange(3, 13).reshape(2, 5)


def test_a_dump_has_every_pass_before_and_after(tmp_path: Path, fresh_compiler: None) -> None:
    with torch.no_grad():
        tokens = compiled(dump=str(tmp_path))(tiny("llama"), IDS)
        assert torch.equal(tokens, greedy(tiny("llama"), IDS))
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    for number, each in enumerate(PASSES):
        name = f"{number:02d}_{each.level}_{each.name}"
        before, after = ((folder / f"{name}.{when}.py").read_text() for when in ("before", "after"))
        diff = (folder / f"{name}.diff").read_text()
        assert "def forward" in before
        assert (before == after) == (diff == "")
    fired = (folder / "04_aten_greedy_select.diff").read_text()
    assert "-" in fired
    assert "torch.ops.specc.greedy_select.default" in fired


def test_remarks_say_what_where_and_why(tmp_path: Path, fresh_compiler: None) -> None:
    with torch.no_grad():
        compiled(dump=str(tmp_path))(tiny("llama"), IDS)
    remarks = json.loads((tmp_path / "graph_000" / "remarks.json").read_text())
    (select,) = [each for each in remarks if each["pass_name"] == "greedy_select"]
    assert set(select) == {"pass_name", "node", "status", "reason", "source"}
    assert select["status"] == "fired"
    assert "test_report.py" in select["source"]
    assert "topk(1)" in select["source"]
    text = (tmp_path / "graph_000" / "remarks.txt").read_text()
    assert text.count("\n") == len(remarks)
    assert f"greedy_select: fired at {select['node']}" in text


def test_the_index_lists_every_graph(tmp_path: Path, fresh_compiler: None) -> None:
    function = compiled(dump=str(tmp_path))
    with torch.no_grad():
        for width in (3, 4):
            torch._dynamo.reset()
            function(tiny("llama"), IDS[:, :width])
    index = json.loads((tmp_path / "index.json").read_text())
    assert sorted(index) == ["graph_000", "graph_001"]
    page = (tmp_path / "index.md").read_text()
    for folder in index:
        for number, each in enumerate(PASSES):
            link = f"{folder}/{number:02d}_{each.level}_{each.name}.diff"
            assert f"({link})" in page
            assert (tmp_path / link).exists()


def test_the_environment_variable_asks_for_dumps(
    tmp_path: Path, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECC_DUMP", str(tmp_path / "new" / "folder"))
    with torch.no_grad():
        compiled()(tiny("llama"), IDS)
    assert (tmp_path / "new" / "folder" / "index.md").exists()


def test_a_dump_is_not_answered_from_the_cache(tmp_path: Path, fresh_compiler: None) -> None:
    """Twice with Inductor: torch's cache could answer the second time, and the passes would not run."""

    def select(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1).topk(1).indices

    for number in range(2):
        torch._dynamo.reset()
        function = torch.compile(
            select, backend="specc", options={"dump": str(tmp_path / str(number)), "inductor": True}
        )
        with torch.no_grad():
            function(torch.randn(2, 17))
        text = (tmp_path / str(number) / "graph_000" / "remarks.txt").read_text()
        assert "greedy_select: fired" in text


def test_the_structured_trace_has_graphs_and_remarks(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specc import report

    artifacts: dict[str, str] = {}
    monkeypatch.setattr(report, "trace_artifact", lambda name, text: artifacts.update({name: text()}))
    with torch.no_grad():
        compiled()(tiny("llama"), IDS)
    assert "def forward" in artifacts["specc_aten_greedy_select_after"]
    assert json.loads(artifacts["specc_aten_greedy_select_remarks"])[0]["status"] == "fired"
    assert "+" in artifacts["specc_aten_greedy_select_diff"]


def test_torch_trace_files_hold_the_artifacts(tmp_path: Path) -> None:
    from tests.test_backend import run_python

    run_python(
        "import torch\n"
        "compiled = torch.compile(lambda x: x.softmax(-1).topk(1), backend='specc',"
        " options={'inductor': False})\n"
        "with torch.no_grad(): compiled(torch.randn(2, 9))\n",
        TORCH_TRACE=str(tmp_path),
    )
    (log,) = tmp_path.iterdir()
    assert "specc_aten_greedy_select_remarks" in log.read_text()


def test_dumping_a_135m_model_takes_less_than_two_seconds(tmp_path: Path, fresh_compiler: None) -> None:
    """SmolLM2's graph, with 30 layers; the widths do not matter to a dump, so they are small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from specc import report

    shape = {"hidden_size": 36, "intermediate_size": 64, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=30, **shape)).eval()
    spent = 0.0

    class Timed(report.DumpReport):
        def graph(self, *args: Any) -> None:
            self._measured(super().graph, *args)

        def after_pass(self, *args: Any) -> None:
            self._measured(super().after_pass, *args)

        def _measured(self, action: Any, *args: Any) -> None:
            nonlocal spent
            start = time.process_time()
            action(*args)
            spent += time.process_time() - start

    original, report.DumpReport = report.DumpReport, Timed
    try:
        with torch.no_grad():
            compiled(dump=str(tmp_path))(model, IDS)
    finally:
        report.DumpReport = original
    assert (tmp_path / "index.md").exists()
    assert 0 < spent < 2.0


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    import specc
    from tests.families import prompt

    (tmp_path / "file").write_text("")
    call = {"draft": "ngram", "options": {"dump": str(tmp_path / "file" / "below")}}
    with pytest.raises(specc.OptionError, match="cannot write dumps to .*choose another folder"):
        specc.generate(tiny("llama"), **prompt(1), **call)
