"""Log probabilities of a step's tokens, as requests ask for them."""

from collections.abc import Sequence

from pipeline.engine.request import TokenLogProb
from pipeline.engine.scheduler import Running
from pipeline.model.layers.token_rules import LogProbs


def of_tokens(num_top: int | None, tokens: Sequence[int], found: LogProbs | None, row: int) -> tuple[TokenLogProb, ...]:
    """Returns those of the first tokens of a row, with the `num_top` likeliest at each; None is nothing at all."""
    if num_top is None or found is None:
        return ()
    return tuple(
        TokenLogProb(
            token,
            float(found.chosen[row, index]),
            tuple(
                zip(found.top_ids[row, index, :num_top].tolist(), found.top[row, index, :num_top].tolist(), strict=True)
            ),
        )
        for index, token in enumerate(tokens)
    )


def of_prompt(one: Running, found: LogProbs | None, row: int, num_columns: int) -> tuple[TokenLogProb, ...]:
    """Returns those of the tokens of a prompt that follow the next `num_columns` ones."""
    start = len(one.prompt_log_probs) + 1
    tokens = one.request.prompt_ids[start : start + num_columns]
    return of_tokens(one.request.sampling.prompt_logprobs, tokens, found, row)
