"""`ebr-engine info`: what this machine offers the engine, and what the engine will do with it."""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from ebr_engine.cli.threads import affinity, cpu_quota

PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "pyvips", "numpy")


def info(as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False) -> None:
    """Show devices, precision, kernel backends and why one is missing, versions and folders."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


def collect() -> dict[str, Any]:
    """Everything `info` tells, as plain values; `device` and `precision` are what `auto` means here."""
    import torch

    from ebr_engine import settings
    from ebr_engine.backbones.layers import trunk_dtype
    from ebr_engine.engine.devices import choose_device, device_name
    from ebr_engine.engine.warm import prepared
    from ebr_engine.kernels import backend, tune
    from ebr_engine.version import __version__

    return {
        "version": __version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "precision": "bf16" if trunk_dtype("auto", choose_device("auto")) == torch.bfloat16 else "fp32",
        "cpu": {
            "name": device_name(torch.device("cpu")),
            "cores": affinity(),
            "quota": cpu_quota(),
            "threads": torch.get_num_threads(),
        },
        "cuda": _cuda_devices(torch),
        "kernels": [{"name": b.name, "available": b.available, "reason": b.reason} for b in backend.backends()],
        "choices": tune.summary(),
        "prepared": prepared(choose_device("auto")),
        "backbones": _backbones(),
        "memory": _memory(),
        "tasks": _tasks(settings.prompt_dir()),
        "pictures": _pictures(),
        "folders": {"cache": str(settings.cache_dir()), "prompts": str(settings.prompt_dir())},
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "libvips": _libvips(),
        },
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def section(title: str, rows: dict[str, str]) -> None:
        if table.row_count:
            table.add_row()
        table.add_row(f"[cyan]{title}[/]")
        for name, value in rows.items():
            table.add_row(f"  {name}", value)

    cpu = facts["cpu"]
    quota = f", a quota of {cpu['quota']:g}" if cpu["quota"] else ""
    section(f"ebr-engine {facts['version']}", {"device": facts["device"], "precision": facts["precision"]})
    section(
        "Devices",
        {
            "cpu": f"{cpu['name']}, {cpu['cores']} cores{quota}, {cpu['threads']} threads used",
            **{d["name"]: f"{d['description']}" for d in facts["cuda"]},
        },
    )
    section("Kernels", {k["name"]: _yes_no(k["available"], k["reason"]) for k in facts["kernels"]})
    if facts["choices"]:
        words = {name: "\n".join(f"{kind}: {way}" for kind, way in kinds.items()) for name, kinds in facts["choices"].items()}
        section("Chosen by measuring", words)
    if facts["prepared"]:
        section("Prepared by warm", {kind: _prepared(one) for kind, one in facts["prepared"].items()})
    section("Backbones", {name: _sizes(**sizes) for name, sizes in facts["backbones"].items()})
    section("Memory on a GPU, computed (bf16)", {name: _needs(**needs) for name, needs in facts["memory"].items()})
    section("Tasks", {name: ", ".join(tasks) for name, tasks in facts["tasks"].items()} or {"none": "no prompt found"})
    section("Pictures", {name: f"[green]yes[/]  {library}" for name, library in facts["pictures"]["read"].items()})
    if facts["pictures"]["missing"]:
        section("Pictures not read here", facts["pictures"]["missing"])
    section("Folders", facts["folders"])
    section("Versions", {name: version or "[dim]not installed[/]" for name, version in facts["versions"].items()})
    Console(highlight=False).print(table)


def _pictures() -> dict[str, dict[str, str]]:
    """The kinds of pictures, with the library that reads each here, or what is missing for it."""
    from ebr_engine.errors import EbrError
    from ebr_engine.media.decoding import KINDS, missing, name_of, reader_of

    found: dict[str, dict[str, str]] = {"read": {}, "missing": {}}
    for kind in KINDS:
        try:
            library = reader_of(kind)
        except EbrError as error:  # libvips itself is missing
            found["missing"][name_of(kind)] = str(error)
            continue
        found["read" if library else "missing"][name_of(kind)] = library or missing(kind)
    return found


def _backbones() -> dict[str, dict[str, Any]]:
    """Parameters and bytes of every backbone's halves, the trunk in bf16, and what there is to be said of it."""
    import torch

    from ebr_engine.backbones.registry import named_configs

    found = named_configs().items()
    return {name: {**spec.parameters(config, torch.bfloat16), "note": spec.note} for name, (spec, config) in found}


