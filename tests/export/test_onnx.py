"""A trunk as an ONNX graph: standard operators only, and the numbers of torch when onnxruntime runs it."""

from pathlib import Path

import pytest
import torch

from ebr_engine.backbones.layers import quantize_trunk
from ebr_engine.errors import EngineError
from ebr_engine.export import onnx as exporter
from ebr_engine.export.graph import ExportedTrunk, Graph
from ebr_engine.kernels import backend

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def loaded(path, config, latent=None):
    from ebr_engine.export.onnx_runtime import load_runner

    run = load_runner(Path(path), torch.device("cpu"))
    return ExportedTrunk(run, config, Graph("onnx", "float32", latent, None))


@pytest.fixture(scope="module")
def written(tmp_path_factory, make_tiny):
    """The file of a Wan graph of one size, and its tiny model."""
    model = make_tiny("wan")
    path = tmp_path_factory.mktemp("graph") / "wan.onnx"
    exporter.write_onnx(path, model.trunk, model.step(1), (16, 3, 6, 4))
    return path, model


def test_one_graph_serves_every_step_and_every_prompt_of_one_shape(written):
    path, model = written
    run = loaded(path, model.trunk.config, (16, 3, 6, 4))
    latent = model.latent(6, 4, frames=3, batch=3)
    for seed in (1, 2, 3):
        step = model.step(seed)
        torch.testing.assert_close(run(latent, step), model.trunk(latent, step), **CLOSE)


def test_the_graph_names_its_inputs_and_nothing_else_is_beside_it(written):
    path, model = written
    graph = onnx.load(path)
    assert [entry.name for entry in graph.graph.input] == ["latent", "cos", "sin", *model.step(1)._fields]
    assert [entry.name for entry in graph.graph.output] == ["velocity"]
    assert graph.opset_import[0].version == 20
    assert graph.producer_name == "ebr-engine"
    assert [file.name for file in path.parent.iterdir()] == ["wan.onnx"]


def test_another_size_than_the_only_one_is_refused(written):
    path, model = written
    run = loaded(path, model.trunk.config, (16, 3, 6, 4))
    with pytest.raises(EngineError, match="latents of 16 x 3 x 6 x 4, not 16 x 3 x 6 x 6"):
        run(model.latent(6, 6, frames=3), model.step(1))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("wan", [(6, 4, 3, 2), (2, 8, 1, 1), (4, 4, 2, 5)]),
        pytest.param("flux", [(2, 6, 1, 5)], marks=pytest.mark.slow),
        pytest.param("flux2", [(3, 5, 1, 4)], marks=pytest.mark.slow),
    ],
)
def test_a_graph_of_open_size_takes_any(tmp_path, make_tiny, kind, sizes):
    model = make_tiny(kind)
    exporter.write_onnx(tmp_path / "any.onnx", model.trunk, model.step(1), None, frames=kind == "wan")
    run = loaded(tmp_path / "any.onnx", model.trunk.config)
    for size in sizes:
        latent, step = model.latent(*size), model.step(2)
        torch.testing.assert_close(run(latent, step), model.trunk(latent, step), **CLOSE)


def test_half_precision_keeps_its_dtype_and_its_numbers(tmp_path, make_tiny, relative_rms):
    model = make_tiny("wan", torch.float16)
    latent, step = model.latent(4, 6), model.step(1)
    exporter.write_onnx(tmp_path / "half.onnx", model.trunk, step, tuple(latent.shape[1:]))
    kinds = {entry.data_type for entry in onnx.load(tmp_path / "half.onnx").graph.initializer if len(entry.dims) == 2}
    assert kinds == {onnx.TensorProto.FLOAT16}
    velocity = loaded(tmp_path / "half.onnx", model.trunk.config)(latent, step)
    assert relative_rms(velocity, model.trunk(latent, step)) < 8 * torch.finfo(torch.float16).eps


