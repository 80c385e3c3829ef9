"""GGUF files: their metadata, and their tensors dequantised to float32. Nothing else imports the `gguf` package."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from jaxtyping import Float

from pipeline.errors import PipelineError


class GgufFile:
    """One GGUF file, mapped into memory; tensors are read when asked for."""

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
        """Elements of all tensors together."""
        return sum(int(tensor.n_elements) for tensor in self._tensors.values())

    @property
    def tensor_names(self) -> frozenset[str]:
        """What is in the file."""
        return frozenset(self._tensors)

    def values(self, keys: Iterable[str]) -> dict[str, Any]:
        """Metadata by key. Raises PipelineError naming every key that is missing."""
        keys = list(keys)
        missing = [key for key in keys if key not in self._fields]
        if missing:
            raise PipelineError(f"{self.path} has no {', '.join(missing)}; give a GGUF that names them")
        return {key: self._fields[key].contents() for key in keys}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """One tensor in float32, kernels as [out, in]. Raises PipelineError when it is not there in this shape."""
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
