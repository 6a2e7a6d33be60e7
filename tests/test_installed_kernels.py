"""fla and causal_conv1d, when installed, are not what specc captures: stand-ins that cannot be captured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FLA = """
import torch
from specc.lowerings import gated_delta_rule

@torch.compiler.disable
def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, cu_seqlens=None, **kwargs):
    assert not torch.compiler.is_compiling()
    calls.append("fla")
    return gated_delta_rule(q, k, v, g, beta, initial_state, q.shape[-1] ** -0.5, use_qk_l2norm_in_kernel)

fused_recurrent_gated_delta_rule = chunk_gated_delta_rule
calls = []
"""

CAUSAL_CONV1D = """
import torch
from specc.lowerings import causal_conv1d

@torch.compiler.disable
def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None, **kwargs):
    assert not torch.compiler.is_compiling()
    calls.append("causal_conv1d")
    return causal_conv1d(x, x.new_zeros(*x.shape[:2], weight.shape[1] - 1), weight, bias, activation)

def causal_conv1d_update(*args, **kwargs):
    raise AssertionError("several tokens at once")

calls = []
"""

SCRIPT = """
import causal_conv1d
import torch
from fla.ops import gated_delta_rule
import specc
from tests.recurrent import build, feed, prompt, static_cache

model = build("qwen3_5")
whole, cache = static_cache(model), static_cache(model)
for each in (whole, cache):
    feed(model, each, prompt(), 0)
calls = gated_delta_rule.calls, causal_conv1d.calls
print([len(each) for each in calls])
block = prompt(2, 4, seed=5)
options = {"mode": "verify", "inductor": False}
compiled = torch.compile(model, backend="specc", fullgraph=True, options=options)
logits = feed(model, cache, block, 9, compiled)
print([len(each) for each in calls], torch._dynamo.utils.counters["stats"]["unique_graphs"])
expected = feed(model, whole, block, 9)
print([len(each) for each in calls], float((logits - expected).abs().max() / expected.abs().max()) < 1e-5)
"""


def test_a_verify_graph_reaches_neither(tmp_path: Path) -> None:
    for file, code in (
        ("fla/__init__.py", "__version__ = '99'\n"),
        ("fla/ops/__init__.py", ""),
        ("fla/ops/gated_delta_rule/__init__.py", FLA),
        ("causal_conv1d/__init__.py", CAUSAL_CONV1D),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(code)
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    # transformers takes more of fla than its functions where there is a GPU.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[4, 4]", "[4, 4] 1", "[6, 6] True"]
