import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.prompts.corpus import conversation
from pipeline.prompts.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    conversations = [conversation(0, index) for index in range(600)]
    return train_tokenizer([text for each in conversations for text in (each.prompt, each.analysis, each.final)], 512)
