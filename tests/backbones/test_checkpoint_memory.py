"""A backbone is loaded in hardly more memory than it takes up then."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import save_file

from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.wan.model import WanConfig
from tests.backbones.original_layouts import flux_original

# Pages of the mapped file count as RssFile and can be dropped at any time; what a load needs is what is RssAnon.
MEASURE = textwrap.dedent("""
    import re, sys, threading, time
    import torch
    from ebr_engine.backbones.checkpoint import find_model, load_halves

    def anonymous():
        with open("/proc/self/status") as status:
            return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) * 1024

    def poll():
        global peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    torch.zeros(1).bfloat16()
    start = peak = anonymous()
    done = threading.Event()
    thread = threading.Thread(target=poll)
    thread.start()
    halves = load_halves(find_model(*sys.argv[1:]), "cpu", torch.bfloat16)
    done.set()
    thread.join()
    trunk, conditioner = (sum(p.nbytes for p in half.parameters()) for half in reversed(halves))
    print(max(peak, anonymous()) - start, trunk, conditioner)
""")


def peak_of_loading(name, source):
    """Peak growth of a fresh process' own memory in bytes while it loads a model in bf16; bytes of its trunk, conditioner."""
    command = [sys.executable, "-c", MEASURE, name, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


def random_bf16(shape):
    """Random finite numbers near one, made at the speed of memory."""
    return torch.empty(shape, dtype=torch.int16).random_(0x3F00, 0x3FFF).view(torch.bfloat16)


def write_wan(folder, config):
    """A sharded random checkpoint of a configuration, never whole in memory; its bytes."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in WanTransformer3DModel(**config.to_diffusers()).state_dict().items()}
    transformer, weight_map = folder / "transformer", {}
    transformer.mkdir()
    settings = {"_class_name": "WanTransformer3DModel", **config.to_diffusers()}
    (transformer / "config.json").write_text(json.dumps(settings))
    names = sorted(shapes)
    for i in range(0, len(names), 60):
        shard = f"shard-{i}.safetensors"
        save_file({name: random_bf16(shapes[name]) for name in names[i : i + 60]}, transformer / shard)
        weight_map |= dict.fromkeys(names[i : i + 60], shard)
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in transformer.iterdir())


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@needs_proc
def test_loading_needs_the_memory_of_its_result(tmp_path):
    config = WanConfig(num_attention_heads=6, ffn_dim=4096, num_layers=8, text_dim=64)
    assert write_wan(tmp_path, config) > 100e6
    peak, trunk, conditioner = peak_of_loading("wan", tmp_path)
    assert trunk > 100e6
    assert 0.9 * (trunk + conditioner) < peak <= 1.2 * trunk + conditioner


@needs_proc
def test_loading_fused_original_tensors_needs_the_memory_of_the_result(tmp_path):
    config = FluxConfig(num_attention_heads=6, num_layers=2, num_single_layers=5)
    with torch.device("meta"):
        shapes = FluxTransformer2DModel(**config.to_diffusers()).state_dict()
        original = flux_original(shapes, 2, 5, guidance=False)
    save_file({name: random_bf16(tensor.shape) for name, tensor in original.items()}, tmp_path / "a.safetensors")
    peak, trunk, conditioner = peak_of_loading("flux", tmp_path / "a.safetensors")
    assert trunk > 80e6
    assert 0.9 * (trunk + conditioner) < peak <= 1.2 * trunk + conditioner


@needs_proc
@pytest.mark.slow
def test_loading_more_than_a_gigabyte_needs_the_memory_of_its_result(tmp_path):
    config = WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=12)
    try:
        assert write_wan(tmp_path, config) > 1e9
        peak, trunk, conditioner = peak_of_loading("wan", tmp_path)
    finally:
        for file in tmp_path.rglob("*.safetensors"):  # pytest keeps the folders of its last runs
            file.unlink()
    assert 0.9 * (trunk + conditioner) < peak <= 1.2 * trunk + conditioner
