import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.prompts.corpus import conversation
from pipeline.prompts.tokenizer import train_tokenizer


def corpus_texts(count: int) -> list[str]:
    conversations = [conversation(0, index) for index in range(count)]
    return [text for each in conversations for text in (each.prompt, each.analysis, each.final)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(corpus_texts(1500), 512)
