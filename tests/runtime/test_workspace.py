"""A captured step serves the batches after its own: what is read anew, and when it is captured again."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

import specc
from specc.runtime import device_graph, session, workspace
from specc.runtime.batch import bucket_of
from specc.runtime.cache import PagedCache
from specc.runtime.workspace import Workspace
from tests import recurrent
from tests.families import noisy_copy, tiny

VOCAB = 90


class FrozenGraph:
    """Runs what it was given at capture whatever has changed since, and counts captures."""

    captures: ClassVar[int] = 0
    takes_lengths: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        self.num_nodes: int | None = 1
        self._program: Callable[[], None] | None = None

    def capture(self, program: Callable[[], None]) -> None:
        FrozenGraph.captures += 1
        # Kernels run once before a capture; rows that are done must not move.
        program()
        self._program = program

    def patch(self, seq_lens: torch.Tensor) -> None:
        raise AssertionError("nobody asked for lengths")

    def replay(self) -> None:
        assert self._program is not None
        self._program()


class _Record(TorchDispatchMode):
    """Takes down the operators that run, on which tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class RecordedGraph(FrozenGraph):
    """Replays the operators of one run on the tensors of that run: what moves is not seen, as on a device.

    Sees through eager forwards only.
    """

    def capture(self, program: Callable[[], None]) -> None:
        super().capture(program)
        with _Record() as record:
            program()
        self._calls = record.calls

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(autouse=True)
def _frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device_graph.GRAPHS, "cpu", FrozenGraph)
    monkeypatch.setattr(device_graph, "FREEZING", {"cpu"})
    FrozenGraph.captures = 0
    workspace.reset()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are recorded operator by operator, which goes for eager forwards."""
    monkeypatch.setitem(device_graph.GRAPHS, "cpu", RecordedGraph)
    monkeypatch.setattr(session, "_keeps", lambda request: True)
    monkeypatch.setitem(DEFAULTS, "compile", False)


DEFAULTS: dict[str, Any] = {"max_new_tokens": 24, "num_draft_tokens": 4, "options": {"inductor": False}}


def batch(*lens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded random prompts of these lengths."""
    torch.manual_seed(seed)
    width = max(lens)
    ids = torch.randint(3, VOCAB, (len(lens), width))
    mask = torch.arange(width) >= width - torch.tensor(lens)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def speculate(model: Any, given: dict[str, torch.Tensor], draft: Any = "ngram", **settings: Any) -> Any:
    return specc.generate(
        model, **given, draft=draft, do_sample=False, return_dict_in_generate=True, **{**DEFAULTS, **settings}
    )


def check(model: Any, given: dict[str, torch.Tensor], draft: Any = "ngram", **settings: Any) -> None:
    plain = {"max_new_tokens": 24, **settings}
    expected = model.generate(**given, do_sample=False, **plain)
    assert torch.equal(speculate(model, given, draft, **settings).sequences, expected)


def drafts(model: Any, kind: str) -> Any:
    return "ngram" if kind == "ngram" else noisy_copy("llama")


@pytest.mark.parametrize("kind", ["ngram", "assistant"])
def test_batches_of_a_kind_share_one_step(kind: str, recorded: None) -> None:
    """Other prompts, lengths, limits and ends; then rows of one prompt, which need fewer pages."""
    model = copy.deepcopy(tiny("llama"))
    draft = drafts(model, kind)
    check(model, batch(9, 5), draft)
    check(model, batch(3, 17, seed=1), draft)
    check(model, batch(30, 2, seed=2), draft, max_new_tokens=40)
    check(model, batch(4, 4, seed=3), draft, max_new_tokens=2)
    same = {name: value.repeat(2, 1) for name, value in batch(11, seed=4).items()}
    check(model, same, draft)
    check(model, batch(9, 5), draft)
    assert FrozenGraph.captures == 1


