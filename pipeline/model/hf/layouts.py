"""GPT-OSS checkpoints in other layouts than HF's, seen as HF's: names and parts are mapped, nothing is copied.

Source: the files that transformers, Unsloth and PEFT write; gpt-oss's `torch/model.py` and `torch/weights.py` for
OpenAI's own layout, whose packed experts and whose order of q and k are HF's.
"""

import re
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.hf.safetensors_files import Index, Tensor
from pipeline.model.layers import mxfp4
from pipeline.model.layers.mxfp4 import BLOCK

Tensors = dict[str, Tensor]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERTS = "mlp.experts."
_PREFIXES = ("base_model.model.", "_orig_mod.", "module.")  # PEFT's, torch.compile's, DistributedDataParallel's
_ORIGINAL_TOP = {"embedding.weight": EMBEDDING, "unembedding.weight": HEAD, "norm.scale": "model.norm.weight"}
_ORIGINAL_LAYER = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "attn.sinks": "self_attn.sinks",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
    **{
        f"mlp.mlp{number}_weight{theirs}": f"mlp.experts.{name}{ours}"
        for number, name in ((1, "gate_up_proj"), (2, "down_proj"))
        for theirs, ours in ((".blocks", "_blocks"), (".scales", "_scales"))
    },
}
_ONE_EXPERT = re.compile(
    r"(?P<layer>model\.layers\.\d+\.mlp\.experts\.)"
    r"((?P<stem>gate_up|down)_projs\.(?P<number>\d+)|(?P<index>\d+)\.(?P<part>gate_up|gate|up|down)_proj)"
    r"\.(?P<what>weight|bias)"
)


def as_hf(tensors: Tensors, config: GptOssConfig, *, tied: bool) -> tuple[Tensors, list[str]]:
    """Returns the tensors of a checkpoint under HF's names and in its shapes, and what was mapped.

    What is not known stays as it is, and is unexpected to whoever compares. Raises PipelineError when two tensors come
    to the same name, or a tied head differs from the embedding.
    """
    notes: list[str] = []
    for change, note in (
        (_without_prefixes, "the prefix of every name is left out"),
        (_without_buffers, "buffers of RoPE are left out"),
        (lambda found: _from_original(found, config), "OpenAI's own layout is read"),
        (_with_router, "the router's names are mapped"),
        (lambda found: _joined(found, config), "experts are joined that are stored one by one"),
    ):
        changed = change(tensors)
        if changed.keys() != tensors.keys():
            notes.append(note)
        tensors = changed
    if tied:
        tensors = _tied(tensors)
        notes.append("the head is the embedding")
    return tensors, notes


def _renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if rename(name) in renamed:
            raise PipelineError(f"two tensors of the checkpoint are both called {rename(name)}; keep one of them")
        renamed[rename(name)] = tensor
    return renamed


def _without_prefixes(tensors: Tensors) -> Tensors:
    return _renamed(tensors, without_prefixes)


def _with_router(tensors: Tensors) -> Tensors:
    return _renamed(tensors, lambda name: name.replace(".mlp.router.linear.", ".mlp.router."))


def without_prefixes(name: str) -> str:
    """Returns a tensor's name without what trainers put in front of it."""
    found = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    return name if found is None else without_prefixes(name.removeprefix(found))


