"""Reads GGUF files: metadata, and tensors dequantised to float32. Nothing else imports the `gguf` package."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from jaxtyping import Float

from pipeline.errors import PipelineError


class GgufFile:
    """Holds one GGUF file, mapped into memory; tensors are read on demand."""

    def __init__(self, path: Path) -> None:
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:  # the last two: not GGUF, or cut off
            raise PipelineError(f"{path} cannot be read as GGUF ({error}); give a whole GGUF file") from error
        self.path = path
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def num_weights(self) -> int:
        """Returns the number of elements of all tensors."""
        return sum(int(tensor.n_elements) for tensor in self._tensors.values())

    @property
    def tensor_names(self) -> frozenset[str]:
        """Returns the names of the file's tensors."""
        return frozenset(self._tensors)

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        """Returns metadata by key; raises PipelineError that names every missing key."""
        keys = list(keys)
        missing = [key for key in keys if key not in self._fields]
        if missing:
            raise PipelineError(f"{self.path} has no {', '.join(missing)}; give a GGUF that names them")
        return {key: self._fields[key].contents() for key in keys}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """Returns a tensor in float32, matrices as [out, in]; raises PipelineError when it is missing or misshapen."""
        if name not in self._tensors:
            raise PipelineError(f"{self.path} has no tensor {name}; give a whole GGUF file")
        tensor = self._tensors[name]
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise PipelineError(
                f"{self.path}: {name} is quantised as {tensor.tensor_type.name}, which the gguf package does not "
                "read; give a file in another quantisation"
            ) from error
        if array.shape != shape:
            raise PipelineError(f"{self.path}: {name} has shape {array.shape}, wanted {shape}")
        return array.astype(np.float32)  # F16 and BF16 files too
