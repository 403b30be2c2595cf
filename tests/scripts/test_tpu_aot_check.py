"""Tests what scripts/tpu_aot_check.py reads in a compiled program: shapes, groups, bytes between chips.

The lines are those of a TPU's compiler, shortened. Expected bytes are counted by hand: a ring of n chips
sends (n - 1)/n of the whole array to gather or to scatter it, and twice that to reduce it everywhere.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/tpu_aot_check.py"
ACROSS = "{{0,2,4,6,8,10,12,14},{1,3,5,7,9,11,13,15}}"  # 16 chips: 8 expert ranks of 2
PAIRS = "{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tpu_aot_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("bf16[64,1,4096]{2,0,1:T(8,128)(2,1)S(1)}", [64 * 4096 * 2]),
        ("(u32[]{:T(128)}, u32[1,1,128]{2,1,0:T(1,128)S(1)})", [4, 512]),
        ("pred[1,8192]{1,0:T(4,128)(4,1)}", [8192]),
        ("(s4[16], f8e4m3fn[10], f64[0,3])", [8, 10, 0]),
        ("token[]", []),
    ],
)
def test_bytes_of_shapes(text: str, sizes: list[int], script: ModuleType):
    assert script.shape_bytes(text) == sizes


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        (ACROSS, 8),
        (PAIRS, 2),
        ("[8,2]<=[16]", 2),
        ("[2,8]<=[8,2]T(1,0)", 8),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_1'}", 2),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}", 16),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0':(2)4}", 4),
        ("{}", 16),
    ],
)
def test_chips_in_a_collective(groups: str, size: int, script: ModuleType):
    line = f"%x = f32[8] all-reduce(%y), channel_id=3, replica_groups={groups}, use_global_device_ids=true"
    assert script.group_size(line, 16) == size


def line(result: str, kind: str, groups: str = ACROSS, operands: str = "%y.1", more: str = "") -> str:
    return (
        f"  %x.1 = {result} {kind}({operands}), channel_id=1, replica_groups={groups}{more}, dimensions={{0}}"
    )


@pytest.mark.parametrize(
    ("text", "kind", "sent"),
    [
        (line("bf16[64,1,4096]{2,0,1:T(8,128)(2,1)}", "all-gather"), "all-gather", 64 * 4096 * 2 * 7 // 8),
        (line("f32[8,4096]{1,0}", "reduce-scatter"), "reduce-scatter", 8 * 4096 * 4 * 7),
        (line("f32[8,4096]{1,0}", "all-reduce", PAIRS), "all-reduce", 8 * 4096 * 4),
        (line("(s32[8]{0}, s32[]{:T(128)})", "all-reduce", operands="%y, %z"), "all-reduce", 36 * 2 * 7 // 8),
        (line("bf16[64,32]{1,0}", "all-to-all"), "all-to-all", 64 * 32 * 2 * 7 // 8),
        (line("(f32[8], f32[64])", "all-gather-start"), "all-gather", 64 * 4 * 7 // 8),
        (line("(f32[64], f32[16])", "all-reduce-start"), "all-reduce", 80 * 4 * 2 * 7 // 8),
        (
            "%p = f32[120,4096]{1,0} collective-permute(%s), channel_id=1, source_target_pairs={{0,4},{4,8}}",
            "collective-permute",
            120 * 4096 * 4,
        ),
    ],
)
def test_bytes_of_a_collective(text: str, kind: str, sent: int, script: ModuleType):
    assert script.collectives(text, 16) == {kind: (1, sent)}


def test_the_end_of_a_collective_and_mentions_of_it_do_not_count(script: ModuleType):
    text = (
        "  %d = f32[64]{0} all-gather-done(%all-gather-start)\n"
        '  %f = f32[64]{0} fusion(%all-gather.3), metadata={op_name="all-gather(x)"}\n'
    )
    assert script.collectives(text, 16) == {}


def test_one_that_runs_along_several_fusions_counts_once(script: ModuleType):
    chain = ', frontend_attributes={chain_id="0"}'
    bodies = [f"%async_collective_fusion.{i} (p: bf16[8,4096]) -> f32[8] {{\n" for i in range(3)]
    first = line("bf16[64,4096]{1,0}", "all-gather", more=chain)
    second = first.replace("channel_id=1", "channel_id=2")
    hlo = "".join(f"{body}{first}\n}}\n" for body in bodies) + bodies[0] + second + "\n}\n"
    assert script.collectives(hlo, 16) == {"all-gather": (2, 2 * (64 * 4096 * 2 * 7 // 8))}


def test_a_fused_reduce_scatter_is_not_an_all_reduce(script: ModuleType):
    body = line("f32[8320,4096]{1,0:T(8,128)}", "all-reduce")
    hlo = f"%all-reduce-scatter.1 (input: f32[8192,4096]) -> f32[1040,4096] {{\n{body}\n}}\n"
    assert script.collectives(hlo, 16) == {"reduce-scatter": (1, 8320 * 4096 * 4 * 7 // 8)}
    both = hlo + "ENTRY %main (p: f32[8]) -> f32[8] {\n" + line("f32[8]{0}", "all-reduce") + "\n}\n"
    assert script.collectives(both, 16)["all-reduce"] == (1, 8 * 4 * 2 * 7 // 8)


def test_a_ragged_exchange_counts_the_rows_of_a_chip_not_the_worst_case_buffer(script: ModuleType):
    """4096 rows leave for a buffer of 65536, and return the other way."""
    call = "ragged-all-to-all(%rows, %room, %a, %b, /*index=4*/%c, %d)"
    out = f"  %rows = bf16[4096,2,1024]{{2,1,0}} copy(%z)\n  %o = bf16[65536,2,1024]{{2,1,0}} {call}"
    back = f"  %rows = f32[65536,1,2048]{{2,1,0}} copy(%z)\n  %o = f32[4096,1,2048]{{2,1,0}} {call}"
    assert script.collectives(out, 16) == {"ragged-all-to-all": (1, 4096 * 2048 * 2 * 15 // 16)}
    assert script.collectives(back, 16) == {"ragged-all-to-all": (1, 4096 * 2048 * 4 * 15 // 16)}


def test_a_schedule_pairs_copies_from_the_host_and_names_kernels(script: ModuleType):
    """Copies within the device's memory do not count, nor do computations without copies."""
    host, here = "(bf16[9,8]{1,0:S(5)}, s32[])", "(bf16[9,8]{1,0}, s32[])"
    hlo = "\n".join(
        [
            "%body.1 (p: f32[8]) -> f32[8] {",
            f"  %dynamic-slice-start = {host} dynamic-slice-start(%a, %i)",
            "  %dynamic-slice-done = bf16[1,8] dynamic-slice-done(%dynamic-slice-start), metadata={}",
            "}",
            "%other.2 (p: f32[8]) -> f32[8] {",
            '  ROOT %mlp.7 = f32[8] custom-call(%p), custom_call_target="tpu_custom_call"',
            "}",
            "ENTRY %main.3 (p: f32[8]) -> f32[8] {",
            f"  %dynamic-slice-start.5 = {host} dynamic-slice-start(%a, %i)",
            f"  %dynamic-slice-start.6 = {here} dynamic-slice-start(%a, %i)",
            f"  %dynamic-slice-start.4 = {host} dynamic-slice-start(%b, %i)",
            '  %mlp.7 = f32[8] custom-call(%p), custom_call_target="tpu_custom_call"',
            '  %top = f32[8] custom-call(%p), custom_call_target="TopK"',
            "  %dynamic-slice-done.6 = bf16[1,8] dynamic-slice-done(%dynamic-slice-start.6)",
            "  ROOT %dynamic-slice-done.4 = bf16[1,8] dynamic-slice-done(%dynamic-slice-start.4)",
            "  %dynamic-slice-done.5 = bf16[1,8] dynamic-slice-done(%dynamic-slice-start.5)",
            "}",
        ]
    )
    assert script.schedule(hlo) == {
        "body.1": ["start 0", "done 0"],
        "entry": ["start 0", "start 1", "mlp", "done 1", "done 0"],
    }


