"""The whole step as one CUDA graph: the same tokens, nothing that stops the host, clear refusals."""

from __future__ import annotations

import copy
import dataclasses
import gc
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import specc
from specc.runtime import cuda_graph, session
from tests.families import FAMILIES, noisy_copy, prompt, tiny
from tests.gpu.test_recurrent import noisy, wide
from tests.runtime.test_recurrent_equality import inputs as recurrent_inputs

CAPTURED = {"inductor": False}
NEW_TOKENS = 64
# In float32 transformers multiplies its experts one by one, and asks the host how many there are.
READ_BACK = dict.fromkeys(("mixtral", "gpt_oss", "deepseek_v3"), r"transformers.*moe\.py:.*tolist")


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_cuda(model: Any) -> Any:
    return copy.deepcopy(model).cuda()


def inputs(rows: int, width: int = 12) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in prompt(rows, width).items()}


def speculate(model: Any, given: dict[str, torch.Tensor], draft: Any, **settings: Any) -> Any:
    wanted = {"max_new_tokens": NEW_TOKENS, "num_draft_tokens": 4, "options": CAPTURED, **settings}
    return specc.generate(
        model, **given, draft=draft, do_sample=False, return_dict_in_generate=True, **wanted
    )


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_plain_decoding(family: str, rows: int, fresh_compiler: None) -> None:
    model, given = on_cuda(tiny(family)), inputs(rows)
    expected = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    if family in READ_BACK:
        with pytest.raises(specc.SpeccError, match=READ_BACK[family]):
            speculate(model, given, "ngram")
        return
    for draft in ("ngram", on_cuda(noisy_copy(family))):
        output = speculate(model, given, draft)
        assert output.speculation.graph_nodes
        assert torch.equal(output.sequences, expected)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("lowering", ["replay", "snapshot"])
@pytest.mark.parametrize("family", ["qwen3_5", "mamba2", "lfm2", "falcon_h1"])
def test_tokens_of_recurrent_models_equal_plain_decoding(
    family: str, lowering: str, rows: int, fresh_compiler: None
) -> None:
    model = wide(family).cuda()
    given = {name: value.cuda() for name, value in recurrent_inputs(rows).items()}
    expected = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    for draft in ("ngram", noisy(model)):
        output = speculate(model, given, draft, options={**CAPTURED, "state_commit": lowering})
        assert output.speculation.graph_nodes
        assert torch.equal(output.sequences, expected)


@pytest.mark.parametrize("kind", ["ngram", "assistant"])
def test_a_kept_step_serves_other_batches(kind: str, fresh_compiler: None) -> None:
    """Other prompts, lengths, numbers of rows and ends, in the tensors of the batch before."""
    model = on_cuda(tiny("llama"))
    draft = "ngram" if kind == "ngram" else on_cuda(noisy_copy("llama"))
    for number, (rows, width) in enumerate([(4, 12), (3, 30), (4, 10), (4, 19)]):
        given, ends = inputs(rows, width), {"max_new_tokens": NEW_TOKENS - number}
        expected = model.generate(**given, do_sample=False, **ends)
        output = speculate(model, given, draft, **ends)
        assert torch.equal(output.sequences, expected)
        assert (output.speculation.capture_seconds > 0) == (number == 0)


