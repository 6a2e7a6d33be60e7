"""The tables of generation, rehearsed on tiny shapes: they end, and what they record adds up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import generation

FAST = ("--quick", "--repeats", "1", "--new-tokens", "12", "--specc", '{"compile": false}')


def table(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *more: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["generation", name, *FAST, "--output", str(folder), *more])
    generation.main()
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = table(monkeypatch, tmp_path, "peers", "--peers", "eager", "assisted", "gpt-fast", "lookup")
    rows = {row["kind"]: row for row in record["results"] if row["drafts"]}
    assert set(rows) == {"specc", "assisted", "lookup", "specc lookup"}
    assert all(row["leading_equal"] == {"plain": 12, "generate": 12} for row in rows.values())
    assert 0 < rows["specc"]["steps"]["mean_accepted_length"] <= 4
    assert rows["specc"]["floor"]["draft_weights"] > rows["lookup"]["floor"]["draft_weights"] == 0
    assert record["failures"]["gpt-fast"].startswith("no checkout was given")
    assert record["ratios"][-1]["over"]["assisted"] > 0


def test_a_peer_that_refuses_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = table(monkeypatch, tmp_path, "hybrid")
    (name,) = record["failures"]
    assert name.startswith("generate, assistant of 3")
    assert {row["kind"] for row in record["results"]} == {"specc", "eager"}


def test_a_budget_ends_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = table(monkeypatch, tmp_path, "growth", "--budget", "0")
    assert record["results"] == []
    assert all(each.endswith("over budget") for each in record["left_out"])


def test_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = table(monkeypatch, tmp_path, "kernels")
    assert record["kernels_per_step"] > 0
    products = next(group for group in record["groups"] if group["name"] == "products")
    assert products["bytes"] > 0


def test_the_ablation_switches_on_part_after_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same tokens in each row; forwards that are graphs of their own replay what each step feeds them."""
    settings = '{"options": {"inductor": false}}'
    record = table(monkeypatch, tmp_path, "ablation", "--specc", settings)
    assert not record["failures"]
    names = [row["name"] for row in record["results"]]
    assert names[1:] == [name for name, _ in generation.ABLATION]
    assert all(row["leading_equal"]["plain"] == 12 for row in record["results"])


def test_exact_compares_to_the_last_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = table(monkeypatch, tmp_path, "exact", "--new-tokens", "40")
    assert not record["failures"]
    drafting = [row for row in record["results"] if row["drafts"]]
    assert [row["batch"] for row in drafting] == [1, 1, 16, 16]
    assert all(row["leading_equal"] == {"plain": 40} for row in drafting)


def test_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = table(monkeypatch, tmp_path, "options")
    assert not record["failures"]
    assert [row["drafts"] for row in record["results"]] == [0, 3] * len(generation.OPTIONS)
