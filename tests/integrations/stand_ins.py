"""Stand-ins of ComfyUI's modules: no more of them than the nodes use, with the same names, arguments and order of calls."""

import sys
import types
from pathlib import Path


class Interrupted(Exception):
    """As ComfyUI's own: raised once after it has been asked for."""


class Port:
    def __init__(self, kind, id=None, **more):
        self.kind, self.id, self.more = kind, id, more
        self.optional = more.get("optional", False)


def _type(kind):
    def made(id=None, **more):
        return Port(kind, id, **more)

    return types.SimpleNamespace(Input=made, Output=made, io_type=kind)


class Schema:
    """As `io.Schema`: refuses ids that are not unique."""

    def __init__(self, node_id, display_name, category, inputs, outputs, description=""):
        self.node_id, self.display_name, self.category, self.description = node_id, display_name, category, description
        self.inputs, self.outputs = inputs, outputs
        ids = [one.id for one in (*inputs, *outputs) if one.id is not None]
        assert len(set(ids)) == len(ids)


class NodeOutput:
    def __init__(self, *args):
        self.args = args


class ModelPatcher:
    """What of `comfy.model_patcher.ModelPatcher` stays in use under an override of its loading."""

    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        self.model, self.load_device, self.offload_device, self.parent = model, load_device, offload_device, None
        self.model_size()

    def model_patches_models(self):
        return []


class Comfy:
    """The modules by name, and what happened to them."""

    def __init__(self, models: Path, device):
        self.bars, self.loaded, self.interrupt, self.freed = [], [], None, 0
        comfy = self

        class ProgressBar:
            def __init__(self, total, node_id=None):
                self.total, self.values = total, []
                comfy.bars.append(self)

            def update_absolute(self, value, total=None, preview=None):
                assert 0 <= value <= self.total
                self.values.append(value)

        def throw_exception_if_processing_interrupted():
            if self.interrupt is not None:
                self.interrupt -= 1
                if self.interrupt < 0:
                    self.interrupt = None
                    raise Interrupted

        def load_models_gpu(models, **_):
            for one in models:
                if one not in self.loaded:
                    one.model_patches_to(one.load_device)
                    one.model_patches_to(one.model_dtype())
                    one.partially_load(one.load_device, 1e32, force_patch_weights=False)
                    self.loaded.insert(0, one)

        def unload_all_models():
            for one in self.loaded:
                if one.partially_unload(one.offload_device, 1e30) < 1e30:
                    one.detach(True)
            self.loaded.clear()

        def soft_empty_cache(force=False):
            self.freed += 1

        def get_full_path_or_raise(folder, name):
            path = Path(self.folders[folder], name)
            if not path.is_file():
                raise FileNotFoundError(name)
            return str(path)

        self.folders = {}
        self.modules = {
            "comfy": {},
            "comfy.model_management": {
                "get_torch_device": lambda: device,
                "load_models_gpu": load_models_gpu,
                "unload_all_models": unload_all_models,
                "soft_empty_cache": soft_empty_cache,
                "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
            },
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
            "folder_paths": {
                "models_dir": str(models),
                "add_model_folder_path": lambda name, path, is_default=False: self.folders.setdefault(name, path),
                "get_filename_list": lambda name: sorted(one.name for one in Path(self.folders[name]).glob("*")),
                "get_full_path_or_raise": get_full_path_or_raise,
            },
            "comfy_api": {},
            "comfy_api.latest": {
                "ComfyExtension": type("ComfyExtension", (), {}),
                "io": types.SimpleNamespace(
                    ComfyNode=type("ComfyNode", (), {}),
                    Schema=Schema,
                    NodeOutput=NodeOutput,
                    Custom=_type,
                    **{name: _type(name.upper()) for name in ("Image", "Mask", "Combo", "String", "Float", "Int", "Boolean")},
                ),
            },
        }

    def install(self, monkeypatch):
        for name, values in self.modules.items():
            module = types.ModuleType(name)
            module.__dict__.update(values)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], own, module)
        return self
