"""The profile: what a list of events comes to, exactly; and a run that writes one."""

import json
import math
from pathlib import Path

import pytest
import torch

from mtl.runtime.profile import Event, Profiler, kind_of, outermost_last, page, profiling, read_trace, summarize
from tests.forks import Forks
from tests.test_pretrain import MODEL, SHORT

GEMM, FLASH = "nvjet_hsh_256x128", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"
NORM, NCCL = "triton_red_fused_norm_0", "ncclDevKernel_AllGather"
COPY = "Memcpy HtoD (Pinned -> Device)"


def test_every_instant_counts_once() -> None:
    """Two streams: a product from 0 to 10, communication from 5 to 20, a norm from 12 to 15, attention from 25 to 30, nothing after."""
    events = [Event(GEMM, 0, 10, 7), Event(NCCL, 5, 15, 9), Event(NORM, 12, 3, 7), Event(FLASH, 25, 5, 7)]
    found = summarize(events, steps=2, window=(0, 40))
    assert found.shown == {"matmul": 10, "attention": 5, "other compute": 3, "communication": 7, "host copies": 0}
    assert (found.idle, found.hidden, found.length) == (15, 8, 40)
    assert [(t.name, t.kind, t.count, t.time) for t in found.top] == [
        (NCCL, "communication", 1, 15), (GEMM, "matmul", 1, 10), (FLASH, "attention", 1, 5), (NORM, "other compute", 1, 3),
    ]  # fmt: skip
    assert found.share("idle") == 15 / 40


def test_kernels_that_run_at_once_are_not_counted_twice() -> None:
    events = [Event(GEMM, 0, 10, 1), Event(GEMM, 5, 10, 2), Event(FLASH, 8, 10, 3), Event(NCCL, 0, 20, 4), Event(NCCL, 10, 20, 5)]
    found = summarize(events)
    assert found.shown == {"matmul": 15, "attention": 3, "other compute": 0, "communication": 12, "host copies": 0}
    assert (found.idle, found.hidden, found.length) == (0, 18, 30)
    assert found.top[0] == (NCCL, "communication", 2, 40)


def test_events_are_cut_to_the_window_and_nothing_gives_nothing() -> None:
    found = summarize([Event(GEMM, -5, 10), Event(GEMM, 8, 10), Event(GEMM, 30, 5), Event(NCCL, 3, 0)], window=(0, 10))
    assert (found.shown["matmul"], found.idle, found.top[0].count) == (7, 3, 2)
    empty = summarize([])
    assert empty.length == 0 and empty.share("idle") == 0 and "0.0%" in page(empty, "nothing")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128>", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("triton_tem_fused_mm_3", "matmul"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_mm_mul_4", "other compute"),
        ("triton_red_fused__c10d_functional_wait_tensor_norm_1", "other compute"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd>", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memcpy PtoP (Device -> Device)", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "host copies"),
        ("Memcpy DtoD (Device -> Device)", "other compute"),
        ("void at::native::multi_tensor_apply_kernel<fused_adamw>", "other compute"),
        ("aten::mm", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mul", "other compute"),
        ("_c10d_functional::wait_tensor", "communication"),
    ],
)
def test_names_tell_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_nested_operations_count_without_those_inside() -> None:
    lane = [Event("aten::linear", 0, 10), Event("aten::t", 1, 2), Event("aten::mm", 4, 5), Event("aten::add", 12, 3)]
    pieces = outermost_last(lane)
    assert [p.calls for p in pieces] == [1, 1, 0, 1, 0, 1]
    assert [tuple(p)[:3] for p in pieces] == [
        ("aten::linear", 0, 1), ("aten::t", 1, 2), ("aten::linear", 3, 1), ("aten::mm", 4, 5), ("aten::linear", 9, 1), ("aten::add", 12, 3),
    ]  # fmt: skip


def test_a_trace_with_kernels_counts_kernels_alone() -> None:
    trace = {
        "traceEvents": [
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5, "tid": 1},
            {"ph": "X", "cat": "kernel", "name": GEMM, "ts": 2, "dur": 9, "tid": 7, "args": {"stream": 7}},
            {"ph": "X", "cat": "gpu_memcpy", "name": COPY, "ts": 20, "dur": 1, "tid": 7, "args": {"stream": 20}},
            {"ph": "X", "cat": "gpu_user_annotation", "name": "mtl: profiled steps", "ts": 0, "dur": 50, "tid": 7},
            {"ph": "i", "cat": "kernel", "name": "mark", "ts": 3},
        ]
    }
    assert read_trace(trace) == [Event(GEMM, 2, 9, 7), Event(COPY, 20, 1, 20)]


def test_real_products_are_found_and_the_rows_sum_to_the_whole(tmp_path: Path) -> None:
    said: list[str] = []
    hook = profiling(Profiler(tmp_path / "profile", torch.device("cpu"), "squares"), 0, 9, 2, said.append)
    x = torch.randn(1024, 1024)
    for i in range(1, 10):
        x = (x @ x).tanh()
        hook(i, None, {})
    assert len(said) == 1 and "steps 4 to 5" in said[0] and "aten::mm" in said[0]
    trace = json.loads((tmp_path / "profile/trace.json").read_text())
    found = summarize(read_trace(trace))
    counts = {t.name: t.count for t in found.top}
    assert counts["aten::mm"] == 2 and counts["aten::tanh"] == 2
    assert found.shown["matmul"] > found.shown["other compute"] > 0
    assert math.isclose(sum(found.shown.values()) + found.idle, found.length)


def test_few_steps_are_profiled_from_the_first(tmp_path: Path) -> None:
    said: list[str] = []
    hook = profiling(Profiler(tmp_path, torch.device("cpu"), "few"), 5, 7, 10, said.append)
    for i in (6, 7):
        torch.ones(8, 8).mul(2)
        hook(i, None, {})
    assert "steps 6 to 7" in said[0] and (tmp_path / "summary.txt").exists()


def test_a_run_writes_its_profile(forks: Forks, tmp_path: Path) -> None:
    done = forks.complete(["tiny", *SHORT, *MODEL, "--mesh.fsdp", "2", "--profile", "2", "--out", str(tmp_path / "run")], ranks=2)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run/profile/summary.txt").read_text()
    assert text in done.stdout.replace("\r", "") and "rules fsdp" in text and text.startswith("tiny, fp32, mesh fsdp=2")
    shares = {line[:22].strip(): float(line.split("%")[0].split()[-1]) for line in text.splitlines() if "%" in line and " ms " in line}
    assert set(shares) == {"matmul", "attention", "other compute", "exposed communication", "exposed host copies", "idle"}
    assert abs(sum(shares.values()) - 100) < 0.5
    assert min(shares[row] for row in ("matmul", "attention", "other compute", "exposed communication")) > 0
    refused = forks.complete(["tiny", *SHORT, *MODEL, "--profile", "9", "--out", str(tmp_path / "other")])
    assert refused.returncode == 2 and "--profile is 9" in refused.stderr and not (tmp_path / "other").exists()
