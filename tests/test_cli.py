"""The command line, on a tiny random model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specc import __version__, comparison, models
from specc.cli import main
from specc.progress import part, stage
from tests.tiny import build_tiny_tokenizer, save_tiny_llama

PROMPT = "a b c d a b c d a b"
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plain_text(tiny_llama: str) -> str:
    """What the model says to PROMPT, by its own generate."""
    tokenizer = build_tiny_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    inputs = models.encode(tokenizer, PROMPT, system=None, raw=True)
    sequences = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    text = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def generate(model: str, *more: str) -> int:
    return main(
        ["generate", model, "--prompt", PROMPT, "--no-inductor", "--max-new-tokens", str(NEW_TOKENS), *more]
    )


class TestGenerate:
    def test_streams_what_plain_decoding_says(
        self, tiny_llama: str, plain_text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert generate(tiny_llama) == 0
        printed = capsys.readouterr()
        assert printed.out.strip() == plain_text
        assert f"specc: {NEW_TOKENS} tokens" in printed.err

    def test_says_what_takes_time(self, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
        generate(tiny_llama)
        announced = [line.partition(" ...")[0] for line in capsys.readouterr().err.splitlines()]
        assert announced[:3] == [
            "specc: starting PyTorch and Transformers",
            "specc: loading weights",
            "specc: reading the prompt and compiling",
        ]

    def test_compares_with_plain_decoding(
        self, tiny_llama: str, plain_text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert generate(tiny_llama, "--compare", "--quiet") == 0
        printed = capsys.readouterr()
        text, *table = printed.out.splitlines()
        rows = {row[:25].strip(): row[25:].strip() for row in table}
        assert text.strip() == plain_text
        assert rows["tokens"] == str(NEW_TOKENS)
        assert rows["identical"] == "yes"
        assert float(rows["tokens per second"]) > 0
        assert float(rows["plain tokens per second"]) > 0
        assert float(rows["ratio"]) > 0
        assert rows["mean accepted length"].endswith("of 4")
        assert "compile seconds" in rows
        assert printed.err == ""

    def test_different_tokens_are_an_exit_code(
        self, tiny_llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(comparison, "_plain", lambda task, length: comparison.Run([0] * length, 1.0))
        assert generate(tiny_llama, "--compare", "--quiet") == 1
        assert capsys.readouterr().out.splitlines()[-1].split() == ["identical", "no"]

    def test_a_model_may_draft(self, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert generate(tiny_llama, "--draft", tiny_llama, "--compare", "--num-draft-tokens", "3") == 0
        assert "of 3" in capsys.readouterr().out

    def test_the_prompt_may_come_from_a_file_or_stdin(
        self,
        tiny_llama: str,
        plain_text: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        file = tmp_path / "prompt.txt"
        file.write_text(PROMPT)
        monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
        common = ["generate", tiny_llama, "--no-inductor", "--quiet", "--max-new-tokens", str(NEW_TOKENS)]
        for source in (str(file), "-"):
            assert main([*common, "--prompt-file", source]) == 0
            assert capsys.readouterr().out.strip() == plain_text


def bench(model: str, *more: str) -> int:
    few = ["--no-inductor", "--quiet", "--repeats", "1", "--max-new-tokens", str(NEW_TOKENS)]
    return main(["bench", model, "--prompt", PROMPT, *few, *more])


class TestBench:
    def test_a_row_for_each_way(
        self, tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "result.json"
        more = ["--draft", tiny_llama, "--num-draft-tokens", "3", "4", "--json", str(file)]
        assert bench(tiny_llama, *more) == 0
        printed = capsys.readouterr()
        names = [row["name"] for row in json.loads(file.read_text())["rows"]]
        assert names == [
            "generate",
            "generate, assistant of 2",
            "generate, assistant of 3",
            "specc, 1 a step",
            "specc, 3 a step",
            "specc, 4 a step",
        ]
        assert [line[:34].strip() for line in printed.out.splitlines()[2:]] == names
        assert printed.err == ""

    @pytest.mark.parametrize(("dtype", "code"), [("float32", 1), ("bfloat16", 0)])
    def test_other_tokens_are_an_exit_code_where_rounding_is_no_excuse(
        self, dtype: str, code: int, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        different = SimpleNamespace(identical=False, table=lambda: "")
        monkeypatch.setattr("specc.bench.run", lambda task, quiet: different)
        assert bench(tiny_llama, "--dtype", dtype) == code

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--repeats", "0"], "--repeats must be 1 at least, got 0"),
            (["--max-new-tokens", "1"], "--max-new-tokens must be 2 at least, got 1"),
            (["--device", "cuda"], "no CUDA device"),
        ],
    )
    def test_refusals(
        self,
        arguments: list[str],
        message: str,
        tiny_llama: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert bench(tiny_llama, *arguments) == 2
        assert message in capsys.readouterr().err


class TestRefusals:
    def test_a_specc_error_is_one_line(self, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert generate(tiny_llama, "--num-draft-tokens", "65", "--quiet") == 2
        error = capsys.readouterr().err
        assert error.startswith("specc: error: num_draft_tokens must be")
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["generate", "./none", "--prompt", "a"], "cannot load the model './none'"),
            (["generate", "./none", "--prompt-file", "./none.txt"], "cannot read the prompt file"),
            (["dump", "./none", "-o", "somewhere"], "cannot load the model './none'"),
        ],
    )
    def test_what_is_not_there(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*arguments, "--quiet"]) == 2
        assert message in capsys.readouterr().err

    def test_a_system_message_without_a_template(
        self, tiny_llama: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert generate(tiny_llama, "--system", "a", "--quiet") == 2
        assert "chat template" in capsys.readouterr().err

    def test_an_interrupt_is_no_traceback(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupted(name: str, *, quiet: bool) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(models, "load", interrupted)
        assert generate("smollm2", "--quiet") == 130
        assert capsys.readouterr().err == "specc: interrupted\n"

    @pytest.mark.parametrize("arguments", [[], ["generate", "m"], ["dump", "m"], ["bench"]])
    def test_wrong_arguments(self, arguments: list[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


class TestDump:
    @pytest.mark.parametrize(("role", "graphs"), [("verify", 2), ("draft", 3)])
    def test_writes_one_folder_per_graph(
        self, role: str, graphs: int, tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "dump"
        arguments = ["dump", tiny_llama, "-o", str(folder), "--role", role, "--no-inductor", "--quiet"]
        assert main(arguments) == 0
        assert capsys.readouterr().out.strip() == str(folder / "index.md")
        assert len(json.loads((folder / "index.json").read_text())) == graphs
        assert len(list(folder.glob("graph_*/remarks.json"))) == graphs


class TestDoctor:
    def test_json_is_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        code = main(["doctor", "--json"])
        report = json.loads(capsys.readouterr().out)
        assert code == (1 if report["problems"] else 0)
        assert report["versions"]["torch"] == torch.__version__

    def test_text_names_every_section(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["doctor"])
        lines = capsys.readouterr().out.splitlines()
        sections = [line for line in lines if not line.startswith(" ")]
        assert sections == ["system", "packages", "devices", "torch.compile", "operators", "problems"]


class TestStart:
    def test_help_and_wrong_arguments_do_not_import_torch(self) -> None:
        code = (
            "import sys\n"
            "from specc.cli import main\n"
            "try: main(['--version'])\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == f"specc {__version__}\n"

    def test_python_dash_m(self) -> None:
        command = [sys.executable, "-m", "specc", "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"specc {__version__}\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestStage:
    def test_one_line_with_the_seconds(self) -> None:
        stream = io.StringIO()
        with stage("working", stream=stream):
            assert stream.getvalue() == "specc: working ..."
        assert stream.getvalue() == "specc: working ... 0.0 s\n"

    def test_quiet_prints_nothing(self) -> None:
        stream = io.StringIO()
        with stage("working", quiet=True, stream=stream):
            pass
        assert stream.getvalue() == ""

    def test_a_terminal_line_is_rewritten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("specc.progress.TICK_SECONDS", 0.01)
        stream = _Terminal()
        with stage("working", stream=stream):
            while "\r" not in stream.getvalue():
                pass
        *rewritten, last, end = stream.getvalue().replace("\n", "\r").split("\r")
        assert all(line.startswith("specc: working ...") for line in rewritten)
        assert last == "specc: working ... 0.0 s"
        assert end == ""

    def test_a_failure_ends_the_line_too(self) -> None:
        stream = io.StringIO()
        with pytest.raises(ValueError, match="no"), stage("working", stream=stream):
            raise ValueError("no")
        assert stream.getvalue() == "specc: working ... failed after 0.0 s\n"

    def test_a_part_shows_in_its_stages_line_while_it_lasts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("specc.progress.TICK_SECONDS", 0.01)
        stream = _Terminal()
        with stage("working", stream=stream):
            with part("screwing", stream=stream):
                while "screwing" not in stream.getvalue():
                    pass
            while not stream.getvalue().split("\r")[-1].startswith("specc: working ... 0 s"):
                pass
        assert stream.getvalue().splitlines()[-1].split("\r")[-1].rstrip() == "specc: working ... 0.0 s"

    def test_a_part_by_itself_speaks_up_only_if_it_takes_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = io.StringIO()
        with part("screwing", stream=stream):
            pass
        assert stream.getvalue() == ""
        monkeypatch.setattr("specc.progress.PATIENCE_SECONDS", 0.01)
        with part("screwing", stream=stream):
            while not stream.getvalue():
                pass
        assert stream.getvalue() == "specc: screwing ... 0.0 s\n"
        with part("screwing", quiet=True, stream=stream):
            pass
        assert stream.getvalue().count("screwing") == 1
