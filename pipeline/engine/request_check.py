"""What a request must hold to, so that an engine can run it."""

from pipeline.engine.config import EngineConfig
from pipeline.engine.request import Request
from pipeline.errors import PipelineError


def require_runnable(request: Request, config: EngineConfig, vocab_size: int) -> None:
    """Raises PipelineError when a request cannot be run.

    It may be empty or too long, hold or name tokens that the target does not know, want more tokens at least than
    at most or than its grammar may have, or ask for what an engine without `samples` has no programs for.
    """
    prompt, new = len(request.prompt_ids), request.max_new_tokens
    if prompt == 0 or new < 1:
        raise PipelineError(f"prompt has {prompt} tokens and max_new_tokens is {new}; both must be at least 1")
    if prompt + new > config.max_length:
        raise PipelineError(
            f"prompt has {prompt} tokens and {new} more are wanted, {prompt + new} in all; the engine holds "
            f"{config.max_length}: shorten either, or raise its max_length"
        )
    unknown = [token for token in request.prompt_ids if not 0 <= token < vocab_size]
    if unknown:
        raise PipelineError(f"prompt has token ids {unknown[:5]}; the target knows 0..{vocab_size - 1}")
    named = [token for token in request.sampling.named_tokens if not 0 <= token < vocab_size]
    if named:
        raise PipelineError(f"logit_bias or stop_token_ids has {named[:5]}; the target knows 0..{vocab_size - 1}")
    if request.sampling.min_tokens > new:
        raise PipelineError(f"min_tokens is {request.sampling.min_tokens} and max_new_tokens {new}")
    if request.grammar is not None and request.sampling.min_tokens:
        raise PipelineError(
            f"min_tokens is {request.sampling.min_tokens} and the answer has a grammar, which says where it ends: "
            "leave min_tokens out"
        )
    if not config.samples and not (request.sampling.is_plainly_greedy and request.grammar is None):
        raise PipelineError(
            f"request {request.request_id!r} asks for more than the most likely tokens; the engine "
            "was made without `samples`"
        )
