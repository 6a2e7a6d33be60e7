"""Models with recurrent layers on a CUDA device: tokens, and that nothing drifts over thousands of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import specc
from specc.lowerings.triton_kernels import gated_delta_rule
from specc.runtime import reports
from tests.recurrent import FAMILIES, build, prompt
from tests.runtime.test_recurrent_equality import inputs

NEW_TOKENS = 64
# The gated delta rule's kernels begin at heads of 16.
WIDE = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def wide(family: str, **changes: Any) -> Any:
    """A tiny model with heads that the kernels take."""
    return build(family, **(WIDE if "linear_key_head_dim" in FAMILIES[family][2] else {}), **changes)


def noisy(model: Any) -> Any:
    """A copy that agrees with the model now and then."""
    draft = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0)
    return draft


def speculate(model: Any, given: dict[str, torch.Tensor], draft: Any, **settings: Any) -> Any:
    usual = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_draft_tokens": 4}
    # In float32, experts ask the host for their numbers, which no graph of a device can.
    settings = {**usual, "device_graph": "try", **settings}
    return specc.generate(model, **given, draft=draft, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("settings", [{"compile": False}, {"options": {"inductor": False}}, {}])
@pytest.mark.parametrize("lowering", ["replay", "snapshot"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_plain_decoding(
    family: str, lowering: str, settings: dict[str, Any], fresh_compiler: None
) -> None:
    if settings == {} and family not in ("qwen3_5", "mamba2", "lfm2"):
        pytest.skip("Inductor is tried on one family of each kind")
    model = wide(family).cuda()
    given = {name: value.cuda() for name, value in inputs(4).items()}
    settings = {**settings, "options": {"state_commit": lowering, **settings.get("options", {})}}
    expected = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    for each in (noisy(model), "ngram"):
        assert torch.equal(speculate(model, given, each, **settings).sequences, expected)


# Of real layers; not exact, the kernel in accumulators verifies.
REAL = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
LONG: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "small heads": ("qwen3_5", WIDE, {"options": {"exact": False}}),
    "exact": ("qwen3_5", WIDE, {"options": {"exact": True}}),
    "heads of 128": ("qwen3_5", REAL, {"options": {"exact": False}}),
    "bf16 states": ("qwen3_5", REAL, {"options": {"exact": True}, "state_dtype": "bf16"}),
    "Mamba2": ("bamba", {}, {"options": {"exact": False}}),
    "Mamba2, bf16 states": ("bamba", {}, {"options": {"exact": False}, "state_dtype": "bf16"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_nothing_drifts_over_4000_tokens_in_bfloat16(
    name: str, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    """Acceptance and repetition of each thousand tokens are those of the others."""
    family, heads, settings = LONG[name]
    model = build(family, **heads, max_position_embeddings=8192).to("cuda", torch.bfloat16)
    forms = set()
    form_of = gated_delta_rule.replay_form

    def noted(block: tuple[torch.Tensor, ...], *rest: Any) -> Any:
        form = form_of(block, *rest)
        if block[1].shape[1] == 4:
            forms.add(form.__name__.rsplit("_", 1)[-1])
        return form

    monkeypatch.setattr(gated_delta_rule, "replay_form", noted)
    ids = prompt(2, 12).cuda()
    steps: list[list[int]] = []
    monkeypatch.setattr(reports.Tally, "count", lambda self, report: steps.append(report.num_correct))
    output = speculate(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        noisy(model),
        max_new_tokens=4000,
        **settings,
    )
    expected_form = {"heads of 128": {"gluon"}, "small heads": {"fast"}, "exact": {"exact"}}
    assert forms == expected_form.get(name, forms)
    thousands = output.sequences[:, 12:].view(2, 4, 1000)
    variety = [
        each.unfold(1, 4, 1).reshape(-1, 4).unique(dim=0).shape[0] / 1994 for each in thousands.unbind(1)
    ]
    per_step = torch.tensor(steps).float() + 1
    quarters = [float(each.mean()) for each in per_step[: len(per_step) * 9 // 10].chunk(4)]
    print(f"{name}: accepted per step {quarters}, distinct 4-grams {variety}")
    assert min(quarters) > 0.85 * max(quarters)
    assert min(variety) > 0.85 * max(variety)
