"""A grammar that tests can count on: token ids that are multiples of a number."""

import dataclasses

import numpy as np

from pipeline.engine.sampling_params import SamplingParams


class Multiples:
    """Allows the token ids that `text` divides; it never ends."""

    def __init__(self, text):
        self.text = text

    def start(self):
        return self

    def advance(self, token_ids):
        assert all(token % int(self.text) == 0 for token in token_ids)

    def fill(self, drafted, masks):
        allowed = np.arange(masks.shape[1] * 32) % int(self.text) == 0
        masks[: len(drafted) + 1] = np.packbits(allowed, bitorder="little").view(np.uint32)
        return list(drafted)


def constrained(requests):
    """The same prompts, answered with some tokens alone, and drawn."""
    return [
        dataclasses.replace(
            request,
            request_id=f"constrained {request.request_id}",
            grammar=Multiples("3"),
            sampling=SamplingParams(temperature=0.7, key=(1, index)),
        )
        for index, request in enumerate(requests)
    ]