def test_a_layer_of_the_replicated_transport(script: ModuleType):
    """Mixtral's layer decodes 8 sequences on each of 8 expert ranks of 2 chips: T = 64, D = 4096, K = 2."""
    hlo = "\n".join(
        [
            line("f32[8,1,4096]{2,0,1}", "all-reduce", PAIRS),  # attention's heads
            line("s32[8,8,2]{1,2,0}", "all-gather"),  # expert ids
            line("f32[8,8,2]{1,2,0}", "all-gather"),  # their weights
            line("bf16[64,1,4096]{2,0,1}", "all-gather"),  # rows
            line("f32[8,4096]{1,0}", "reduce-scatter"),  # their outputs, 64 before
            line("f32[8,4096]{1,0}", "all-reduce", PAIRS),  # the experts' inner dimension
        ]
    )
    rows = 64 * 4096
    assert script.collectives(hlo, 16) == {
        "all-gather": (3, (rows * 2 + 2 * 64 * 2 * 4) * 7 // 8),
        "reduce-scatter": (1, rows * 4 * 7 // 8),
        "all-reduce": (2, 2 * 8 * 4096 * 4),
    }


def test_cases_name_models_and_use_their_whole_slice(script: ModuleType):
    for model, where, mesh, sequences, tokens in script.CASES:
        assert (SCRIPT.parents[1] / f"configs/model/{model}.toml").is_file()
        chips = [int(n) for n in where.partition(":")[2].split("x")]
        assert script.prod(chips) == script.prod(map(int, mesh.split("x"))), (model, where)
        assert sequences > 0 and tokens % script.PAGE == 0
