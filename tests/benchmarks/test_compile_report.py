"""Every kernel compiles for every architecture without a GPU, spills nothing, fits, and multiplies with the fast instructions."""

import json
import os

import pytest

from benchmarks import compile_report

try:
    compile_report.tools()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)


SPILLS, SPILLED = ("qk_norm_rope_backward_kernel", "sm_89", "flux2-dev"), 8  # bytes a thread, at a width of 6144


def sound(rows):
    """No kernel uses a thread's slow memory, but for one that is known, or asks for more shared memory than there is."""
    assert rows
    for row in rows:
        known = SPILLED if (row["kernel"], row["arch"], *row["models"]) == SPILLS else 0
        assert row["stack"] <= known, row
        assert row["local"] == 0, row
        assert row["shared"] <= compile_report.SHARED_LIMIT[int(row["arch"][3:].rstrip("a"))], row
    return rows


def instructions(rows, kernel):
    """What the kernels of a name multiply with."""
    found = [row["instructions"] for row in rows if row["kernel"] == kernel]
    assert found, kernel
    return [set(one) for one in found]


PERSISTENT = {"scaled_linear_persistent", "prompt_attention_persistent"}  # forms whose compilation takes its time
FLUX = {"qkv_norm_rope"}  # what has heads that are normed alone


@pytest.fixture(scope="module")
def hopper():
    usual = [name for name in compile_report.OPERATIONS if name not in PERSISTENT | FLUX]
    return sound(compile_report.collect([90], usual, ["wan-1.3b"], cuda=False))


@pytest.mark.slow
def test_on_hopper_every_operation_has_a_kernel_that_spills_nothing(hopper):
    assert {row["operation"] for row in hopper} == set(compile_report.OPERATIONS) - PERSISTENT - FLUX
    assert {row["arch"] for row in hopper} == {"sm_90"}
    assert all(row["registers"] > 0 and row["warps"] > 0 for row in hopper)


@pytest.mark.slow
def test_on_hopper_matrices_are_multiplied_by_warp_groups(hopper):
    for kernel in ("prompt_attention_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        assert all(found == {"HGMMA"} for found in instructions(hopper, kernel))
    assert all(found == {"QGMMA"} for found in instructions(hopper, "scaled_linear_kernel"))
    assert all(found == {"IGMMA", "QGMMA"} for found in instructions(hopper, "attention_fp8_kernel"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_persistent_forms_keep_more_in_flight_and_specialize_their_warps(arch):
    rows = sound(compile_report.collect([arch], ["scaled_linear", "scaled_linear_persistent"], ["wan-1.3b"], cuda=False))
    tiles, persistent = (
        [row for row in rows if row["operation"] == name] for name in ("scaled_linear", "scaled_linear_persistent")
    )
    assert {row["specialized"] for row in persistent} == {False, True}
    assert all(row["warps"] == 12 for row in persistent if row["specialized"])
    assert min(row["in_flight"] for row in persistent) > max(row["in_flight"] for row in tiles)
    assert {name for row in persistent for name in row["instructions"]} == {{90: "QGMMA", 100: "UTCQMMA"}[arch]}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "products"), [(90, {"HGMMA", "QGMMA"}), (100, {"UTCHMMA", "UTCQMMA"})])
def test_the_projection_to_heads_is_one_kernel_that_spills_nothing(arch, products):
    rows = sound(compile_report.collect([arch], ["qkv_norm_rope"], ["flux-dev"], cuda=False))
    assert {row["kernel"] for row in rows} == {"qkv_norm_rope_kernel"}
    assert {name for row in rows for name in row["instructions"]} == products


def test_how_many_blocks_a_multiprocessor_keeps():
    assert compile_report.residence(90, 8, 128, 100_000) == {"blocks": 2, "occupancy": 0.25, "in_flight": 200_000}
    assert compile_report.residence(90, 8, 168, 20_000)["blocks"] == 1  # by registers
    assert compile_report.residence(89, 16, 32, 0)["occupancy"] == 1
    assert compile_report.residence(80, 1, 16, 0)["blocks"] == 32


@pytest.mark.slow
def test_a_norm_multiplies_no_matrices(hopper):
    assert instructions(hopper, "layer_norm_modulate_kernel") == [set(), set()]


@pytest.mark.slow
def test_launches_are_those_of_the_launchers(hopper):
    """Both forms of the norm, and prompt_attention with and without the log-sums that learning needs."""
    names = [row["kernel"] for row in hopper]
    assert [names.count(f"{name}_kernel") for name in ("layer_norm_modulate", "qk_norm_rope", "prompt_attention")] == [2, 1, 2]


def test_ampere_gets_attention_and_norms_and_no_e4m3():
    rows = sound(compile_report.collect([80], ["quantize_fp8", "scaled_linear", "prompt_attention", "bridge_step"], ["wan-1.3b"]))
    assert {row["operation"] for row in rows if row["compiler"] == "triton"} == {"prompt_attention", "bridge_step"}
    assert all(found == {"HMMA"} for found in instructions(rows, "prompt_attention_kernel"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", compile_report.ARCHS)
def test_every_kernel_at_every_model_s_shapes_is_sound(arch):
    rows = sound(compile_report.collect([arch]))
    for model in compile_report.MODELS:
        assert any(model in row["models"] for row in rows)
    products = {80: {"HMMA"}, 89: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA"}, 120: {"HMMA"}}
    assert all(found == products[arch] for found in instructions(rows, "prompt_attention_kernel"))


@pytest.mark.skipif(not compile_report.cuda_archs(), reason="needs nvcc")
def test_the_cuda_sources_are_compiled_as_they_are_built():
    rows = sound(compile_report.collect([90], ["quantize_fp8"], models=[]))
    assert {row["compiler"] for row in rows} == {"nvcc"}
    assert {"quantize_fp8_kernel<bf16>", "quantize_fp8_kernel<fp16>", "quantize_fp8_kernel<float32>"} <= {
        row["kernel"] for row in rows
    }
    assert all(row["arch"] == "sm_90a" and not row["instructions"] for row in rows)


def test_the_table_and_the_file_tell_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compile_report, "cuda_archs", list)
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")  # what the tests of kernels run under does not reach the compiler
    compile_report.main(["--archs", "90", "--ops", "bridge_step", "--models", "flux-dev", "--json", str(tmp_path / "a" / "x")])
    (row,) = json.loads((tmp_path / "a" / "x").read_text())["kernels"]
    text = capsys.readouterr().out
    assert (row["kernel"], row["models"], row["stack"]) == ("bridge_step_kernel", ["flux-dev"], 0)
    assert all(word in text for word in ("bridge_step_kernel", "sm_90", "flux-dev", f" {row['registers']} ", "commit"))


@pytest.mark.parametrize("archs", ["90,", "hopper", "75"])
def test_unknown_architectures_are_refused(archs, capsys):
    with pytest.raises(SystemExit) as error:
        compile_report.main(["--archs", archs])
    assert error.value.code == 2
    assert "--archs" in capsys.readouterr().err


def test_a_compiler_s_names_are_made_readable():
    readable = compile_report.readable
    assert readable("_ZN3ebr19qk_norm_rope_kernelI13__nv_bfloat16EEvNS_4RowsES2_ji") == "qk_norm_rope_kernel<bf16>"
    assert readable("_ZN3ebr10abc_kernelI6__halfhEEvNS_4RowsE") == "abc_kernel<fp16, fp8>"
    assert readable("prompt_attention_kernel") == "prompt_attention_kernel"
