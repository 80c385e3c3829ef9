"""Hidden states of a DFlash draft for the block that follows a context, in float32.

in:  features [B, T, L*D], noise_embedding [B, K, D]; optionally chunks [R], sizes that sum to T
out: hidden [B, K, D], the block at positions T..T+K-1 after the final norm; with chunks also
     hidden_rounds [R, B, K, D], the same block drafted after each chunk at the position reached

With chunks the draft runs the way dflash_generate runs it: one call per chunk, which appends the
chunk to the cache, and the block's own keys cropped after each call. Attention is the package's, on
the mathematical kernel (the package fixes `sdpa`).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from checkpoints import load_draft
from dflash.model import _crop_to, _make_cache
from torch.nn.attention import SDPBackend, sdpa_kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()

    model = load_draft(arguments.draft)
    inputs = np.load(arguments.inputs)
    features = torch.from_numpy(inputs["features"]).float()
    noise_embedding = torch.from_numpy(inputs["noise_embedding"]).float()
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        if "chunks" in inputs:
            rounds = forward_cached(model, features, noise_embedding, inputs["chunks"].tolist())
            np.savez(arguments.outputs, hidden=rounds[-1].numpy(), hidden_rounds=rounds.numpy())
        else:
            np.savez(arguments.outputs, hidden=forward(model, features, noise_embedding).numpy())


def forward(model: torch.nn.Module, features: torch.Tensor, noise_embedding: torch.Tensor) -> torch.Tensor:
    """[B, T, L*D] and [B, K, D] to [B, K, D], without a cache."""
    return model(
        target_hidden=features,
        noise_embedding=noise_embedding,
        position_ids=_positions(0, features.shape[1] + noise_embedding.shape[1], features.shape[0]),
    )


def forward_cached(
    model: torch.nn.Module, features: torch.Tensor, noise_embedding: torch.Tensor, chunks: list[int]
) -> torch.Tensor:
    """[R, B, K, D], one block per chunk; ValueError unless positive chunks cover the context."""
    num_context = features.shape[1]
    if sum(chunks) != num_context or min(chunks) < 1:
        raise ValueError(f"chunks is {chunks}; it must hold positive sizes that sum to {num_context}")
    cache = _make_cache(model.config)
    rounds, start = [], 0
    for size in chunks:
        hidden = model(
            target_hidden=features[:, start : start + size],
            noise_embedding=noise_embedding,
            position_ids=_positions(start, start + size + noise_embedding.shape[1], features.shape[0]),
            past_key_values=cache,
            use_cache=True,
        )
        start += size
        _crop_to(cache, start)
        rounds.append(hidden)
    return torch.stack(rounds)


def _positions(begin: int, end: int, num_sequences: int) -> torch.Tensor:
    return torch.arange(begin, end)[None].expand(num_sequences, -1)


if __name__ == "__main__":
    main()
