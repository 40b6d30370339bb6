"""Traces: one of this machine, made here, and one written by hand as a GPU's is."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from jaxrd.performance import profiling, traces, workload
from tests.performance.support import ONE_DEVICE
from tests.support import assert_input_error

PROGRAM = """HloModule jit_train_step, is_scheduled=true

%fused_convert (p.1: f32[8,4]) -> bf16[8,4] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  ROOT %convert.3 = bf16[8,4]{1,0} convert(%p.1), metadata={op_name="jit(train_step)/attack/while/body/convert"}
}

%fused_add (p.2: f32[8,4]) -> f32[8,4] {
  %p.2 = f32[8,4]{1,0} parameter(0)
  ROOT %add.9 = f32[8,4]{1,0} add(%p.2, %p.2)
}

%body (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg = (s32[], f32[8,4]{1,0}) parameter(0)
  %cudnn-conv.2 = (f32[8,4]{1,0}, u8[0]{0}) custom-call(%arg), custom_call_target="__cudnn$convBackwardInput", {CONV1}
  %fusion.convert = bf16[8,4]{1,0} fusion(%cudnn-conv.2), kind=kLoop, calls=%fused_convert
}

ENTRY %main.1 (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0), metadata={op_name="state.params['teacher']"}
  %while.1 = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond, body=%body, metadata={op_name="jit(train_step)/attack/while"}
  %gemm_fusion_dot.4 = f32[8,4]{1,0} fusion(%a), kind=kCustom, calls=%fused_add, {LINEAR}
  %loop_add_fusion = f32[8,4]{1,0} fusion(%gemm_fusion_dot.4), kind=kLoop, calls=%fused_add
  %all-reduce-start.1 = f32[8,4]{1,0:T(8,128)} all-reduce-start(%a), {REDUCED}
  ROOT %copy.7 = f32[8,4]{0,1} copy(%a), metadata={op_name="jit(train_step)/optimiser/students/copy"}
}
"""
for _mark, _line in {
        "CONV1": 'metadata={op_name="jit(train_step)/attack/while/body/transpose(jvp(ResNet))/conv1/conv_general_dilated"}',
        "LINEAR": 'metadata={op_name="jit(train_step)/teacher/ResNet/linear/dot_general"}, '
                  'backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}',
        "REDUCED": 'metadata={op_name="jit(train_step)/transpose(jvp(student))/reduce_sum"}'}.items():
    PROGRAM = PROGRAM.replace(f"{{{_mark}}}", _line)


def event(name, begin, duration, line, operation=None, pid=1):
    return {"ph": "X", "pid": pid, "tid": line, "ts": begin, "dur": duration, "name": name,
            "args": {"hlo_op": operation, "hlo_module": "jit_train_step"} if operation else {}}


def gpu_trace():
    """Two steps of 100 us: on each a loop of two kernels, a product beside an all-reduce, and a copy; 10 us of nothing."""
    names = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}} for pid, name in (
        (1, "/device:GPU:0"), (2, "/host:CPU"))]
    names += [{"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}} for tid, name in (
        (10, "Stream #13(Compute)"), (11, "Stream #17(Memset)"), (12, "XLA Ops"), (13, "XLA Modules"))]
    found = []
    for start in (1000, 2000):
        found += [
            event("jaxrd_step", start, 150, 20, pid=2),
            event("cudnn::conv_kernel", start + 10, 30, 10, "cudnn-conv.2"),
            event("convert_kernel", start + 40, 10, 10, "fusion.convert"),
            event("gemm", start + 60, 20, 10, "gemm_fusion_dot.4"), event("nccl", start + 60, 30, 11, "all-reduce-start.1"),
            event("copy", start + 90, 20, 10, "copy.7"),
            # The same work again, and what is not of this program.
            event("cudnn-conv.2", start + 10, 30, 12), event("jit_train_step", start + 10, 100, 13),
            event("other", start, 500, 10, "fusion.of.another"), event("copy.7", start, 500, 20, "copy.7", pid=2)]
    return {"traceEvents": [*names, *found]}


def test_instructions_are_told_by_kind_and_by_the_scope_they_come_from():
    found = traces.instructions(PROGRAM)
    named = ("cudnn-conv.2", "fusion.convert", "while.1", "gemm_fusion_dot.4", "loop_add_fusion", "all-reduce-start.1",
             "copy.7")
    assert {name: (found[name].kind, found[name].scope) for name in named} == {
        "cudnn-conv.2": ("convolution", "attack"), "fusion.convert": ("copy or transpose", "attack"),
        "while.1": ("control", "attack"), "gemm_fusion_dot.4": ("dot", "teacher"),
        "loop_add_fusion": ("elementwise", "teacher"),  # the compiler's own, of what a teacher gave
        "all-reduce-start.1": ("collective", "student"), "copy.7": ("copy or transpose", "optimiser")}
    assert found["cudnn-conv.2"].op_name.endswith("conv1/conv_general_dilated")


@pytest.mark.parametrize("name, scope", [
    ("jit(step)/attack/student/add", "attack"), ("jit(step)/transpose(jvp(student))/add", "student"), ("student", "student"),
    ("jit(step)/students/add", "elsewhere"), ("jit(step)/my_attack/add", "elsewhere"), ("", "elsewhere")])
def test_the_outermost_scope_counts(name, scope):
    assert traces.scope_of(name) == scope


def test_a_trace_of_a_gpu_adds_up():
    known, trace = traces.instructions(PROGRAM), gpu_trace()
    ran, steps = traces.events(trace, known), traces.windows(trace, "jaxrd_step")
    assert len(ran) == 10 and len(steps) == 2
    found = traces.summarise(ran, known, steps)
    assert found.wall == pytest.approx(200e-6) and found.covered == pytest.approx(180e-6) and found.pooled == 0
    assert found.by_scope == pytest.approx({"attack": 80e-6, "student": 60e-6, "teacher": 40e-6, "optimiser": 40e-6})
    assert found.by_kind == pytest.approx({
        "convolution": 60e-6, "collective": 60e-6, "dot": 40e-6, "copy or transpose": 60e-6})
    assert [(name, times) for name, _, times, _ in found.top[:2]] == [("cudnn-conv.2", 2), ("all-reduce-start.1", 2)]


def test_what_a_loop_holds_is_not_counted_twice():
    known = traces.instructions(PROGRAM)
    ran = [traces.Event("while.1", 0.0, 10.0, (1, 1)), traces.Event("cudnn-conv.2", 1.0, 4.0, (1, 1)),
           traces.Event("fusion.convert", 4.0, 9.0, (1, 1)), traces.Event("copy.7", 2.0, 3.0, (1, 2))]
    ran.sort(key=lambda event: event.start)
    assert traces.summarise(ran, known).by_kind == pytest.approx({
        "copy or transpose": 6.0, "convolution": 3.0, "control": 2.0})


def test_silence_is_the_last_convolutions_where_threads_work_on():
    known = traces.instructions(PROGRAM)
    ran = [traces.Event("cudnn-conv.2", 0.0, 1.0, (1, 1)), traces.Event("copy.7", 1.0, 2.0, (1, 1)),
           traces.Event("copy.7", 6.0, 7.0, (1, 1)), traces.Event("copy.7", 9.0, 10.0, (1, 1))]
    found = traces.summarise(ran, known, pooled=True)
    assert (found.wall, found.covered, found.pooled) == pytest.approx((10.0, 4.0, 6.0))
    assert found.by_kind == pytest.approx({"convolution": 7.0, "copy or transpose": 3.0})
    # Before the first convolution there is none to count it as.
    late = traces.summarise([traces.Event("copy.7", -5.0, -4.0, (1, 1)), *ran], known, pooled=True)
    assert late.pooled == pytest.approx(6.0) and late.wall - late.covered - late.pooled == pytest.approx(4.0)
    assert traces.summarise(ran, known).pooled == 0


def test_a_trace_of_this_machine(tmp_path):
    """A program with scopes: every event is of one of its instructions, and the convolution is found in its scope."""
    def program(images, kernel):
        with jax.named_scope("attack"):
            found = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        with jax.named_scope("student"):
            return jnp.sort(found, axis=1)

    images, kernel = jnp.ones((8, 16, 16, 8)), jnp.ones((3, 3, 8, 8))
    compiled = jax.jit(program).lower(images, kernel).compile()
    jax.block_until_ready(compiled(images, kernel))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(compiled(images, kernel))
    known = traces.instructions(compiled.as_text())
    found = traces.summarise(traces.events(traces.read(tmp_path), known), known, pooled=True)
    assert {"attack", "student"} <= set(found.by_scope) and found.by_scope["student"] > 0
    assert any(one.kind == "convolution" and one.scope == "attack" for one in known.values())
    assert 0 < found.covered <= found.wall


def test_a_few_steps_of_a_workload_are_captured_and_read(tiny_config, tmp_path, quick_compilation):
    of = workload.open_workload(tiny_config(), ONE_DEVICE, random_images=(8, 8, 1))
    step, _ = of.compile()
    profiling.capture(of, step, tmp_path / "trace", steps=2)
    found = profiling.where_time_goes(tmp_path / "trace", step.as_text(), top=3)
    assert found["steps"] == 2 and len(found["top"]) == 3
    assert 0 < found["covered_seconds"] <= found["wall_seconds"] - found["pooled_seconds"] + 1e-9
    assert sum(found["by_scope_seconds"].values()) == pytest.approx(sum(found["by_kind_seconds"].values()))
    assert found["by_kind_seconds"]["convolution"] > 0
    json.dumps(found)


def test_where_there_is_no_trace_or_none_of_the_step(tiny_config, tmp_path):
    assert_input_error(lambda: traces.read(tmp_path), str(tmp_path), "trace.json.gz")
    with gzip.open(tmp_path / "x.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": []}, file)
    assert_input_error(lambda: profiling.where_time_goes(tmp_path, PROGRAM), "no instruction of the train step")
    (tmp_path / "file").write_text("")
    of = workload.open_workload(tiny_config(), ONE_DEVICE, random_images=(8, 8, 1))
    assert_input_error(lambda: profiling.capture(of, None, tmp_path / "file"), "--trace", "choose another place")
