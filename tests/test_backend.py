"""torch.compile(model, backend="specc"): options, caching, shapes, mutation, refusal to train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import CompileConfig

import specc
from specc import pipeline
from specc.errors import OptionError, UnsupportedError
from tests.families import prompt, tiny

AS_CAPTURED = {"inductor": False}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "SPECC"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foo": 1}, "no option 'foo'; valid options: inductor .*disable_passes .*providers .*dump"),
        ({"inductor": "yes"}, "'inductor' must be True, False or None, got 'yes' .str.; valid options"),
        ({"disable_passes": "greedy_select"}, "'disable_passes' must be a list of pass names"),
        ({"providers": {"greedy_select": 3}}, "'providers' must be a dict of op name -> provider name"),
        ({"max_autotune": 1}, "'max_autotune' must be True or False"),
        ({"providers": {"no_such_op": "triton"}}, "no operator 'no_such_op'.*greedy_select"),
        ({"disable_passes": ["no_such_pass"]}, "no pass 'no_such_pass'.*canonicalize"),
    ],
)
def test_wrong_options_name_the_valid_ones(options: Any, message: str, fresh_compiler: None) -> None:
    compiled = torch.compile(lambda x: x + 1, backend="specc", options=options)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        compiled(torch.ones(2))
    assert isinstance(caught.value.inner_exception, OptionError)
    with pytest.raises(OptionError, match=message):
        raise caught.value.inner_exception


def test_options_must_be_a_mapping() -> None:
    with pytest.raises(OptionError, match="a dict or specc.Options, got list"):
        specc.Options.parse([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "dynamic"),
    [(AS_CAPTURED, False), (AS_CAPTURED, None), (AS_CAPTURED, True), ({}, False), ({}, True)],
)
def test_a_model_over_growing_shapes(options: Any, dynamic: bool | None, fresh_compiler: None) -> None:
    model = tiny("llama")
    compiled = torch.compile(model, backend="specc", options=options, dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        for width in (5, 9):
            ids = torch.randint(3, 100, (2, width))
            torch.testing.assert_close(
                compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
            )


def test_generate_with_a_compile_config(fresh_compiler: None) -> None:
    """Stock generate over a static cache compiles its decode step with specc, here off the GPU, too."""
    model = tiny("llama")
    config = CompileConfig(backend="specc")
    config._compile_all_devices = True
    settings = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**prompt(2), **settings, disable_compile=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    tokens = model.generate(**prompt(2), **settings, compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    assert torch.equal(tokens, expected)


def test_training_is_refused(fresh_compiler: None) -> None:
    layer = torch.nn.Linear(3, 3)
    compiled = torch.compile(layer, backend="specc", options=AS_CAPTURED)
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(torch.ones(2, 3))
    assert isinstance(caught.value.inner_exception, UnsupportedError)
    assert "torch.no_grad()" in str(caught.value.inner_exception)
    with torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones(2, 3)), layer(torch.ones(2, 3)))


def update(cache: torch.Tensor, at: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    cache.index_copy_(0, at, x)
    cache[0:1] = x[:1] * 2
    return cache.sum(dim=0)


@pytest.mark.parametrize("options", [AS_CAPTURED, {}])
def test_mutation_reaches_the_callers_tensors(options: Any, fresh_compiler: None) -> None:
    caches = [torch.arange(12.0).reshape(6, 2) for _ in range(2)]
    at, x = torch.tensor([2, 4]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    with torch.no_grad():
        expected = update(caches[0], at, x)
        result = torch.compile(update, backend="specc", options=options, fullgraph=True)(caches[1], at, x)
    assert torch.equal(result, expected)
    assert torch.equal(caches[0], caches[1])


def test_without_inductor_in_place_ops_stay_in_place(fresh_compiler: None, tmp_path: Path) -> None:
    """A functional graph run as it stands would copy whole caches; so none is made on this path."""
    cache, at, x = torch.zeros(6, 2), torch.tensor([2]), torch.ones(1, 2)
    with torch.no_grad():
        torch.compile(update, backend="specc", options={**AS_CAPTURED, "dump": str(tmp_path)})(cache, at, x)
    (code,) = tmp_path.glob("graph_000/*_aten_choose_providers.after.py")
    assert "aten.index_copy_.default" in code.read_text()
    assert "aten.clone" not in code.read_text()


def test_no_cpp_compiler_is_said_in_one_line(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.cpp_obstacle.cache_clear()
    monkeypatch.setattr(pipeline.compat, "cpp_compiler_obstacle", lambda: "no working C++ compiler found")
    model = tiny("llama")
    try:
        settings = {"max_new_tokens": 10, "do_sample": False}
        for _ in range(2):
            tokens = specc.generate(model, **prompt(1), draft="ngram", **settings)
    finally:
        pipeline.cpp_obstacle.cache_clear()
    assert torch.equal(tokens, model.generate(**prompt(1), **settings))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == ["specc runs its graphs without Inductor: no working C++ compiler found"]


CACHED = """
import json, torch
options = json.loads({options!r})
def select(x):
    return torch.softmax(x * 2, -1).topk(1).indices
