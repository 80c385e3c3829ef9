"""Safetensors files that are written part by part, read back with the safetensors library."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.model.hf import streamed_files
from pipeline.model.hf.safetensors_files import weight_files
from pipeline.model.hf.streamed_files import Streamed

ARRAYS = {
    "b.bytes": np.arange(33, dtype=np.uint8).reshape(3, 11),
    "a.halves": np.arange(15, dtype=np.float32).reshape(5, 3).astype(ml_dtypes.bfloat16),
    "c.floats": np.linspace(-1, 1, 7, dtype=np.float32),
    "d.float16": np.arange(4, dtype=np.float16),
}
KINDS = {"uint8": "U8", "bfloat16": "BF16", "float32": "F32", "float16": "F16"}


def streamed(array):
    return Streamed(
        KINDS[array.dtype.name], array.shape, lambda: (array[index : index + 2] for index in range(0, len(array), 2))
    )


def test_the_library_reads_what_was_written_in_parts(tmp_path):
    sizes = []
    streamed_files.write(
        tmp_path / "x.safetensors", {name: streamed(each) for name, each in ARRAYS.items()}, sizes.append
    )
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, wanted in ARRAYS.items():
        assert found[name].dtype == wanted.dtype
        np.testing.assert_array_equal(found[name], wanted)
    assert sum(sizes) == sum(array.nbytes for array in ARRAYS.values())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_transposed_part_is_written_in_the_order_of_its_numbers(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    streamed_files.write(tmp_path / "x.safetensors", {"x": Streamed("F32", (4, 3), lambda: [array])}, len_of_nothing)
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["x"], array)


def len_of_nothing(_):
    """Counts nothing."""


def test_a_write_that_fails_leaves_no_file_of_that_name(tmp_path):
    def failing():
        yield np.zeros(2, np.float32)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        streamed_files.write(tmp_path / "x.safetensors", {"x": Streamed("F32", (4,), failing)}, len_of_nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.tmp"]


def test_the_index_names_every_file_and_tensor(tmp_path):
    names = streamed_files.shard_names(2)
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards = dict(zip(names, [{"a": streamed(ARRAYS["a.halves"])}, {"b": streamed(ARRAYS["b.bytes"])}], strict=True))
    for name, shard in shards.items():
        streamed_files.write(tmp_path / name, shard, len_of_nothing)
    streamed_files.write_index(tmp_path, shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 63}, "weight_map": {"a": names[0], "b": names[1]}}
    assert [path.name for path in weight_files(tmp_path)] == names