@pytest.mark.slow
def test_bf16_is_a_valid_graph_that_onnxruntime_refuses_on_a_cpu(tmp_path, make_tiny):
    model = make_tiny("wan", torch.bfloat16)
    latent, step = model.latent(2, 2), model.step(1)
    exporter.write_onnx(tmp_path / "bf16.onnx", model.trunk, step, tuple(latent.shape[1:]))  # onnx's checker has passed it
    with pytest.raises(EngineError, match=r"onnxruntime cannot run .*bf16\.onnx"):
        loaded(tmp_path / "bf16.onnx", model.trunk.config)


def test_fp8_layers_become_qdq_pairs_with_the_numbers_of_fp8(tmp_path, make_tiny, relative_rms):
    model = make_tiny("wan")
    exact = model.trunk(latent := model.latent(4, 6), step := model.step(1))
    count = quantize_trunk(model.trunk)
    quantised = model.trunk(latent, step)
    exporter.write_onnx(tmp_path / "fp8.onnx", model.trunk, step, tuple(latent.shape[1:]))
    graph = onnx.load(tmp_path / "fp8.onnx").graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == count
    assert sum(node.op_type == "DequantizeLinear" for node in graph.node) == 2 * count
    stored = [entry for entry in graph.initializer if entry.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    assert len(stored) == count
    velocity = loaded(tmp_path / "fp8.onnx", model.trunk.config)(latent, step)
    # What rounds the other way at a tie moves one element by an e4m3 step; the whole is far nearer than fp8 is to float32.
    assert relative_rms(velocity, quantised) < 0.3 * relative_rms(quantised, exact)


@pytest.mark.parametrize("kind", ["flux", pytest.param("flux2", marks=pytest.mark.slow)])
def test_large_weights_lie_in_a_file_beside(tmp_path, monkeypatch, make_tiny, kind):
    model = make_tiny(kind)
    latent, step = model.latent(2, 6), model.step(1)
    monkeypatch.setattr(exporter, "LARGEST_FILE", 0)
    exporter.write_onnx(tmp_path / "flux.onnx", model.trunk, step, tuple(latent.shape[1:]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["flux.onnx", "flux.onnx.data"]
    velocity = loaded(tmp_path / "flux.onnx", model.trunk.config)(latent, step)
    torch.testing.assert_close(velocity, model.trunk(latent, step), **CLOSE)


@pytest.mark.parametrize("opset", [17, 999])
def test_an_opset_that_cannot_be_is_refused(tmp_path, make_tiny, opset):
    model = make_tiny("wan")
    with pytest.raises(EngineError, match=f"the opset must be 18 to .*, not {opset}"):
        exporter.write_onnx(tmp_path / "x.onnx", model.trunk, model.step(1), None, opset=opset)
    assert not list(tmp_path.iterdir())


def test_forced_kernels_are_refused(tmp_path, monkeypatch, make_tiny):
    model = make_tiny("wan")
    monkeypatch.setattr(backend, "FORCED", True)
    with pytest.raises(EngineError, match="EBR_KERNELS=torch"):
        exporter.write_onnx(tmp_path / "x.onnx", model.trunk, model.step(1), None)


def test_a_graph_with_an_operator_of_another_domain_is_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("quantize_fp8", ["x"], ["y"], domain="ebr")
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("ebr", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [result]), opset_imports=imports)
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(EngineError, match="ebr"):
        exporter.check(tmp_path / "x.onnx", 20)


def test_the_trunk_itself_stays_as_it_was(make_tiny):
    model = make_tiny("wan")
    quantize_trunk(model.trunk)
    before = {name: type(module) for name, module in model.trunk.named_modules()}
    graph = exporter.TrunkGraph(model.trunk, model.step(0))
    assert exporter.with_qdq(graph.trunk) == 4 * len(model.trunk.blocks)
    assert {name: type(module) for name, module in model.trunk.named_modules()} == before
    for name, tensor in model.trunk.state_dict().items():
        twin = graph.trunk.state_dict()[name]
        assert twin.data_ptr() == tensor.data_ptr()
