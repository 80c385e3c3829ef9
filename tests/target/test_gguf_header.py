"""What a GGUF file says of itself, against the gguf package's own reader, and damage at every byte of it."""

import contextlib

import gguf
import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.target.gguf_header import read_header
from tests.support import gpt_oss_gguf as tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny.checkpoint())


def everything(path, alignment=None):
    """A file with a value of every kind."""
    writer = gguf.GGUFWriter(path, "any")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for kind, value in (("uint8", 255), ("int8", -128), ("uint16", 65535), ("int16", -32768), ("uint32", 2**32 - 1)):
        getattr(writer, f"add_{kind}")(kind, value)
    for kind, value in (("int32", -(2**31)), ("uint64", 2**64 - 1), ("int64", -(2**63)), ("float64", 0.1)):
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float32("float32", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "naïve 東京")
    for name, values in (("strings", ["a", "", "é"]), ("floats", [0.5, -1.5]), ("bools", [True, False])):
        writer.add_array(name, values)
    writer.add_array("lists", [[1, 2], [3]])
    writer.add_tensor("odd", np.arange(3, dtype=np.float32))
    writer.add_tensor("deep", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 256], ids=["usual", "wide"])
def test_values_of_every_kind_and_tensors_are_those_of_the_package(tmp_path, alignment):
    path = everything(tmp_path / "x.gguf", alignment)
    values, tensors = read_header(path)
    reader = gguf.GGUFReader(path)
    wanted = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    wanted["lists"] = [[1, 2], [3]]  # the package's reader makes one list of them
    assert values == wanted
    assert {name: info.offset for name, info in tensors.items()} == {
        tensor.name: tensor.data_offset for tensor in reader.tensors
    }
    assert tensors["deep"].shape == (2, 3, 4)


def test_a_model_with_a_tokenizer_reads_as_the_package_reads_it(file):
    values, tensors = read_header(file)
    reader = gguf.GGUFReader(file)
    assert values == {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    found = {name: (info.shape, info.kind, info.offset) for name, info in tensors.items()}
    assert found == {
        tensor.name: (tuple(reversed(tensor.shape.tolist())), int(tensor.tensor_type), tensor.data_offset)
        for tensor in reader.tensors
    }


def test_a_header_that_ends_anywhere_is_refused(tmp_path, file):
    raw = file.read_bytes()
    end = min(info.offset for info in read_header(file)[1].values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(400), *range(400, end - 32, 997)]:
        cut.write_bytes(raw[:length])
        with pytest.raises(PipelineError, match=r"cut.gguf cannot be read as GGUF \(it ends within .*give a whole"):
            read_header(cut)


def test_no_damaged_byte_makes_anything_but_one_error(tmp_path, file):
    raw = file.read_bytes()
    damaged, refused = tmp_path / "damaged.gguf", []
    for at in [*range(300), *range(300, 8000, 211)]:
        changed = bytearray(raw)
        changed[at] ^= 0xFF
        damaged.write_bytes(bytes(changed))
        with contextlib.suppress(PipelineError):  # many bytes are those of numbers and texts
            read_header(damaged)
            continue
        refused.append(at)
    assert len(refused) > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"PK\x03\x04" + b"\0" * 40, "it does not begin with GGUF", id="a zip"),
        pytest.param(b"GGUF\x01\0\0\0" + b"\0" * 40, "it has version 1; known are 2 and 3", id="an old one"),
        pytest.param(b"GGUF\0\0\0\x03" + b"\0" * 40, "in the byte order of another machine", id="big-endian"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(PipelineError, match=message):
        read_header(tmp_path / "x.gguf")