compiled = torch.compile(select, backend="specc", options=options, fullgraph=True)
with torch.no_grad():
    compiled(torch.randn(2, 33))
from torch._dynamo.utils import counters
print(json.dumps(dict(counters["aot_autograd"])))
"""


def test_compiled_graphs_are_kept_between_processes(tmp_path: Path) -> None:
    """A second process does not run the passes; other options compile afresh, and so do other sources."""

    def compile_in_a_process(options: Any, logs: str = "+specc") -> tuple[dict[str, int], str]:
        done = run_python(
            CACHED.format(options=json.dumps(options)),
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
            TORCH_LOGS=logs,
        )
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    first, log = compile_in_a_process({})
    assert first.get("autograd_cache_miss") == 1
    assert "greedy_select: fired" in log
    second, log = compile_in_a_process({})
    assert second.get("autograd_cache_hit") == 1
    assert "greedy_select: fired" not in log
    assert "ATen passes did not run" in log
    other, log = compile_in_a_process({"disable_passes": ["greedy_select"]})
    assert other.get("autograd_cache_miss") == 1
    assert "greedy_select: fired" not in log


def test_modes_ask_inductor_for_what_they_mean_but_not_for_its_device_graphs() -> None:
    """specc captures whole steps itself: Inductor's graph trees would capture within them."""
    patches = pipeline._config_patches(specc.Options(max_autotune=True), "reduce-overhead")
    assert patches == {"max_autotune": True}
    assert "max_autotune" in pipeline._config_patches(specc.Options(), "max-autotune-no-cudagraphs")
    assert pipeline._config_patches(specc.Options(), None) == {}


def test_the_cache_key_covers_sources_options_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(options: Any = None, devices: tuple[str, ...] = ("cpu",)) -> str:
        return pipeline.cache_key(specc.Options.parse(options), devices, {})

    keys = {key(), key({"disable_passes": ["prune_logits"]}), key(devices=("cuda",))}
    assert len(keys) == 3
    assert key() == key({"dump": "elsewhere"}), "a dump does not change the code"
    before = key()
    monkeypatch.setattr(pipeline, "sources_hash", lambda: "changed")
    assert key() != before


def test_live_remarks_need_no_registration() -> None:
    done = run_python(
        "import torch\n"
        "compiled = torch.compile(lambda x: x.softmax(-1).topk(1), backend='specc',"
        " options={'inductor': False})\n"
        "with torch.no_grad(): compiled(torch.randn(2, 9))\n",
        TORCH_LOGS="+specc",
    )
    assert "greedy_select: fired" in done.stderr
    assert "x.softmax(-1)" not in done.stdout


def test_options_are_checked_however_they_are_made() -> None:
    with pytest.raises(OptionError, match="'inductor' must be"):
        specc.Options(inductor="yes")  # type: ignore[arg-type]
    made = specc.Options(providers={"linear": "reference"})  # type: ignore[arg-type]
    assert made == specc.Options.parse({"providers": {"linear": "reference"}}) == specc.Options.parse(made)
    assert hash(made) == hash(specc.Options(providers=(("linear", "reference"),)))


def test_a_mode_that_torch_does_not_have(fresh_compiler: None) -> None:
    with pytest.raises(OptionError, match="mode='bogus' is none of torch.compile's modes"):
        pipeline._config_patches(specc.Options(), "bogus")


def test_a_pass_that_fails_ends_the_compile_by_name() -> None:
    from specc.errors import PassError
    from specc.passes.framework import Pass, PassContext, PassResult, run_passes

    def fails(gm: Any, context: PassContext) -> PassResult:
        raise AssertionError("no fake tensor")

    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(PassError, match="pass toy failed .AssertionError.*'disable_passes': .'toy'"):
        run_passes(gm, [Pass("toy", "aten", fails)], PassContext(specc.Options()))


VERIFY = """
import json, torch, specc
from torch._dynamo.utils import counters
from tests.families import prompt, tiny
torch.set_num_threads(1)
model = tiny("llama")
settings = {"max_new_tokens": 24, "do_sample": False}
tokens = specc.generate(model, **prompt(2), draft="ngram", options={"inductor": True}, **settings)
assert torch.equal(tokens, model.generate(**prompt(2), **settings))
print(json.dumps(dict(counters["aot_autograd"])))
"""


def test_a_models_graphs_are_kept_between_processes(tmp_path: Path) -> None:
    """Prefill and verify, with what they write in place: the pool. Tokens are compared in each process."""
    counts = []
    for _ in range(2):
        done = run_python(
            VERIFY, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), PYTHONPATH=str(Path(__file__).parents[1])
        )
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    assert counts[0].get("autograd_cache_miss") == 2
    assert counts[1].get("autograd_cache_hit") == 2
