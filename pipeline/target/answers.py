"""Measures a target of the embedded corpus: the share of held-out questions that it answers exactly right."""

from collections import Counter
from collections.abc import Sequence

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.prompts import harmony
from pipeline.prompts.chat_format import render_prompt, stop_token_ids
from pipeline.prompts.corpus import Conversation
from pipeline.prompts.tokenizer import Tokenizer

SLOTS, MAX_NEW_TOKENS, PREFILL_CHUNK = 64, 192, 64


def answers_right(target: TargetModel, tokenizer: Tokenizer, questions: Sequence[Conversation]) -> dict[str, float]:
    """Returns the share of each family's questions whose greedy answer is right, by family.

    An answer is right when its final text is the corpus's, token for token, whatever was thought before it.
    """
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": each.prompt}], each.effort) for each in questions]
    engine = EngineConfig(
        num_slots=min(SLOTS, len(questions)),
        max_length=max(map(len, prompts)) + MAX_NEW_TOKENS,
        prefill_chunk=PREFILL_CHUNK,
        stop_token_ids=tuple(stop_token_ids(tokenizer)),
    )
    requests = [
        Request(request_id=str(index), prompt_ids=tuple(prompt), max_new_tokens=MAX_NEW_TOKENS)
        for index, prompt in enumerate(prompts)
    ]
    asked, right = Counter(each.family for each in questions), Counter[str]()
    for completion in Engine(target, None, engine).generate(requests):
        question = questions[int(completion.request_id)]
        final = tuple(harmony.render_completion(tokenizer, final=question.final))
        right[question.family] += completion.token_ids[-len(final) :] == final
    return {family: right[family] / count for family, count in asked.items()}
