"""The nodes for ComfyUI against what ComfyUI promises and asks for, with the bundled backbone."""

import asyncio
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ebr_engine.errors import EbrError
from tests.integrations.stand_ins import Comfy, Interrupted

PACK = Path(__file__).parents[2] / "integrations/comfyui"
DARK = Path(__file__).parents[2] / "ebr_engine/assets/mini/prompts/lowlight.safetensors"


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    prompts = tmp_path / "models/ebr_prompts"
    prompts.mkdir(parents=True)
    shutil.copy(DARK, prompts / "own.safetensors")
    return Comfy(tmp_path / "models", torch.device("cpu")).install(monkeypatch)


@pytest.fixture
def nodes(comfy, monkeypatch):
    """The pack's nodes by id, loaded as ComfyUI loads a folder of `custom_nodes`."""
    name = "comfyui_pack_under_test"
    for one in (name, f"{name}.nodes", f"{name}.models"):
        monkeypatch.delitem(sys.modules, one, raising=False)
    where = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    pack = importlib.util.module_from_spec(where)
    monkeypatch.setitem(sys.modules, name, pack)
    where.loader.exec_module(pack)
    extension = asyncio.run(pack.comfy_entrypoint())
    found = {one.define_schema().node_id: one for one in asyncio.run(extension.get_node_list())}
    yield found
    for one in (f"{name}.nodes", f"{name}.models"):
        sys.modules.pop(one, None)


@pytest.fixture
def restorer(nodes):
    return nodes["EbrLoadRestorer"].execute("mini", "auto", "none", "").args[0]


def picture(count=1, height=24, width=32, channels=3):
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():  # as ComfyUI's pictures come
        return torch.rand(count, height, width, channels, generator=generator)


def asked(**more):
    return {"task": "lowlight", "strength": 1.0, "steps": 2, "seed": 42, "tile": -1, **more}


def test_every_node_says_what_it_takes_and_gives(nodes):
    assert sorted(nodes) == ["EbrAutoTask", "EbrLoadPrompt", "EbrLoadRestorer", "EbrRestore", "EbrRestoreVideo"]
    schema = nodes["EbrRestore"].define_schema()
    kinds = {one.id: (one.kind, one.optional) for one in schema.inputs}
    assert kinds["restorer"] == ("EBR_RESTORER", False)
    assert kinds["image"] == ("IMAGE", False)
    assert kinds["mask"] == ("MASK", True)
    assert [one.kind for one in schema.outputs] == ["IMAGE", "MASK"]
    options = {one.id: one.more.get("options") for one in nodes["EbrLoadPrompt"].define_schema().inputs}
    assert options["file"] == ["own.safetensors"]
    for node in nodes.values():
        schema = node.define_schema()
        assert schema.category == "ebr-engine"
        for one in schema.inputs:  # an input of another name would fail when the node runs
            assert one.id in node.execute.__code__.co_varnames or node.execute.__code__.co_flags & 0x08


def test_a_batch_is_restored_picture_by_picture(nodes, restorer, comfy):
    from ebr_engine.engine.restorer import Restorer

    image, mask = picture(2), torch.ones(2, 24, 32)
    before = image.clone()
    with torch.inference_mode():
        made, out = nodes["EbrRestore"].execute(restorer, image, mask, **asked()).args
    assert out is mask
    assert (made.shape, made.dtype) == (image.shape, torch.float32)
    assert not made.is_inference()
    assert 0 <= made.min() <= made.max() <= 1
    assert torch.equal(image, before)
    assert not torch.equal(made, image)
    alone = Restorer("mini").restore(image.clone().movedim(-1, 1), task="lowlight", steps=2)
    torch.testing.assert_close(made, alone.movedim(1, -1), atol=2e-3, rtol=0)
    assert comfy.bars[0].values[-1] == comfy.bars[0].total
    assert comfy.bars[0].values == sorted(comfy.bars[0].values)


def test_alpha_stays_and_no_mask_is_an_empty_one(nodes, restorer):
    image = picture(channels=4)
    made, mask = nodes["EbrRestore"].execute(restorer, image, **asked()).args
    assert made.shape == image.shape
    assert torch.equal(made[..., 3], image[..., 3])
    assert mask.shape == (1, 24, 32)
    assert not mask.any()


