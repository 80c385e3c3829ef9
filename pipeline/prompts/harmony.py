"""What is Harmony's own: control tokens, and how an answer is written (github.com/openai/harmony, docs/format.md)."""

from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import PipelineError
from pipeline.prompts.tokenizer import control_token_problem

STOP_TOKENS = ("<|return|>", "<|call|>", "<|endoftext|>")
HEADER_TOKENS = ("<|start|>", "<|channel|>")  # what follows them, up to <|message|>, is not text
CHANNEL_TOKENS = ("<|channel|>", "<|return|>")  # a tokenizer with one of them is meant to be Harmony's


def render_completion(tokenizer: PreTrainedTokenizerBase, analysis: str, final: str) -> list[int]:
    """The tokens that follow a prompt: analysis, final and `<|return|>`, as the model writes them."""
    problem = control_token_problem(tokenizer, [analysis, final])
    if problem is not None:
        raise PipelineError(problem)
    text = (
        f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant<|channel|>final<|message|>{final}<|return|>"
    )
    return tokenizer.encode(text, add_special_tokens=False)
