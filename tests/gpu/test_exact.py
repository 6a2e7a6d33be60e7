"""exact in bfloat16: the same tokens with and without drafts, whatever the block and the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import specc

VOCAB = 32000
NEW_TOKENS = 160


def dense() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=VOCAB,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def hybrid() -> Any:
    return Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            vocab_size=VOCAB,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "rows", "state_dtype"),
    [(dense, 1, None), (dense, 16, None), (hybrid, 1, None), (hybrid, 16, None), (hybrid, 2, "bf16")],
)
def test_blocks_do_not_change_a_bit(
    build: Any, rows: int, state_dtype: str | None, fresh_compiler: None
) -> None:
    """A model that drafts for itself is right but for near ties: drafts are not exact."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = build().to(torch.bfloat16).eval()
        ids = torch.randint(3, VOCAB, (rows, 32))
    mask = (torch.arange(32, device="cuda") >= torch.arange(rows, device="cuda")[:, None]).long()

    def tokens(count: int, **ends: int) -> torch.Tensor:
        output = specc.generate(
            model,
            input_ids=ids * mask,
            attention_mask=mask,
            draft="ngram" if count == 1 else model,
            num_draft_tokens=count,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            state_dtype=state_dtype,
            # For one row it is the default.
            options={} if rows == 1 else {"exact": True},
            return_dict_in_generate=True,
            **ends,
        )
        length = output.speculation.mean_accepted_length
        print(f"{build.__name__}, {rows} rows, blocks of {count}: {length:.2f} accepted per step")
        assert length > (0.7 if ends else 0.8) * count
        return output.sequences

    plain = tokens(1)
    for count in (3, 8):
        assert torch.equal(tokens(count), plain)
    # A row ends within a block, and others go on.
    ends = {"eos_token_id": int(plain[0, 32 + NEW_TOKENS // 2]), "pad_token_id": 0}
    ended = tokens(1, **ends)
    assert ended[0, 32:].tolist().index(ends["eos_token_id"]) <= NEW_TOKENS // 2
    for count in (3, 8):
        assert torch.equal(tokens(count, **ends), ended)