def test_models_are_loaded_when_needed_and_let_go_when_asked(nodes, restorer, comfy):
    assert restorer.restorer is None
    assert restorer.loaded_size() == 0
    first = nodes["EbrRestore"].execute(restorer, picture(), **asked()).args[0]
    assert comfy.loaded == [restorer]
    assert restorer.loaded_size() == restorer.model_size() > 0
    sys.modules["comfy.model_management"].unload_all_models()
    assert restorer.restorer is None
    assert restorer.loaded_size() == 0
    assert comfy.freed
    again = nodes["EbrRestore"].execute(restorer, picture(), **asked()).args[0]
    assert torch.equal(first, again)


@pytest.mark.parametrize("node", ["EbrRestore", "EbrRestoreVideo"])
def test_an_interrupt_ends_it_after_the_step(nodes, restorer, comfy, node):
    comfy.interrupt = 1  # at the second step
    with pytest.raises(Interrupted):
        nodes[node].execute(restorer, picture(3), **asked(steps=4))
    assert len(comfy.bars[0].values) == 2
    assert comfy.interrupt is None
    made, _ = nodes[node].execute(restorer, picture(1), **asked()).args  # and the next run is as usual
    assert made.shape == (1, 24, 32, 3)


def test_frames_are_restored_in_chunks(nodes, restorer, comfy):
    frames = picture(5)
    options = asked(chunk_frames=2, chunk_overlap=0, per_frame=False, temporal_window=0)
    made, mask = nodes["EbrRestoreVideo"].execute(restorer, frames, **options).args
    alone, _ = nodes["EbrRestore"].execute(restorer, frames, **asked()).args
    assert (made.shape, mask.shape) == (frames.shape, (5, 24, 32))
    torch.testing.assert_close(made, alone, atol=2e-3, rtol=0)  # mini knows no time: chunks change nothing
    assert comfy.bars[0].values[-1] == 5


def test_prompts_are_loaded_and_mixed(nodes, restorer):
    prompt = nodes["EbrLoadPrompt"].execute("own.safetensors", 1.0).args[0]
    by_task, _ = nodes["EbrRestore"].execute(restorer, picture(), **asked()).args
    by_file, _ = nodes["EbrRestore"].execute(restorer, picture(), **asked(prompt=prompt)).args
    assert torch.equal(by_task, by_file)
    mixed = nodes["EbrLoadPrompt"].execute("own.safetensors", 0.5, prompt).args[0]
    assert [weight for _, weight in mixed] == [1.0, 0.5]


def test_auto_names_tasks_and_what_needs_none_is_left_as_it_is(nodes, restorer, monkeypatch):
    task, seen = nodes["EbrAutoTask"].execute(picture(), guess=True).args
    assert task
    assert "%" in seen
    image = picture()
    assert nodes["EbrRestore"].execute(restorer, image, **asked(task="none")).args[0] is image
    assert restorer.restorer is None  # nothing was loaded for it

    from ebr_engine.engine import restorer as module
    from ebr_engine.engine.classify import Diagnosis
    from ebr_engine.prompts.catalogue import TASKS

    monkeypatch.setattr(module, "diagnose", lambda pictures: Diagnosis(dict.fromkeys(TASKS, 0.1)))
    made, _ = nodes["EbrRestore"].execute(restorer, image, **asked(task="auto")).args
    assert torch.equal(made, image)
    made, _ = nodes["EbrRestoreVideo"].execute(restorer, image, **asked(task="auto")).args
    assert torch.equal(made, image)


def test_what_cannot_be_met_is_one_clear_line(nodes, restorer):
    for wrong in ({"task": "hase"}, {"task": ""}, {"tile": 3}):
        with pytest.raises(EbrError) as told:
            nodes["EbrRestore"].execute(restorer, picture(), **asked(**wrong))
        assert len(str(told.value).splitlines()) == 1


def test_the_example_uses_the_nodes_as_they_are(nodes):
    graph = json.loads((PACK / "workflow_api.json").read_text())
    for number, node in graph.items():
        if node["class_type"] not in nodes:
            continue
        schema = nodes[node["class_type"]].define_schema()
        known = {one.id: one for one in schema.inputs}
        assert set(node["inputs"]) <= set(known), number
        assert {name for name, one in known.items() if not one.optional} <= set(node["inputs"]), number
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in graph
