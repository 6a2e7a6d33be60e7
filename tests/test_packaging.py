"""What an installed specc looks like from outside."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("passes", "lowerings", "runtime")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_finds_the_backend_by_name_alone() -> None:
    run_python(
        "import sys, torch\n"
        "assert 'specc' in torch.compiler.list_backends()\n"
        "assert 'specc' not in sys.modules\n"
        "double = torch.compile(lambda x: x + x, backend='specc', options={'inductor': False})\n"
        "with torch.no_grad(): assert double(torch.ones(2)).tolist() == [2, 2]\n"
        f"assert not set({PARTS}) & set(sys.modules)\n"
    )


def test_importing_specc_imports_neither_torch_nor_transformers() -> None:
    run_python(
        "import sys, specc\n"
        "assert specc.__version__ and specc.SpeccError\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)\n"
    )


def test_versions_agree() -> None:
    assert run_python("import specc; print(specc.__version__)").strip() == importlib.metadata.version(
        "torch-specc"
    )


@pytest.mark.parametrize("name", PARTS)
def test_the_parts_show_at_the_root(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("specc") / name


def test_a_wheel_carries_specc_and_nothing_else(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools", minversion="77.0.3")
    assert setuptools
    source = _copy_of_the_sources(tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"specc"}
    expected = {str(path.relative_to(source)) for path in (source / "specc").rglob("*.py")}
    assert set(names) == expected | {"specc/py.typed"}


def _copy_of_the_sources(target: Path) -> Path:
    target.mkdir()
    shutil.copytree(ROOT / "specc", target / "specc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in PARTS:
        (target / name).symlink_to(Path("specc") / name)
    return target
