"""Asks an OpenAI-compatible server, as any of its clients would."""

import dataclasses

import openai

from pipeline.errors import PipelineError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """Holds a chat model's reply; `num_accepted` and `num_rejected` count drafted tokens, both 0 without a draft."""

    analysis: str | None
    text: str
    num_tokens: int
    num_accepted: int
    num_rejected: int


class ChatClient:
    """Asks the server whose API is at `url`, `http://host:port/v1` as a rule."""

    def __init__(self, url: str, *, model: str, timeout_seconds: float) -> None:
        self._client = openai.OpenAI(base_url=url, api_key="none", timeout=timeout_seconds, max_retries=0)
        self._model = model

    def ask(self, question: str, max_new_tokens: int) -> Reply:
        """Returns the greedy reply to one question; raises PipelineError when the server gives none."""
        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=max_new_tokens,
            )
        except openai.OpenAIError as error:
            raise PipelineError(f"the server gives no answer to {question!r}: {error}") from error
        message, usage = completion.choices[0].message, completion.usage
        if usage is None:
            raise PipelineError(f"the server's answer to {question!r} has no usage; wanted its number of tokens")
        details = usage.completion_tokens_details
        return Reply(
            analysis=getattr(message, "reasoning_content", None),
            text=message.content or "",
            num_tokens=usage.completion_tokens,
            num_accepted=(details and details.accepted_prediction_tokens) or 0,
            num_rejected=(details and details.rejected_prediction_tokens) or 0,
        )