def _without_buffers(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _from_original(tensors: Tensors, config: GptOssConfig) -> Tensors:
    """Returns the tensors of OpenAI's own layout under HF's names, with q, k and v apart."""
    heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    edges = {"q_proj": (0, heads), "k_proj": (heads, heads + groups), "v_proj": (heads + groups, heads + 2 * groups)}
    found: Tensors = {}
    for name, tensor in tensors.items():
        _, number, field = name.split(".", 2) if name.startswith("block.") and name.count(".") > 2 else ("", "", name)
        prefix = f"model.layers.{number}."
        if not number:
            found[_ORIGINAL_TOP.get(name, name)] = tensor
        elif field.startswith("attn.qkv.") and tensor.shape[0] == heads + 2 * groups:
            for part, (start, stop) in edges.items():
                found[f"{prefix}self_attn.{part}.{field.removeprefix('attn.qkv.')}"] = rows(tensor, start, stop)
        else:
            found[prefix + _ORIGINAL_LAYER[field] if field in _ORIGINAL_LAYER else name] = tensor
    return found


def _joined(tensors: Tensors, config: GptOssConfig) -> Tensors:
    """Returns the tensors with those of single experts stacked, where all of a layer's experts are there."""
    parts: dict[tuple[str, str, str], dict[int, Tensor]] = {}
    found: Tensors = {}
    for name, tensor in tensors.items():
        match = _ONE_EXPERT.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        part, number = match["stem"] or match["part"], int(match["number"] or match["index"])
        parts.setdefault((match["layer"], part, match["what"]), {})[number] = tensor
    experts = range(config.num_local_experts)
    for (layer, part, what), by_number in list(parts.items()):
        if part == "up" or by_number.keys() != set(experts):
            continue
        stacked = by_number
        stem = part
        if part == "gate":
            ups = parts.get((layer, "up", what), {})
            if ups.keys() != by_number.keys() or any(ups[each].shape != by_number[each].shape for each in experts):
                continue
            stacked, stem = {each: interleaved(by_number[each], ups[each]) for each in experts}, "gate_up"
            del parts[layer, "up", what]
        if len({tensor.shape for tensor in stacked.values()}) > 1:
            continue
        whole = stack([stacked[each] for each in experts])
        name = f"{layer}{stem}_proj" + ("_bias" if what == "bias" else "")
        if name in found:
            raise PipelineError(f"the checkpoint holds {name} whole and as single experts; keep one of them")
        found[name] = whole if what == "bias" else swapped(whole)
        del parts[layer, part, what]
    if parts:
        listed = "\n  ".join(
            f"{layer}*.{part}.{what}: of {len(by_number)} expert(s)" for (layer, part, what), by_number in parts.items()
        )
        raise PipelineError(f"experts that are stored one by one are not all there or differ in shape:\n  {listed}")
    return found


def _tied(tensors: Tensors) -> Tensors:
    """Returns the tensors with the embedding as head too; a head of its own must be equal to it."""
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    if embedding is None:
        return tensors
    if head is not None and not _are_equal(embedding, head):
        raise PipelineError(
            "tie_word_embeddings: found true, and lm_head.weight differs from model.embed_tokens.weight; runtimes do "
            "not agree which one they take: set it to false in config.json, or remove lm_head.weight"
        )
    return {**tensors, HEAD: embedding}


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    step = 8192  # rows at a time: a whole table would take a gigabyte
    parts = [(slice(start, min(start + step, one.shape[0])), *one.whole[1:]) for start in range(0, one.shape[0], step)]
    return all(np.array_equal(one.read(part), other.read(part)) for part in parts)


def is_packed(tensors: Tensors) -> bool:
    """Returns whether these tensors hold the experts as MXFP4."""
    return any(name.endswith((f"{EXPERTS}gate_up_proj_blocks", f"{EXPERTS}down_proj_blocks")) for name in tensors)


def unpacked(tensors: Tensors) -> Tensors:
    """Returns the tensors with MXFP4 experts as bfloat16, which holds their values exactly."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("_blocks")
        if stem != name and f"{stem}_scales" in tensors:
            found[stem] = dequantised(tensor, tensors[f"{stem}_scales"])
        elif not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors):
            found[name] = tensor
    return found


def rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Returns the rows of a tensor from `start` to `stop`."""

    def read(index: Index) -> np.ndarray:
        return tensor.read((slice(start + index[0].start, start + index[0].stop), *index[1:]))

    return Tensor((stop - start, *tensor.shape[1:]), tensor.kind, read)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Returns equally shaped tensors along a new first axis."""

    def read(index: Index) -> np.ndarray:
        return np.stack([tensor.read(index[1:]) for tensor in tensors[index[0]]])

    kinds = sorted({tensor.kind for tensor in tensors})
    return Tensor((len(tensors), *tensors[0].shape), "/".join(kinds), read)


def swapped(tensor: Tensor) -> Tensor:
    """Returns a tensor with its last two axes swapped."""

    def read(index: Index) -> np.ndarray:
        return np.swapaxes(tensor.read((*index[:-2], index[-1], index[-2])), -1, -2)

    return Tensor((*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]), tensor.kind, read)


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Returns the rows of gate and up in turn."""

    def read(index: Index) -> np.ndarray:
        start, stop = index[0].start, index[0].stop
        pairs = (slice(start // 2, -(-stop // 2)), *index[1:])
        both = np.stack([gate.read(pairs), up.read(pairs)], axis=1)
        return both.reshape(-1, *both.shape[2:])[start % 2 :][: stop - start]

    kinds = sorted({gate.kind, up.kind})
    return Tensor((2 * gate.shape[0], *gate.shape[1:]), "/".join(kinds), read)


def dequantised(blocks: Tensor, scales: Tensor) -> Tensor:
    """Returns matrices [E, K, N] in bfloat16 of the blocks [E, N, K/32, 16] and scales [E, N, K/32] of MXFP4."""
    experts, width, groups = scales.shape

    def read(index: Index) -> np.ndarray:
        expert, row, column = index
        picked = (expert, column, slice(row.start // BLOCK, -(-row.stop // BLOCK)))
        values = mxfp4.dequantised(blocks.read((*picked, blocks.whole[3])), scales.read(picked), ml_dtypes.bfloat16)
        offset = row.start % BLOCK
        return np.swapaxes(values, 1, 2)[:, offset : offset + row.stop - row.start]

    return Tensor((experts, groups * BLOCK, width), "BF16", read)