def _memory() -> dict[str, dict[str, Any]]:
    """Bytes that a run of every backbone's default size needs on a GPU, by the memory model: as it is, and at the least."""
    from ebr_engine.backbones.registry import medium_of, named_configs
    from ebr_engine.engine.costs import costs
    from ebr_engine.engine.memory import Fallback, Work, fallbacks, last_with_view, peak

    needs = {}
    for name, (spec, config) in named_configs().items():
        height, width = spec.native_size
        frames = spec.chunk[0] if spec.knows_time else 1
        model = costs(spec, config, "bf16", "cuda")
        ways = fallbacks(Fallback(spec.tile, spec.overlap, frames=frames), model)
        work = Work(1, frames, height, width)
        chosen = {"bytes": ways[0], "low_bytes": ways[last_with_view(ways)], "least_bytes": ways[-1]}
        needs[name] = {"medium": medium_of(spec.name), "frames": frames, "height": height, "width": width}
        needs[name] |= {key: peak(model, way, work) for key, way in chosen.items()}
    return needs


def _needs(medium: str, frames: int, height: int, width: int, bytes: int, low_bytes: int, least_bytes: int) -> str:
    from ebr_engine.engine.memory import format_size
    from ebr_engine.media import PICTURES

    size = f"{width} x {height}" + (f", {frames} frames" if frames > 1 else "")
    size = size if medium == PICTURES else f"{frames} frames of {medium}"
    whole, low, least = map(format_size, (bytes, low_bytes, least_bytes))
    return f"{size}: {whole}; {low} with --low-memory, {least} at the least (--max-memory)"


def _sizes(trunk_parameters: int, trunk_bytes: int, conditioner_parameters: int, conditioner_bytes: int, note: str) -> str:
    trunk, conditioner = (_rounded(count, "") for count in (trunk_parameters, conditioner_parameters))
    device, host = (_rounded(count, "B") for count in (trunk_bytes, conditioner_bytes))
    sizes = f"{trunk} parameters on the device ({device} in bf16), {conditioner} that never get there ({host})"
    return f"{sizes}; {note}" if note else sizes


def _rounded(count: int, unit: str) -> str:
    billion = "G" if unit else "B"
    name, size = next((n, s) for n, s in ((billion, 1e9), ("M", 1e6), ("k", 1e3), ("", 1)) if count >= s)
    return f"{count / size:.3g} {name}{unit}"


def _prepared(one: dict[str, Any]) -> str:
    if one["compiled"] is None:
        return "ways chosen, nothing compiled"
    return f"compiled in {one['compiled']:.1f} s, from what is kept in {one['kept']:.1f} s"


def _yes_no(available: bool, reason: str) -> str:
    from rich.markup import escape

    return f"{'[green]yes[/]' if available else '[red]no [/]'}  {escape(reason)}"


def _tasks(*folders: Path) -> dict[str, list[str]]:
    """Backbone → tasks of the prompt files in the package and in `folders`, by what the files say of themselves."""
    from safetensors import SafetensorError, safe_open

    from ebr_engine.prompts.prompt import FORMAT

    tasks: dict[str, set[str]] = {}
    for folder in (Path(__file__).parents[1] / "assets", *folders):
        for path in folder.rglob("*.safetensors"):
            try:
                with safe_open(path, "pt") as file:
                    about = file.metadata() or {}
            except (OSError, SafetensorError):  # `ebr-engine prompts show` tells what is wrong with it
                continue
            if about.get("format") == FORMAT:
                tasks.setdefault(about.get("backbone", ""), set()).add(about.get("task") or path.stem)
    return {backbone: sorted(names) for backbone, names in sorted(tasks.items())}


def _cuda_devices(torch: Any) -> list[dict[str, str]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        description = f"{found.name}, {memory:.0f} GiB, compute capability {found.major}.{found.minor}"
        devices.append({"name": f"cuda:{index}", "description": description})
    return devices


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _libvips() -> str | None:
    try:
        import pyvips
    except (ImportError, OSError):
        return None
    return ".".join(str(pyvips.version(part)) for part in range(3))
