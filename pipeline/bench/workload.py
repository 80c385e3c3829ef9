"""Makes the requests of a benchmark: held-out prompts as they are, or stretched to a fixed length."""

import dataclasses
from collections.abc import Sequence

from pipeline.engine.request import Request
from pipeline.engine.sampling_params import SamplingParams
from pipeline.errors import PipelineError
from pipeline.model.layers.sampling import sampling_key
from pipeline.prompts.chat_format import prompt_token_ids
from pipeline.prompts.sources import Prompt
from pipeline.prompts.split import split_by_hash
from pipeline.prompts.tokenizer import Tokenizer

REQUEST_ID = "prompt-"


def held_out(prompts: Sequence[Prompt], heldout_fraction: float) -> list[Prompt]:
    """Returns the held-out prompts of a set."""
    return split_by_hash(prompts, heldout_fraction)[1]


def rendered(prompts: Sequence[Prompt], tokenizer: Tokenizer, *, date: str) -> list[list[int]]:
    """Returns the token ids of prompts, as the target sees them on the day `date`."""
    return [prompt_token_ids(tokenizer, prompt, date=date) for prompt in prompts]


def requests_of(
    prompts: Sequence[Sequence[int]], *, num_prompts: int, max_new_tokens: int, prompt_tokens: int | None
) -> list[Request]:
    """Returns the first `num_prompts` rendered prompts as requests.

    With `prompt_tokens`, every prompt gets exactly that length: the prompts before it in the set precede it as
    earlier text, and the start is cut off. The text stays real, and no prompt repeats itself, which would
    flatter any draft. Raises PipelineError when the set is too small for that.
    """
    chosen = list(prompts[:num_prompts])
    if prompt_tokens is not None:
        chosen = [_stretched(prompts, index, prompt_tokens) for index in range(len(chosen))]
    return [
        Request(request_id=f"{REQUEST_ID}{index}", prompt_ids=tuple(ids), max_new_tokens=max_new_tokens)
        for index, ids in enumerate(chosen)
    ]


def sampled(requests: Sequence[Request], temperature: float, seed: int) -> list[Request]:
    """Returns the requests with a temperature and a key each, which both arms draw with."""
    return [
        dataclasses.replace(
            one, sampling=SamplingParams(temperature=temperature, key=sampling_key(seed, one.request_id))
        )
        for one in requests
    ]


def request_index(request_id: str) -> int:
    """Returns which prompt a request of `requests_of` holds."""
    return int(request_id.removeprefix(REQUEST_ID))


def _stretched(prompts: Sequence[Sequence[int]], index: int, length: int) -> list[int]:
    ids: list[int] = []
    for back in range(len(prompts)):
        ids = [*prompts[index - back], *ids]
        if len(ids) >= length:
            return ids[-length:]
    raise PipelineError(
        f"bench.prompt_tokens is {length}; all {len(prompts)} held-out prompts together have {len(ids)} tokens: "
        "lower it or give more prompts"
    )