def test_captures_share_one_pool(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    captured, graphs = cuda_graph._captured, []

    def noting(program: Any, pool: Any) -> Any:
        graphs.append(captured(program, pool))
        return graphs[-1]

    monkeypatch.setattr(cuda_graph, "_captured", noting)
    cuda_graph.release_pools()
    model, draft = on_cuda(tiny("llama")), on_cuda(noisy_copy("llama"))
    for rows, kind in ((1, "ngram"), (4, "ngram"), (4, draft)):
        assert speculate(model, inputs(rows), kind).speculation.capture_seconds > 0
    assert len(graphs) == 4, "three steps, and what keeps the pool alive"
    assert len({graph.pool() for graph in graphs}) == len(cuda_graph._PLACES) == 1


@pytest.mark.parametrize("kind", ["ngram", "assistant"])
def test_inductors_kernels_are_captured_too(kind: str, fresh_compiler: None) -> None:
    model, given = on_cuda(tiny("llama")), inputs(4)
    draft = "ngram" if kind == "ngram" else on_cuda(noisy_copy("llama"))
    expected = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(speculate(model, given, draft, options={}).sequences, expected)


def outcome(output: Any) -> Any:
    """What must not depend on time."""
    kept = ("steps", "new_tokens", "mean_accepted_length", "acceptance")
    return output.sequences.tolist(), [dataclasses.asdict(output.speculation)[name] for name in kept]


def test_results_do_not_depend_on_how_steps_are_run(fresh_compiler: None) -> None:
    """EOS in the middle of blocks, rows of different ends, up to 5 steps queued, with and without a graph."""
    model, draft, given = on_cuda(tiny("llama")), on_cuda(noisy_copy("llama")), inputs(4)
    plain = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    eos = [int(plain[0, 20]), int(plain[2, 33])]
    settings: dict[str, Any] = {"eos_token_id": eos, "pad_token_id": 0}
    expected = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
    first = speculate(model, given, draft, steps_ahead=1, **settings)
    assert torch.equal(first.sequences, expected)
    for ahead in (2, 3, 5):
        assert outcome(speculate(model, given, draft, steps_ahead=ahead, **settings)) == outcome(first)
    assert outcome(speculate(model, given, draft, device_graph="off", **settings)) == outcome(first)
    assert outcome(speculate(model, given, draft, compile=False, **settings))[0] == outcome(first)[0]


class Stream:
    """Tokens as they come, the prompt's first."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens += tokens.flatten().tolist()

    def end(self) -> None: ...


class Until:
    """A criterion of the user's: stops at a length, and reads what it is shown on the device."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **settings: Any) -> torch.Tensor:
        self.seen = max(self.seen, int((input_ids >= 0).sum()))
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


@pytest.mark.parametrize("kind", ["ngram", "assistant"])
def test_streamers_and_criteria_see_what_one_step_at_a_time_shows(kind: str, fresh_compiler: None) -> None:
    model, given = on_cuda(tiny("llama")), inputs(1)
    draft = "ngram" if kind == "ngram" else on_cuda(noisy_copy("llama"))
    length = given["input_ids"].shape[1] + 31
    expected = model.generate(**given, max_new_tokens=31, do_sample=False)
    for ahead in (1, 2, 5):
        stream, until = Stream(), Until(length)
        output = speculate(model, given, draft, steps_ahead=ahead, streamer=stream, stopping_criteria=[until])
        assert torch.equal(output.sequences, expected)
        assert stream.tokens == expected[0].tolist()
        assert until.seen == length


def test_a_pool_that_does_not_fit_while_replays_are_queued(fresh_compiler: None) -> None:
    """Pages are a batch's own before its first step, so only another batch's can be missing meanwhile."""
    model, other, given = on_cuda(tiny("llama")), on_cuda(tiny("gemma3")), inputs(1)
    expected = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    errors: list[str] = []

    class Greedy(Stream):
        def put(self, tokens: torch.Tensor) -> None:
            super().put(tokens)
            if len(self.tokens) == 30 and not errors:
                with pytest.raises(specc.SpeccError, match=r"(?i)memory|pages") as caught:
                    speculate(other, given, "ngram", max_new_tokens=2**36)
                errors.append(str(caught.value))

    for _ in range(2):
        speculate(model, given, "ngram")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    stream = Greedy()
    output = speculate(model, given, "ngram", steps_ahead=5, streamer=stream)
    assert errors
    assert torch.equal(output.sequences, expected)
    assert stream.tokens == expected[0].tolist()
    del output
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
    assert torch.equal(speculate(model, given, "ngram").sequences, expected)


@pytest.fixture
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Any synchronisation that torch knows of is an error inside the loop; profiles of it are collected."""
    run = session._Loop._run
    profiles: list[Any] = []

    def watched(self: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                run(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        profiles.append(seen)

    monkeypatch.setattr(session._Loop, "_run", watched)
    return profiles


SYNCHRONISING = ("cudaStreamSynchronize", "cudaMemcpy", "cudaMalloc", "cudaFree", "cudaHostAlloc")


@pytest.mark.parametrize("kind", ["ngram", "assistant"])
def test_nothing_in_the_loop_stops_the_host(kind: str, no_syncs: list[Any], fresh_compiler: None) -> None:
    model, given = on_cuda(tiny("llama")), inputs(4)
    draft = "ngram" if kind == "ngram" else on_cuda(noisy_copy("llama"))
    # A row stops on the way, of which the host tells the device.
    eos = int(model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)[0, 30])
    output = speculate(model, given, draft, eos_token_id=[eos], pad_token_id=0)
    assert output.sequences[0, -1] == 0
    calls = {event.key: event.count for event in no_syncs[0].key_averages()}
    print({name: count for name, count in calls.items() if name.startswith("cuda")})
    # A profile synchronises once itself, when it ends.
    assert calls.pop("cudaDeviceSynchronize", 0) <= 1
    assert not [name for name in SYNCHRONISING if name in calls]
    assert calls["cudaGraphLaunch"] <= output.speculation.batch_steps + 2


# Prompt lookup, acceptance and bookkeeping; a forward; each draft of an assistant.
@pytest.mark.parametrize(("kind", "most"), [("ngram", 140), ("assistant", 235)])
def test_the_step_does_not_grow(kind: str, most: int, fresh_compiler: None) -> None:
    """Nodes of a step of a model of two layers with Inductor's kernels: 126 and 213 when this was written."""
    model = on_cuda(tiny("llama"))
    draft = "ngram" if kind == "ngram" else on_cuda(noisy_copy("llama"))
    nodes = speculate(model, inputs(1), draft, options={}).speculation.graph_nodes
    print(f"{kind}: {nodes} nodes")
    assert nodes is not None
    assert nodes <= most


@torch.library.custom_op("specc_tests::reads_back", mutates_args=())
def reads_back(x: torch.Tensor) -> torch.Tensor:
    return x * float(x.abs().max() >= 0)


@reads_back.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class ReadsBack(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reads_back(x)


@pytest.mark.parametrize("options", [CAPTURED, {}])
def test_a_step_that_cannot_be_captured_is_refused_by_name(
    options: dict[str, Any], fresh_compiler: None
) -> None:
    """By the operator, the line of the model that calls it, and the operator's own line."""
    model, given = on_cuda(tiny("llama")), inputs(1)
    expected = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    model.model.norm = torch.nn.Sequential(model.model.norm, ReadsBack())
    who = r"one device graph: specc_tests\.reads_back, called at .*: return reads_back\(x\), in .*"
    with pytest.raises(specc.SpeccError, match=who + r"x\.abs\(\)\.max\(\) >= 0"):
        speculate(model, given, "ngram", options=options)
    output = speculate(model, given, "ngram", options=options, device_graph="try")
    assert output.speculation.graph_nodes is None
    assert torch.equal(output.sequences, expected)
    other = speculate(on_cuda(tiny("llama")), given, "ngram", options=options)
    assert other.speculation.graph_nodes
    assert torch.equal(other.sequences, expected)


def resident() -> int:
    """Bytes of this process in the host's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("kind", ["ngram", "assistant"])
def test_a_thousand_calls_take_no_more_memory_than_twenty(kind: str, fresh_compiler: None) -> None:
    """In turn of two rows and of one, each of which captures a step in the place of the other's."""
    model = on_cuda(tiny("llama"))
    draft = "ngram" if kind == "ngram" else on_cuda(noisy_copy("llama"))
    batches = [inputs(2), inputs(2), inputs(1)]
    expected = [model.generate(**each, max_new_tokens=4, do_sample=False) for each in batches]
    taken, host = [], []
    for call in range(1000):
        given, tokens = batches[call % 3], expected[call % 3]
        assert torch.equal(speculate(model, given, draft, max_new_tokens=4).sequences, tokens)
        if call in (20, 998):
            gc.collect()
            torch.cuda.synchronize()
            taken.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
            host.append(resident())
    print(f"{kind}: device {taken}, host {host}")
    assert taken[0] == taken[1]
    assert host[1] < host[0] + 2**26


def test_two_models_take_turns(fresh_compiler: None) -> None:
    models = [on_cuda(tiny("llama")), on_cuda(tiny("gemma3"))]
    given = inputs(2)
    expected = [each.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False) for each in models]
    for _ in range(2):
        for model, tokens in zip(models, expected, strict=True):
            assert torch.equal(speculate(model, given, "ngram").sequences, tokens)


@pytest.mark.parametrize("streams", ["default", "own"])
@pytest.mark.parametrize("shared", [True, False])
def test_two_threads(shared: bool, streams: str, fresh_compiler: None) -> None:
    """On one model or on two."""
    first = on_cuda(tiny("llama"))
    models = [first, first if shared else on_cuda(tiny("gemma3"))]
    given = [inputs(1), inputs(3)]
    expected = [
        model.generate(**each, max_new_tokens=NEW_TOKENS, do_sample=False)
        for model, each in zip(models, given, strict=True)
    ]

    torch.cuda.synchronize()

    def work(index: int) -> list[Any]:
        stream = torch.cuda.Stream() if streams == "own" else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            found = [speculate(models[index], given[index], "ngram").sequences for _ in range(5)]
        stream.synchronize()
        return found

    with ThreadPoolExecutor(2) as pool:
        for results, tokens in zip(pool.map(work, range(2)), expected, strict=True):
            assert all(torch.equal(each, tokens) for each in results)
