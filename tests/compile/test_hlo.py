"""Reading compiled programs: written by hand after a TPU's, and made by XLA here."""

# ruff: noqa: E501 (a program's lines are as long as they are)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.compile import report
from pipeline.compile.hlo import Collective, Shape, parse

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[8,64]{1,0})->f32[8,64]{1,0}}

%body (arg: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %arg = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %sum = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=1, to_apply=%add, metadata={op_name="jit(step)/psum"}
  ROOT %out = (s32[]{:T(128)}, bf16[8,64]{1,0}) tuple(%n, %sum)
}

%condition (arg.1: (s32[], bf16[8,64])) -> pred[] {
  %arg.1 = (s32[], bf16[8,64]{1,0}) parameter(0)
  ROOT %less = pred[] constant(false)
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %c = bf16[] add(%a, %b)
}

ENTRY %main (p.0: bf16[8,64], p.1: u8[4,2,96,32], p.2: bf16[4,96,64]) -> f32[8,64] {
  %p.0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %p.1 = u8[4,2,96,32]{3,2,1,0:T(32,128)(4,1)} parameter(1), metadata={op_name="weights.layers[0].experts.gate.blocks"}
  %p.2 = bf16[4,96,64]{2,1,0} parameter(2), metadata={op_name="weights.layers[0].experts.down"}
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,64]{1,0}, /*index=2*/u32[]{:S(2)}) tuple(%zero, %p.0)
  %loop = (s32[]{:T(128)}, bf16[8,64]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %gather = (bf16[8,64]{1,0}, bf16[8,512]{1,0}) all-gather-start(%p.0), dimensions={1}
  %gathered = bf16[8,512]{1,0} all-gather-done(%gather)
  %hit = f32[8,64]{1,0} custom-call(%p.0, %p.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/shard_map/hit_experts/pallas_call"}
  %passed = bf16[384,64]{1,0} bitcast(%p.2)
  %moved = bf16[384,64]{0,1} copy(%passed)
  ROOT %done = f32[8,64]{1,0} add(%hit, %hit)
}
"""


def test_what_is_exchanged_in_a_loop_counts_as_often_as_it_runs():
    assert sorted(parse(TEXT).collectives(), key=lambda one: one.kind) == [
        Collective("all-gather", Shape("bf16", (8, 512)), 1),
        Collective("all-reduce", Shape("bf16", (8, 64)), 3),
    ]
    assert Shape("bf16", (8, 512)).num_bytes == 8192
    assert Shape("s4", (3,)).num_bytes == 2


def test_a_loop_whose_runs_are_not_noted_runs_as_often_as_its_counter_takes_to_its_bound():
    noted = ', backend_config={"known_trip_count":{"n":"3"}}'
    counted = TEXT.replace(noted, "").replace(
        "  ROOT %less = pred[] constant(false)",
        """  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %bound = s32[]{:T(128)} constant(11)
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT""",
    )

    def times(text: str) -> list[int]:
        return [one.times for one in parse(text).collectives() if one.kind == "all-reduce"]

    assert times(counted) == [11]
    by_two = """  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%n, %two)
  ROOT %out = (s32[]{:T(128)}, bf16[8,64]{1,0}) tuple(%next, %sum)"""
    assert times(counted.replace("  ROOT %out = (s32[]{:T(128)}, bf16[8,64]{1,0}) tuple(%n, %sum)", by_two)) == [6]
    assert times(counted.replace("constant(11)", "get-tuple-element(%arg.1), index=0")) == [1]


def test_the_steps_of_an_exchange_that_share_a_channel_are_one_exchange():
    steps = "".join(
        f"  %step.{step} = bf16[8,512]{{1,0}} all-gather(%p.0), channel_id=7, dimensions={{1}}\n" for step in range(3)
    )
    begun = TEXT.replace("  %gather = (", steps + "  %gather = (")
    inside = begun.replace(
        "  ROOT %out = (s32", "  %step.9 = bf16[8,512]{1,0} all-gather(%x), channel_id=7\n  ROOT %out = (s32"
    )
    assert inside != begun
    for text in (begun, inside):
        assert Collective("all-gather", Shape("bf16", (8, 512)), 2) in parse(text).collectives()  # one has no channel


def test_a_kernel_whose_notes_have_line_breaks_ends_no_computation():
    notes = """frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/shard_map/hit_experts/pallas_call"}"""
    broken = TEXT.replace('metadata={op_name="jit(step)/shard_map/hit_experts/pallas_call"}', notes)
    assert broken != TEXT
    whole, read = parse(TEXT), parse(broken)
    assert [one.name for one in read.computations["main"]] == [one.name for one in whole.computations["main"]]
    assert read.collectives() == whole.collectives()
    hit = next(one for one in read.computations["main"] if one.name == "hit")
    assert hit.op_name == "jit(step)/shard_map/hit_experts/pallas_call"


def test_a_line_that_is_not_understood_is_not_passed_over():
    with pytest.raises(ValueError, match="not understood"):
        parse(TEXT.replace("  %zero = ", "  zero := "))


def test_only_the_kernel_may_read_experts():
    wrong = report.experts_read_whole(parse(TEXT))
    assert wrong == ["experts that are not hit are read: weights.layers[0].experts.down by copy moved"]


@pytest.mark.parametrize(
    ("lengths", "is_found"), [([512, 9], True), ([1024], False)], ids=["of a cache's length", "other"]
)
def test_an_exchange_as_long_as_a_cache_is_reported(lengths, is_found):
    found = report.gathered_caches(parse(TEXT), lengths, 8)
    assert found == (["a key/value cache is exchanged: all-gather of bf16[8, 512]"] if is_found else [])


def test_a_program_that_xla_compiled_is_read_whole():
    """Experts handed into a loop that reads one a round, as without the kernel."""

    def step(weights, x):
        return jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ weights["experts"]["gate"][i]), x)

    made = jax.jit(step).lower({"experts": {"gate": np.ones((3, 40, 40), np.float32)}}, np.ones((5, 40), np.float32))
    program = parse(made.compile().as_text())
    (experts,) = [one for one in program.parameters() if one.shapes == (Shape("f32", (3, 40, 40)),)]
    assert program.readers(experts.name)
    assert not program.collectives()


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule empty")
