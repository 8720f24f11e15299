"""What an install holds, and what the build script decides about the extensions; nothing is compiled."""

import importlib.util
import os
from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.config.pyprojecttoml import read_configuration
from setuptools.errors import CompileError

ROOT = Path(__file__).parents[1]
KNOWN = {"75", "80", "86", "89", "90", "100", "120"}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiler(tmp_path):
    """`compiler(*archs)`: a folder whose bin/nvcc lists these."""

    def write(*archs, fails=False):
        path = tmp_path / "bin" / "nvcc"
        path.parent.mkdir(exist_ok=True)
        lines = [f"echo compute_{arch}" for arch in archs] + ["exit 1"] * fails
        path.write_text("\n".join(["#!/bin/sh", *lines]))
        path.chmod(0o755)
        return tmp_path

    return write


def test_the_compiler_is_looked_for_in_cuda_home_then_on_path(script, compiler, tmp_path):
    home = compiler()
    nvcc = str(home / "bin" / "nvcc")
    assert script.find_nvcc({"CUDA_HOME": str(home), "PATH": ""}) == nvcc
    assert script.find_nvcc({"CUDA_HOME": str(tmp_path / "none"), "PATH": str(home / "bin")}) == nvcc
    assert script.find_nvcc({"PATH": str(tmp_path / "none")}) is None


def test_the_compiler_is_asked_what_it_can_build_for(script, compiler):
    assert script.known_archs(str(compiler("80", "90", "103") / "bin" / "nvcc")) == {"80", "90", "103"}


@pytest.mark.parametrize("asked", [None, "", " "])
def test_by_default_it_builds_for_what_the_compiler_knows(script, asked):
    assert script.choose_archs(asked, KNOWN) == ["80", "89", "90a", "100", "120"]
    assert script.choose_archs(asked, {"80", "86", "89", "90"}) == ["80", "89", "90a"]


@pytest.mark.parametrize("asked", ["86 90a", "86;90a", "86, 90a", " 86 90a\n"])
def test_archs_can_be_asked_for(script, asked):
    assert script.choose_archs(asked, KNOWN) == ["86", "90a"]


def test_an_arch_beyond_the_compiler_is_refused_by_name(script):
    with pytest.raises(ValueError, match=r"asks for 130; this nvcc knows 75, 80, .*120"):
        script.choose_archs("80 130", KNOWN)
    with pytest.raises(ValueError, match=r"asks for sm_80"):
        script.choose_archs("sm_80", KNOWN)


def test_a_compiler_older_than_every_arch_is_refused(script):
    with pytest.raises(ValueError, match="knows none of 80"):
        script.choose_archs(None, {"70", "75"})


def test_each_arch_gets_machine_code_and_the_oldest_its_ptx_too(script):
    assert script.arch_options(["90a", "100", "80"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert script.arch_options(["90a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]  # its PTX would run nowhere else


@pytest.mark.parametrize("asked", [None, "", "auto"])
def test_without_a_compiler_the_install_goes_on_and_says_so(script, asked, capsys):
    environment = {"PATH": ""} | ({} if asked is None else {"EBR_BUILD_CUDA": asked})
    assert script.extension(environment) == {}
    assert "not built: no nvcc in CUDA_HOME or on PATH" in capsys.readouterr().err


def test_a_demanded_build_without_a_compiler_fails(script):
    with pytest.raises(SystemExit, match="EBR_BUILD_CUDA=1, but there is no nvcc"):
        script.extension({"PATH": "", "EBR_BUILD_CUDA": "1"})


def test_it_is_not_built_against_ones_will(script, compiler, capsys):
    assert script.extension({"CUDA_HOME": str(compiler()), "EBR_BUILD_CUDA": "0", "EBR_BUILD_CPU": "0"}) == {}
    told = capsys.readouterr().err
    assert "not built: EBR_BUILD_CUDA=0" in told
    assert "not built: EBR_BUILD_CPU=0" in told


def test_another_value_is_refused(script):
    with pytest.raises(SystemExit, match="EBR_BUILD_CUDA is 'yes'; it has to be auto, 0 or 1"):
        script.extension({"EBR_BUILD_CUDA": "yes"})
    with pytest.raises(SystemExit, match="EBR_BUILD_CPU is 'yes'; it has to be auto, 0 or 1"):
        script.extension({"EBR_BUILD_CPU": "yes"})


def test_the_cpus_compiler_is_the_one_that_cxx_names(script, tmp_path):
    (tmp_path / "mine").touch(0o755)
    assert script.find_compiler({"CXX": "mine -m64", "PATH": str(tmp_path)}) == ["mine", "-m64"]
    assert script.find_compiler({"PATH": str(tmp_path)}) is None
    modules = script.extension({"CXX": "mine", "PATH": str(tmp_path)})["ext_modules"]
    assert [(module.name, module.optional) for module in modules] == [("ebr_engine._cpu", True)]


@pytest.mark.parametrize(("asked", "optional"), [("auto", True), ("1", False)])
def test_only_a_demanded_build_may_fail_the_install(script, compiler, asked, optional, monkeypatch, tmp_path):
    environment = {"CUDA_HOME": str(compiler("80", fails=True)), "EBR_BUILD_CUDA": asked, "EBR_BUILD_CPU": "0"}
    environment["PATH"] = os.environ["PATH"]
    monkeypatch.setattr(script.os, "environ", environment)
    arguments = script.extension(environment)
    assert arguments["ext_modules"][0].name == "ebr_engine._csrc"
    command = arguments["cmdclass"]["build_ext"](Distribution(arguments))
    command.ensure_finalized()
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    if optional:
        command.run()
    else:
        with pytest.raises(CompileError, match="nvcc"):
            command.run()
    assert not list(tmp_path.rglob("*.so"))


def test_what_is_built_is_there(script):
    """Every source of csrc/ is named in the script, and nothing else."""
    named = {script.BINDING, *script.KERNELS, *script.HEADERS, script.CPU_BINDING, *script.CPU_SOURCES, *script.CPU_HEADERS}
    found = {path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".md"}
    assert named == {str(path.relative_to(ROOT)) for path in found}


def test_every_folder_of_the_package_is_installed():
    named = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "ebr_engine").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} | {"ebr_engine.kernels"} == set(named)
