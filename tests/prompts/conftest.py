import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.prompts.corpus import conversation
from tests.support.corpus_tokenizer import corpus_tokenizer


def corpus_texts(count: int) -> list[str]:
    conversations = [conversation(0, index) for index in range(count)]
    return [text for each in conversations for text in (each.prompt, each.analysis, each.final)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return corpus_tokenizer(1500)
