"""Which package may import which: the table of docs/internals.md, held against the imports in the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "internals.md"
ANYONE = {"errors", "settings", "tensor_files", "version"}  # small modules that all may import
LATE = {("engine", "jobs")}  # against the order, and only when it is called


def imports_of(source, package):
    """(package imported, whether when the module is imported) of every import of our own in a module's source."""

    def visit(node, at_once):
        for child in ast.iter_child_nodes(node):
            names = []
            if isinstance(child, ast.Import):
                names = [one.name for one in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, "imports are written whole"
                names = [f"{child.module}.{one.name}" for one in child.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "ebr_engine" and len(parts) > 1 and parts[1] != package:
                    yield parts[1], at_once
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not typing:
                yield from visit(child, at_once and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return visit(ast.parse(source), True)


def edges():
    """(package, package that it imports, at once) → the files that do."""
    found = {}
    for folder, package in ((ROOT / "ebr_engine", None), (ROOT / "kernels", "kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).parts
            name = package or (parts[0] if len(parts) > 1 else path.stem)
            for imported, at_once in imports_of(path.read_text(encoding="utf-8"), name):
                found.setdefault((name, imported, at_once), set()).add(path.relative_to(ROOT).as_posix())
    return {
        edge: files
        for edge, files in found.items()
        if edge[0] not in ("__init__", "__main__") and edge[1] not in ("_csrc", "_cpu")
    }


def table():
    """package → what it may import, in the order of the page: each imports only what stands above it."""
    text = PAGE.read_text(encoding="utf-8").split("## The packages")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", cell)) for name, cell in rows}


def test_imports_are_found():
    source = "import os\nfrom ebr_engine.media import images\ndef f():\n    import ebr_engine.engine.run\n"
    assert list(imports_of(source, "jobs")) == [("media", True), ("engine", False)]
    assert list(imports_of("if TYPE_CHECKING:\n    from ebr_engine.jobs.files import Job", "engine")) == []


def test_every_package_stands_in_the_table():
    folders = {path.parent.name for path in (ROOT / "ebr_engine").glob("*/__init__.py")}
    assert set(table()) == folders | {"kernels", "request"}


def test_the_table_has_no_circles():
    above = set()
    for name, imported in table().items():
        assert imported <= above, f"{name} may import what stands below it"
        above.add(name)


@pytest.mark.parametrize("at_once", [True, False])
def test_packages_import_what_the_table_says(at_once):
    allowed = table()
    wrong = {
        f"{name} imports {imported}": sorted(files)
        for (name, imported, when), files in edges().items()
        if when is at_once and name in allowed and imported not in allowed[name] | ANYONE
        if at_once or (name, imported) not in LATE
    }
    assert wrong == {}


def test_what_all_may_import_imports_none_of_them():
    assert {edge: files for edge, files in edges().items() if edge[0] in ANYONE and edge[1] not in ANYONE} == {}


def test_the_table_names_no_import_that_is_gone():
    there = {(name, imported) for name, imported, _ in edges()}
    assert {(name, one) for name, imported in table().items() for one in imported} - there == set()


def test_what_is_against_the_order_is_still_needed():
    assert {(name, imported) for name, imported, at_once in edges() if not at_once} >= LATE


def test_only_commands_know_typer():
    files = [path for path in (ROOT / "ebr_engine").rglob("*.py") if "typer" in path.read_text(encoding="utf-8")]
    assert {path.parent.name for path in files} == {"cli"}
