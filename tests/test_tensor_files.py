"""Tensor files appear whole, under the permissions that any new file has, and several writers do not disturb each other."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from ebr_engine.tensor_files import write_tensors


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a" / "x.safetensors", {"x": torch.arange(3)}, {"format": "test"})
    assert (tmp_path / "a" / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writers_of_one_file_leave_one_whole_file(tmp_path):
    path = tmp_path / "x.safetensors"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_tensors(path, {"x": torch.full((1000,), i)}, {}), range(32)))
    values = load_file(path)["x"]
    assert (values == values[0]).all()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)}, {"format": object()})
    assert list(tmp_path.iterdir()) == []
