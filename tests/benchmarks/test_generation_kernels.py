"""What a profile says of a step."""

from __future__ import annotations

import pytest

from benchmarks.generation_floor import Floor
from benchmarks.generation_kernels import GRAPH_LAUNCH, Product, Profile, between, by_weights, group_of

FLOOR = Floor(weights=3000, draft_weights=0, keys_and_values=0, states=0, logits=0)


def profiled(replays: int, counted: int, **runtime: int) -> Profile:
    kernels = {"_products": (4 * replays, 8.0 * replays), "triton_poi_fused_add_0": (replays, 0.5 * replays)}
    return Profile(kernels, runtime, counted)


@pytest.mark.parametrize("surplus", [0, 1])
def test_a_replay_that_found_nothing_to_do_counts(surplus: int) -> None:
    short = profiled(10 + surplus, 10, **{GRAPH_LAUNCH: 10 + surplus})
    found = between(short, profiled(44, 44, **{GRAPH_LAUNCH: 44}), FLOOR, 1e9)
    assert found["launches_per_step"] == 1
    assert found["kernels_per_step"] == 5
    assert found["microseconds_per_step"] == pytest.approx(8.5)
    assert found["groups"][0]["share_of_bandwidth"] == pytest.approx(3000 / 8e-6 / 1e9)


def test_steps_without_a_graph_are_those_that_were_counted() -> None:
    found = between(profiled(10, 10, cudaLaunchKernel=50), profiled(44, 44, cudaLaunchKernel=220), FLOOR, 1e9)
    assert found["launches_per_step"] == found["kernels_per_step"] == 5


def test_products_are_told_apart_by_their_order() -> None:
    """Three steps: a launch of a pair of weights, one of another weight, and one of the next layer's pair."""
    pair, other = Product((4096, 1024), 4096, 300), Product((4096,), 14336, 100)
    rows = by_weights([pair, other, pair], [2.0, 1.0, 4.0, 4.0, 1.0, 2.0, 3.0, 1.0, 3.0], 1e8)
    assert [(each["name"], each["count"]) for each in rows] == [
        ("_products [4096 + 1024, 4096]", 2),
        ("_products [4096, 14336]", 1),
    ]
    assert [each["microseconds"] for each in rows] == [6.0, 1.0]
    assert [each["share_of_bandwidth"] for each in rows] == pytest.approx([1.0, 1.0])
    assert by_weights([pair, other], [2.0, 1.0, 3.0], 1e8) == []
    assert by_weights([], [2.0], 1e8) == []


def test_calls_that_stop_the_host_are_not_waits_for_an_event() -> None:
    short = profiled(10, 10, cudaEventSynchronize=10, cudaDeviceSynchronize=1, **{GRAPH_LAUNCH: 10})
    long = profiled(
        44, 44, cudaEventSynchronize=44, cudaDeviceSynchronize=1, cudaMemcpy=17, **{GRAPH_LAUNCH: 44}
    )
    found = between(short, long, FLOOR, 1e9)
    assert found["event_waits_per_step"] == 1
    assert found["synchronising_per_step"] == 0.5


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_128x8_64x12_4x1_v_bz_TNT", "products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "products"),
        ("_paged_attention_kernel", "attention"),
        ("_gated_delta_replay", "recurrent"),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_3", "fused by Inductor"),
        ("triton_unk_fused_kv_write_linears_mean_2", "fused by Inductor"),
        ("_products", "products"),
        ("_replay", "recurrent"),
        ("attend", "attention"),
        ("_block_maxima", "choice"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::index_elementwise_kernel", "other"),
    ],
)
def test_kernels_are_known_by_name(kernel: str, group: str) -> None:
    assert group_of(kernel) == group
