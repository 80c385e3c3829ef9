"""Compiles grammars of answers with llguidance, and follows answers in them."""

import collections
import functools
import re
import threading
from collections.abc import Sequence
from typing import Any

import llguidance.hf
import llguidance.numpy
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from pipeline.errors import PipelineError
from pipeline.prompts.tokenizer import Tokenizer

_POSITION = re.compile(r"^(at )?\d+\(\d+\): ")  # in a text that the client does not know
MAX_GRAMMARS = 64  # compiled ones that are remembered, for clients send the same form again and again


class Grammars:
    """Compiles grammars in llguidance's dialect of Lark, for a model with `vocab_size` logits.

    It may be used from several threads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled: collections.OrderedDict[str, CompiledGrammar] = collections.OrderedDict()
        self._lock = threading.Lock()

    def compiled(self, text: str) -> "CompiledGrammar":
        """Returns a grammar; raises PipelineError with the reason when it is not one, or is too large."""
        with self._lock:
            found = self._compiled.pop(text, None) or self._compile(text)
            self._compiled[text] = found
            while len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        return found

    def _compile(self, text: str) -> "CompiledGrammar":
        matcher = LLMatcher(self._vocabulary, text, log_level=0)
        if matcher.is_error():
            raise PipelineError(_POSITION.sub("", matcher.get_error().strip().splitlines()[0]))
        return CompiledGrammar(text, matcher)

    @functools.cached_property
    def _vocabulary(self) -> LLTokenizer:
        """The tokens' bytes; reading them takes a second for a large vocabulary."""
        tokenizer: Any = self._tokenizer
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=self._vocab_size)


class CompiledGrammar:
    """A grammar at its beginning (an engine's `Grammar`)."""

    def __init__(self, text: str, matcher: LLMatcher) -> None:
        self.text = text
        self._matcher = matcher

    def start(self) -> "AnswerConstraint":
        """Returns the constraint of an answer that begins."""
        return AnswerConstraint(self._matcher.deep_copy())


class AnswerConstraint:
    """Follows one answer (an engine's `Constraint`); when a grammar grows past all bounds, the answer must end."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def advance(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens of the answer; the one that ends it is the last and has no meaning here."""
        self._matcher.try_consume_tokens(list(token_ids))

    def fill(self, drafted: Sequence[int], masks: np.ndarray) -> list[int]:
        """Writes which tokens may follow (`engine.grammar`).

        Where the grammar leaves one text alone, its tokens stand for what was drafted.
        """
        found, bits = list(drafted), masks.view(np.int32)
        num_consumed = 0
        for index in range(len(found) + 1):
            llguidance.numpy.fill_next_token_bitmask(self._matcher, bits, index)
            if index == len(found):
                break
            certain = self._matcher.compute_ff_tokens()
            found[index : index + len(certain)] = certain[: len(found) - index]
            if self._matcher.try_consume_tokens(found[index : index + 1]) == 0:
                break
            num_consumed += 1
        self._matcher.rollback(num_consumed)
        return found
