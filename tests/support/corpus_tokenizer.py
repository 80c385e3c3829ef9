"""Small tokenizers of the embedded corpus."""

from transformers import PreTrainedTokenizerFast

from pipeline.prompts import corpus
from pipeline.prompts.tokenizer import train_tokenizer


def corpus_tokenizer(num_conversations: int, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """One that is trained on every text of so many conversations."""
    conversations = [corpus.conversation(0, index) for index in range(num_conversations)]
    return train_tokenizer(corpus.texts(conversations), vocab_size)
