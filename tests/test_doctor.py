"""specc doctor: what it finds, and what it says about packages that are in the way."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from specc import compat, doctor
from specc.lowerings import REGISTRY

FINE = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "torch-specc": "0.1.0"}


def problems_with(**packages: str) -> list[doctor.Problem]:
    named = {name.replace("_", "-"): version for name, version in packages.items()}
    return doctor.package_problems({**FINE, **named}, has_npu=False)


class TestPackages:
    @pytest.mark.parametrize(
        "versions",
        [FINE, {**FINE, "torch": "2.11.0", "transformers": "5.17.0"}, {**FINE, "torch": "3.0.0a1"}],
    )
    def test_supported_versions_are_no_problem(self, versions: dict[str, str]) -> None:
        assert doctor.package_problems(versions, has_npu=False) == []

    @pytest.mark.parametrize(("name", "version"), [("torch", "2.9.1+cu128"), ("transformers", "4.57.1")])
    def test_old_versions(self, name: str, version: str) -> None:
        (problem,) = problems_with(**{name: version})
        assert problem.what == f"{name} {version} is too old"
        assert problem.remedy.startswith(f"pip install '{name}>=")

    def test_missing_packages(self) -> None:
        found = doctor.package_problems({}, has_npu=False)
        assert [each.what for each in found] == ["torch is not installed", "transformers is not installed"]

    def test_the_other_aiter(self) -> None:
        (problem,) = problems_with(aiter="0.13.20191203")
        assert "pip uninstall aiter" in problem.remedy
        assert "amd-aiter" in problem.remedy

    def test_amds_aiter_is_fine(self) -> None:
        assert problems_with(amd_aiter="0.1.7") == []

    def test_the_other_specc(self) -> None:
        (problem,) = problems_with(specc="1.0")
        assert "pip uninstall specc" in problem.remedy

    def test_torch_npu_needs_an_npu(self) -> None:
        (problem,) = problems_with(torch_npu="2.13.0")
        assert "import torch fail" in problem.what
        assert doctor.package_problems({**FINE, "torch-npu": "2.13.0"}, has_npu=True) == []

    def test_installed_names_are_canonical(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        metadata = tmp_path / "Amd_Aiter-0.1.7.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: Amd_Aiter\nVersion: 0.1.7\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert doctor.installed_distributions()["amd-aiter"] == "0.1.7"


class TestOperators:
    @pytest.mark.parametrize("kind", ["cpu", "cuda"])
    def test_every_operator_takes_a_provider(self, kind: str) -> None:
        choices = doctor.choices_on(kind)
        assert {each.op for each in choices} == set(REGISTRY)
        for each in choices:
            assert each.provider in {provider.name for provider in REGISTRY[each.op].providers}

    def test_refusals_carry_their_reason(self) -> None:
        (choice,) = [each for each in doctor.choices_on("cpu") if each.op == "greedy_select"]
        assert choice.provider == "reference"
        assert choice.refused == {"triton": "needs a CUDA or HIP device, got cpu"}


class TestReport:
    def test_this_machine(self) -> None:
        report = doctor.examine()
        assert report.devices[0].kind == "cpu"
        assert report.versions["torch"] == torch.__version__
        assert report.backend_listed
        assert {each.device for each in report.ops} == {each.kind for each in report.devices}

    def test_json_has_every_field(self) -> None:
        report = doctor.examine()
        assert set(json.loads(report.json())) == {field.name for field in dataclasses.fields(report)}

    def test_problems_are_the_last_lines(self) -> None:
        problem = doctor.Problem("something is wrong", "do this")
        report = dataclasses.replace(doctor.examine(), problems=[problem])
        assert report.text().endswith("problems\n  something is wrong: do this")

    def test_a_missing_entry_point(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor"])
        report = doctor.examine()
        assert not report.backend_listed
        assert any("does not list the backend" in each.what for each in report.problems)

    def test_no_compiler_is_said_but_no_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = len(doctor.examine().problems)
        monkeypatch.setattr(compat, "cpp_compiler_obstacle", lambda: "no C++ compiler found")
        report = doctor.examine()
        assert "Inductor on the CPU: no C++ compiler found" in report.text()
        assert len(report.problems) <= before

    def test_a_compiler_without_pythons_headers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compat.sysconfig, "get_path", lambda name: str(tmp_path))
        assert "python3-dev" in (doctor.examine().inductor_obstacle or "")

    def test_a_torch_that_cannot_be_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        report = doctor.examine()
        assert any(each.what.startswith("import torch fails") for each in report.problems)
        assert "unknown" in report.text()