@pytest.mark.parametrize("kind", ["ngram", "assistant", "itself"])
def test_batches_of_a_bucket_share_one_step(kind: str, recorded: None) -> None:
    """Rows beside those of the request are done from the start, whatever the request's do."""
    model = copy.deepcopy(tiny("llama"))
    draft = model if kind == "itself" else drafts(model, kind)
    check(model, batch(9, 5, 7, 3, seed=1), draft)
    check(model, batch(9, 5, 7), draft)
    check(model, batch(1, 1, 1, seed=2), draft)
    plain = model.generate(**batch(4, 9, 2, seed=3), do_sample=False, max_new_tokens=24)
    check(model, batch(4, 9, 2, seed=3), draft, eos_token_id=int(plain[1, 14]), pad_token_id=0)
    assert FrozenGraph.captures == 2, "one without ids that end a row, one with"


@pytest.mark.parametrize("lowering", ["replay", "snapshot"])
def test_idle_rows_beside_recurrent_states(lowering: str, recorded: None) -> None:
    model = recurrent.build("falcon_h1")
    ids = recurrent.prompt(3, 12)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"inductor": False, "state_commit": lowering}
    expected = model.generate(**given, do_sample=False, max_new_tokens=24)
    output = speculate(model, given, model, options=options)
    assert torch.equal(output.sequences, expected)
    assert output.speculation.acceptance == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (17, 24), (128, 128), (129, 192)])
def test_buckets(rows: int, bucket: int) -> None:
    assert bucket_of(rows) == bucket


def test_ids_that_end_a_row_are_read_anew(recorded: None) -> None:
    model = copy.deepcopy(tiny("llama"))
    given = batch(9, 5)
    plain = model.generate(**given, do_sample=False, max_new_tokens=24)
    for column in (12, 15):
        check(model, given, eos_token_id=int(plain[0, column]), pad_token_id=0)
    assert FrozenGraph.captures == 1


