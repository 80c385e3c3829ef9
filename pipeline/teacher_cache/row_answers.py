"""Answers prompts with what stands in their own rows: `teacher_cache.generator=given`."""

from collections.abc import Mapping, Sequence

from pipeline.prompts.sources import Answer
from pipeline.teacher_cache.answer import AnsweredPrompt, FailedPrompt, OnFinished, finished
from pipeline.teacher_cache.answer_reader import AnswerReader, AnswerTokens, BadAnswer
from pipeline.teacher_cache.failures import are_too_many, failure_error, log_failures
from pipeline.teacher_cache.render import RenderedPrompt

MEND = "correct the answers at the end of the rows, or leave these rows out"


class RowAnswers:
    """Holds the answers of the rows of a file or dataset, by prompt id; `source` names it in errors."""

    def __init__(self, answers: Mapping[str, Answer], reader: AnswerReader, source: str) -> None:
        self._answers, self._reader, self._source = answers, reader, source

    def require_enough(self, rows: Sequence[RenderedPrompt]) -> None:
        """Reads the answers to all rows; raises PipelineError when none can be read, or more than a tenth cannot."""
        outcomes = [self._outcome(row) for row in rows]
        failed = [outcome for outcome in outcomes if isinstance(outcome, FailedPrompt)]
        if are_too_many(len(failed), len(rows)) or len(failed) == len(rows) > 0:
            reasons = [outcome.reason for outcome in failed]
            raise failure_error(f"{self._source} has no usable answer to", reasons, len(rows), MEND)
        log_failures(failed, len(rows))

    def answer(
        self, rows: Sequence[RenderedPrompt], on_finished: OnFinished
    ) -> Sequence[AnsweredPrompt | FailedPrompt]:
        """Returns the answers to rows, in their order."""
        outcomes = ((row, self._outcome(row)) for row in rows)
        return [
            found if isinstance(found, FailedPrompt) else finished(row, found, on_finished) for row, found in outcomes
        ]

    def _outcome(self, row: RenderedPrompt) -> AnswerTokens | FailedPrompt:
        turns = self._answers[row.prompt.prompt_id]
        if len(turns) > 1:
            return FailedPrompt(row.prompt, f"the answer has {len(turns)} turns; wanted one: the target writes one")
        try:
            return self._reader.rendered(turns[0], was_cut=False)
        except BadAnswer as error:
            return FailedPrompt(row.prompt, str(error))
