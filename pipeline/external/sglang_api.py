"""SGLang's and sglang-jax's POST /generate with tokens in both directions: what is sent, and what an event says."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import PipelineError

EVENT = "data: "


def generate_body(
    prompt_ids: Sequence[int], max_new_tokens: int, stop_token_ids: Sequence[int], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the body of a streamed request.

    Only the stop tokens that are sent end the answer: without any, the engine's own end tokens are to be ignored.
    """
    wanted = {
        **sampling,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": list(stop_token_ids),
        "ignore_eos": not stop_token_ids,
        "skip_special_tokens": False,
    }
    return {"input_ids": list(prompt_ids), "sampling_params": wanted, "stream": True}


def tokens_of(line: str, max_new_tokens: int, stop_token_ids: Sequence[int]) -> tuple[list[int], str | None] | None:
    """Returns all tokens of the answer so far and why it ended, from one line of the stream; None from another line.

    Tokens behind the length, or behind a stop token, are cut: a DFLASH round of the engine may go past either. The
    stop token that ended the answer, which the engine leaves out as a rule, is added. Raises PipelineError when the
    engine reports an error.
    """
    if not line.startswith(EVENT + "{"):
        return None
    event = json.loads(line.removeprefix(EVENT))
    if "error" in event:
        raise PipelineError(str(event["error"].get("message", event["error"])))
    tokens, ended = list(event["output_ids"]), event["meta_info"].get("finish_reason")
    reason = None if ended is None else ended["type"]
    if reason not in (None, "stop", "length"):
        raise PipelineError(f"it ended the request with {ended}")
    if reason == "stop" and isinstance(ended.get("matched"), int) and tokens[-1:] != [ended["matched"]]:
        tokens.append(ended["matched"])
    tokens = tokens[:max_new_tokens]
    stop = next((index for index, token in enumerate(tokens) if token in stop_token_ids), None)
    if stop is not None:
        return tokens[: stop + 1], "stop"
    return tokens, "length" if len(tokens) == max_new_tokens else reason
