"""Tensors written and read again, and the mode of the written file."""

import os
import stat

import numpy as np
import pytest

from pipeline.model.hf import safetensors_files


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct, indirect=True)
def test_a_written_file_has_the_mode_that_the_umask_gives(tmp_path, umask):
    tensors = {"matrix": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    safetensors_files.write(tmp_path, tensors)
    file = tmp_path / safetensors_files.WEIGHTS_FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    np.testing.assert_array_equal(safetensors_files.TensorFiles(tmp_path).read("matrix"), tensors["matrix"])