@pytest.mark.parametrize(("family", "lowering"), [("qwen3_5", "replay"), ("falcon_h1", "snapshot")])
def test_recurrent_states_are_read_anew(family: str, lowering: str, recorded: None) -> None:
    model = recurrent.build(family)
    options = {"inductor": False, "state_commit": lowering}
    one = {"input_ids": recurrent.prompt(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    other = {
        "input_ids": recurrent.prompt(2, 7, seed=8),
        "attention_mask": torch.ones(2, 7, dtype=torch.int64),
    }
    same = {name: value[:1].repeat(2, 1) for name, value in one.items()}
    for given in (one, other, same, one):
        expected = model.generate(**given, do_sample=False, max_new_tokens=24)
        assert torch.equal(speculate(model, given, model, options=options).sequences, expected)
    assert FrozenGraph.captures == 1


def test_another_kind_of_batch_has_a_step_of_its_own() -> None:
    model = copy.deepcopy(tiny("llama"))
    check(model, batch(9, 5))
    assert speculate(model, batch(9, 5), num_draft_tokens=3).speculation.capture_seconds > 0
    assert speculate(model, batch(9, 5), noisy_copy("llama"), num_draft_tokens=3).sequences.shape[1] == 33
    check(model, batch(9, 5, 4))
    check(model, batch(9, 5), max_new_tokens=600)
    assert FrozenGraph.captures == 5


def moved(model: Any) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data * 1.5


def rescaled(model: Any) -> None:
    """No tensor tells: torch's guards do."""
    model.model.layers[0].self_attn.scaling *= 1.7


def replaced(model: Any) -> None:
    torch.manual_seed(5)
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False).eval()


class Steered(torch.nn.Module):
    """Holds a tensor that is neither a parameter nor a buffer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.by = torch.zeros(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by


def steered(model: Any) -> None:
    torch.manual_seed(6)
    model.model.norm[1].by = torch.randn(model.config.hidden_size)


def masked_otherwise(model: Any) -> None:
    """Eager attention takes masks to be added, where others take bools."""
    model.set_attn_implementation("eager")
    rescaled(model)


@pytest.mark.parametrize("change", [moved, rescaled, replaced, steered, masked_otherwise])
def test_a_model_that_has_changed_is_captured_again(change: Callable[[Any], None]) -> None:
    model, given = copy.deepcopy(tiny("llama")), batch(9, 5)
    if change is steered:
        model.model.norm = torch.nn.Sequential(model.model.norm, Steered(model.config.hidden_size))
    check(model, given)
    before = speculate(model, given).sequences
    change(model)
    check(model, given)
    assert not torch.equal(speculate(model, given).sequences, before), "the change must show"
    assert FrozenGraph.captures == 2


def test_a_change_that_is_taken_back_is_a_change() -> None:
    """Torch still has the code for the model as it was; the step is of the model as it became."""
    model, given = copy.deepcopy(tiny("llama")), batch(9, 5)
    attention = model.model.layers[0].self_attn
    for scaling in (attention.scaling, 1.7 * attention.scaling, attention.scaling):
        attention.scaling = scaling
        check(model, given)
    assert FrozenGraph.captures == 3


def test_prompts_of_one_token_and_a_table_of_positions_that_ends(recorded: None) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_positions=32, n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB, bos_token_id=None, eos_token_id=None
    )
    check(GPT2LMHeadModel(config).eval(), batch(1, 1, 1), max_new_tokens=31, pad_token_id=0)


def test_a_row_that_says_what_an_idle_row_does(recorded: None) -> None:
    """Sliding windows: an idle row has fewer pages to share than a row of the request."""
    given = batch(2, 2, 2)
    given["input_ids"][1] = 0
    check(copy.deepcopy(tiny("gemma3")), given, max_new_tokens=300, prefill_chunk_size=8, pad_token_id=0)


def test_what_one_mode_of_torch_leaves_serves_the_other(recorded: None) -> None:
    model = copy.deepcopy(tiny("llama"))
    with torch.inference_mode():
        check(model, batch(9, 5))
    check(model, batch(9, 5))
    assert FrozenGraph.captures == 1


def test_numbers_that_are_none_do_not_outlive_their_batch(recorded: None) -> None:
    """Latent attention keeps its mask, which cannot hide them."""
    model, given = copy.deepcopy(tiny("deepseek_v3")), batch(9, 5)
    weight = model.model.embed_tokens.weight
    healthy = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
        speculate(model, batch(20, 20))
        weight.copy_(healthy)
    check(model, given)


def test_memory_that_only_others_keep_is_taken_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = copy.deepcopy(tiny("llama")), copy.deepcopy(tiny("llama"))
    speculate(first, batch(9, 5))
    kept = weakref.ref(workspace._KEPT[first])
    monkeypatch.setattr("specc.runtime.cache.free_bytes", lambda _: 0 if kept() is not None else 10**9)
    check(second, batch(9, 5))
    assert kept() is None


def test_a_second_attempt_begins_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first one had made when memory ran out is gone, or there would be even less."""
    pools: list[weakref.ref[PagedCache]] = []
    alive: list[int] = []
    init = PagedCache.__init__

    def noted(self: PagedCache, *args: Any, **kwargs: Any) -> None:
        pools.append(weakref.ref(self))
        init(self, *args, **kwargs)

    def free(_: Any) -> int:
        alive.append(sum(pool() is not None for pool in pools))
        return 0 if len(alive) == 2 else 10**9

    monkeypatch.setattr(PagedCache, "__init__", noted)
    monkeypatch.setattr("specc.runtime.cache.free_bytes", free)
    check(copy.deepcopy(tiny("llama")), batch(9, 5), noisy_copy("llama"))
    assert alive == [1, 2, 1, 2]


def test_weights_changed_in_place_need_no_capture() -> None:
    model, given = copy.deepcopy(tiny("llama")), batch(9, 5)
    check(model, given)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    check(model, given)
    assert FrozenGraph.captures == 1


def test_torchs_reset_lets_go() -> None:
    model, given = copy.deepcopy(tiny("llama")), batch(9, 5)
    check(model, given)
    torch.compiler.reset()
    check(model, given)
    assert FrozenGraph.captures == 2


class Breaks:
    """A streamer that fails at its third token."""

    def __init__(self) -> None:
        self.left = 4

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise ZeroDivisionError

    def end(self) -> None: ...


def test_a_call_that_was_broken_off_leaves_nothing_behind() -> None:
    model, given = copy.deepcopy(tiny("llama")), batch(9)
    check(model, given)
    with pytest.raises(ZeroDivisionError):
        speculate(model, given, streamer=Breaks(), steps_ahead=3)
    check(model, given)


def test_steps_that_nobody_waited_for_do_not_reach_the_next_call() -> None:
    model, given = copy.deepcopy(tiny("llama")), batch(9, 5)
    plain = model.generate(**given, do_sample=False, max_new_tokens=24)
    ends = {"eos_token_id": int(plain[1, 11]), "pad_token_id": 0}
    expected = model.generate(**given, do_sample=False, max_new_tokens=24, **ends)
    for _ in range(3):
        assert torch.equal(speculate(model, given, steps_ahead=4, **ends).sequences, expected)
    assert FrozenGraph.captures == 1


def test_what_is_kept_dies_with_its_model() -> None:
    model = copy.deepcopy(tiny("llama"))
    draft = copy.deepcopy(noisy_copy("llama"))
    speculate(model, batch(9, 5), draft)
    kept = weakref.ref(next(iter(workspace._KEPT.values())))
    gone = weakref.ref(draft)
    del draft
    gc.collect()
    assert gone() is None, "a draft must not be kept alive by what it drafted for"
    assert kept() is not None
    del model
    gc.collect()
    assert kept() is None


def test_while_debugging_a_weight_that_moves_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(tiny("llama"))

    class Moves:
        def put(self, value: torch.Tensor) -> None:
            moved(model)

        def end(self) -> None: ...

    refused = pytest.raises(specc.SpeccError, match=r"model\.layers\.1\.mlp\.down_proj\.weight was moved")
    with caplog.at_level(logging.DEBUG, "specc.runtime.session"), refused:
        speculate(model, batch(9), streamer=Moves())


BUFFERS = {
    "the batch's text": lambda space: (space.state, "text"),
    "the draft model's layer 0 ring 1": lambda space: (
        space.drafter._assistant.cache.recurrent.layers[0].rings, 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_while_debugging_a_buffer_of_the_step_that_moves_is_named(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch's, and those of a recurrent draft model."""
    spaces: list[Workspace] = []
    captured = Workspace.captured
    monkeypatch.setattr(
        Workspace, "captured", lambda self, graph: (spaces.append(self), captured(self, graph))
    )

    class Moves:
        def put(self, value: torch.Tensor) -> None:
            for space in spaces:
                owner, place = BUFFERS[name](space)
                if isinstance(owner, list):
                    owner[place] = owner[place].clone()
                else:
                    setattr(owner, place, getattr(owner, place).clone())

        def end(self) -> None: ...

    model, draft = recurrent.build("qwen3_5"), recurrent.build("qwen3_5")
    with (
        caplog.at_level(logging.DEBUG, "specc.runtime.session"),
        pytest.raises(specc.SpeccError, match=f"^{name} was moved while"),
    ):
        speculate(model, batch(9), draft=draft, streamer=Moves())


class GraphThatTakesLengths(FrozenGraph):
    """The form for a device whose attention wants lengths as numbers of the host."""

    takes_lengths: ClassVar[bool] = True
    patches: ClassVar[list[list[int]]] = []

    def patch(self, seq_lens: torch.Tensor) -> None:
        self.patches.append(seq_lens.tolist())


def test_lengths_are_patched_before_each_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the rows' own: those that the cache has when the step begins."""
    monkeypatch.setitem(device_graph.GRAPHS, "cpu", GraphThatTakesLengths)
    monkeypatch.setattr(GraphThatTakesLengths, "patches", [])
    model, given, on_device = copy.deepcopy(tiny("llama")), batch(9, 5, 7), []
    speculate(model, given)
    replay = FrozenGraph.replay

    def looks(self: FrozenGraph) -> None:
        space = space_of_now[0]
        on_device.append(space.target.cache.rows.seq_lens.tolist())
        replay(self)

    space_of_now = [workspace._KEPT[model]]
    GraphThatTakesLengths.patches.clear()
    monkeypatch.setattr(FrozenGraph, "replay", looks)
    speculate(model, given, steps_ahead=4)
    assert len(on_device) > 2
    assert GraphThatTakesLengths.patches == on_device
