import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.corpus_tokenizer import corpus_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return corpus_tokenizer(600)
