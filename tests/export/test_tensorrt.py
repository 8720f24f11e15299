"""TensorRT's part without TensorRT: a stand-in records what it is asked for. Nothing here shows that a plan runs on a GPU."""

import sys
from types import SimpleNamespace

import pytest
import torch

from ebr_engine.errors import EngineError
from ebr_engine.export.tensorrt import PlanOptions, load_runner, open_sizes, write_plan

LEAST = {"latent": (16, 1, 2, 2), "cos": (1, 1, 1, 6), "sin": (1, 1, 1, 6)}
LARGEST = {"latent": (16, 3, 60, 104), "cos": (3, 30, 52, 6), "sin": (3, 30, 52, 6)}


class FakeTensorRT(SimpleNamespace):
    """The names of the tensorrt package that we use; `asked` keeps every call's name and arguments."""

    def __init__(self, parses=True, builds=True, loads=True, takes=True):
        super().__init__(__version__="10.9", asked=[])
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=2)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.Logger = lambda level: level
        self.Logger.ERROR = 1
        cache = SimpleNamespace(serialize=lambda: b"timings of kernels")
        self.config = SimpleNamespace(
            set_memory_pool_limit=self.note("limit"),
            add_optimization_profile=self.note("profile"),
            create_timing_cache=self.note("cache", cache),
            set_timing_cache=self.note("set_cache"),
            get_timing_cache=lambda: cache,
        )
        self.builder = SimpleNamespace(
            create_network=self.note("network", "the network"),
            create_builder_config=lambda: self.config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=self.note("shape")),
            build_serialized_network=self.note("build", b"the plan" if builds else None),
        )
        self.Builder = lambda logger: self.builder
        error = SimpleNamespace(desc=lambda: "no such operator")
        parser = SimpleNamespace(parse_from_file=self.note("parse", parses), num_errors=1, get_error=lambda i: error)
        self.OnnxParser = lambda network, logger: parser
        self.context = SimpleNamespace(
            set_input_shape=self.note("input", takes),
            set_tensor_address=self.note("address"),
            execute_async_v3=self.note("run", True),
        )
        names = ["latent", "modulation", "velocity"]
        engine = SimpleNamespace(
            num_io_tensors=3,
            get_tensor_name=names.__getitem__,
            get_tensor_shape=lambda name: (-1, 2) if name == "latent" else (1, 2),
            create_execution_context=lambda: self.context,
        )
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=self.note("load", engine if loads else None))

    def note(self, name, result=None):
        def called(*arguments, **settings):
            self.asked.append((name, *arguments, *settings.items()))
            return result

        return called

    def calls(self, name):
        return [call[1:] for call in self.asked if call[0] == name]


@pytest.fixture
def tensorrt(monkeypatch, tmp_path):
    """Put a stand-in in the package's place; its arguments say what fails."""
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))

    def make(**outcomes):
        fake = FakeTensorRT(**outcomes)
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        return fake

    return make


@pytest.fixture
def stream(monkeypatch):
    """A CUDA device and stream in name only."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))


def test_without_the_package_the_install_line_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"pip install 'ebr-engine\[tensorrt\]'"):
        write_plan(tmp_path / "x.plan", tmp_path / "x.onnx", PlanOptions())
    with pytest.raises(EngineError, match=r"pip install 'ebr-engine\[tensorrt\]'"):
        load_runner(tmp_path / "x.plan", torch.device("cuda"))


def test_a_plan_is_strongly_typed_and_asks_for_what_the_options_say(tensorrt, tmp_path):
    fake = tensorrt()
    write_plan(tmp_path / "x.plan", tmp_path / "x.onnx", PlanOptions(1.5, open_sizes(LEAST, LARGEST)))
    assert (tmp_path / "x.plan").read_bytes() == b"the plan"
    assert fake.calls("network") == [(4,)]
    assert fake.calls("parse") == [(str(tmp_path / "x.onnx"),)]
    assert fake.calls("limit") == [("workspace", 3 * 2**29)]
    shapes = {name: sizes for name, *sizes in fake.calls("shape")}
    assert shapes["latent"] == [(1, 16, 1, 2, 2), (1, 16, 3, 60, 104), (4, 16, 3, 60, 104)]
    assert shapes["cos"] == [LEAST["cos"], LARGEST["cos"], LARGEST["cos"]]
    assert len(fake.calls("profile")) == 1


def test_a_fixed_size_needs_no_profile_and_timings_are_kept_for_the_next_build(tensorrt, tmp_path):
    for known in (b"", b"timings of kernels"):
        fake = tensorrt()
        write_plan(tmp_path / "x.plan", tmp_path / "x.onnx", PlanOptions())
        assert fake.calls("cache") == [(known,)]
        assert not fake.calls("profile")
        assert not fake.calls("limit")


@pytest.mark.parametrize(("outcome", "words"), [("parses", "no such operator"), ("builds", "could not build")])
def test_a_build_that_fails_writes_nothing(tensorrt, tmp_path, outcome, words):
    tensorrt(**{outcome: False})
    with pytest.raises(EngineError, match=words):
        write_plan(tmp_path / "x.plan", tmp_path / "x.onnx", PlanOptions())
    assert not list(tmp_path.iterdir())


def test_tensors_are_bound_by_address_on_torchs_stream(tensorrt, tmp_path, stream):
    fake = tensorrt()
    (tmp_path / "x.plan").write_bytes(b"the plan")
    run = load_runner(tmp_path / "x.plan", torch.device("cuda"))
    assert run.shapes == {"latent": (-1, 2), "modulation": (1, 2)}
    inputs = {"latent": torch.zeros(3, 2), "modulation": torch.zeros(1, 2), "unread": torch.zeros(9)}
    velocity = run(inputs)
    assert fake.calls("load") == [(b"the plan",)]
    assert fake.calls("input") == [("latent", (3, 2)), ("modulation", (1, 2))]
    tensors = {"latent": inputs["latent"], "modulation": inputs["modulation"], "velocity": velocity}
    assert fake.calls("address") == [(name, tensor.data_ptr()) for name, tensor in tensors.items()]
    assert fake.calls("run") == [(77,)]


def test_a_plan_of_another_machine_and_a_size_beyond_it_are_told(tensorrt, tmp_path, stream):
    (tmp_path / "x.plan").write_bytes(b"the plan")
    tensorrt(loads=False)
    with pytest.raises(EngineError, match="another GPU or TensorRT version"):
        load_runner(tmp_path / "x.plan", torch.device("cuda"))
    with pytest.raises(EngineError, match="CUDA devices only"):
        load_runner(tmp_path / "x.plan", torch.device("cpu"))
    tensorrt(takes=False)
    run = load_runner(tmp_path / "x.plan", torch.device("cuda"))
    with pytest.raises(EngineError, match=r"not built for latent of \[9, 2\]"):
        run({"latent": torch.zeros(9, 2), "modulation": torch.zeros(1, 2)})
