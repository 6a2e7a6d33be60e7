"""The first token's table, rehearsed: processes of their own, and warm caches that are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import first_token


def test_rows_are_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = json.dumps({"inductor": False})
    arguments = ["first_token", "--regional", "off", "--options", options, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    first_token.main()
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["results"]
    assert [(row["regional"], row["caches"]) for row in rows] == [(False, "empty"), (False, "warm")]
    for row in rows:
        assert 0 < row["first"]["first_token"] < row["first"]["call"]
        assert row["second"]["call"] < row["first"]["call"]
