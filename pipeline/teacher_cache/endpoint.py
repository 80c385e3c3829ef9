"""The target behind an OpenAI-compatible endpoint: many prompts at once, every reply kept, every failure told."""

import asyncio
import collections
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai

from pipeline.artifacts.hashing import fingerprint_of
from pipeline.engine.request import Completion
from pipeline.errors import PipelineError
from pipeline.progress import Progress
from pipeline.teacher_cache.answer import AnsweredPrompt, FailedPrompt
from pipeline.teacher_cache.endpoint_replies import BadReply, Reader, RequestTemplate, reply_fields
from pipeline.teacher_cache.render import RenderedPrompt
from pipeline.teacher_cache.reply_log import ReplyLog

log = logging.getLogger("pipeline")

NO_CONNECTION = "no connection"
NO_KEY = "none"  # what endpoints without keys are sent
FAILED_SHARE = 0.1  # of the prompts asked: with more the set is another one than was wanted
FIRST_FAILURES = 16  # with no answer beside as many failures, none will come
SHOWN_REASONS, REASON_CHARACTERS = 5, 300
ANOTHER_RUN = "the answers that came are kept: run the same command to go on"
MENDING = {
    401: "set the environment variable named by teacher_cache.openai.api_key_env to a valid key",
    403: "use a key that may use this model",
    404: "check teacher_cache.openai.url (it ends in /v1 as a rule) and teacher_cache.openai.model",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where and how requests are sent. `key` None: the endpoint wants none."""

    url: str
    key: str | None = dataclasses.field(repr=False)
    concurrency: int
    timeout_seconds: float
    retries: int

    def client(self) -> openai.AsyncOpenAI:
        """A client that waits and tries again after 408, 409, 429, 5xx, timeouts and lost connections.

        It waits as long as a Retry-After header says, or half a second, one, two and so on up to eight.
        """
        return openai.AsyncOpenAI(
            base_url=self.url, api_key=self.key or NO_KEY, timeout=self.timeout_seconds, max_retries=self.retries
        )

    def redacted(self, text: str) -> str:
        """A text without the key, cut short."""
        text = text.replace(self.key, "(key)") if self.key else text
        return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 3] + "..."


class EndpointClient:
    """Answers of an endpoint to prompts. What it said is in the journal at `path`, and is not asked for again."""

    def __init__(self, endpoint: Endpoint, asking: RequestTemplate, reader: Reader, path: Path) -> None:
        self._endpoint, self._asking, self._reader, self._path = endpoint, asking, reader, path
        self._entries: dict[str, dict[str, Any]] = {}

    def fetch(self, rows: Sequence[RenderedPrompt]) -> None:
        """Have an entry for every row: a reply, or why there is none.

        Prompts that failed in an earlier run are asked again. Raises PipelineError when the endpoint refuses all
        requests, when it answers none, or when more than a tenth fail.
        """
        with ReplyLog(self._path) as journal:
            found = [journal.entries.get(self._key(row)) for row in rows]
            missing = [row for row, entry in zip(rows, found, strict=True) if entry is None or "failed" in entry]
            if len(missing) < len(rows):
                log.info("teacher_cache: going on; %d of %d answers are there", len(rows) - len(missing), len(rows))
            if missing:
                num_there = sum(entry is not None and "kept" in entry for entry in found)
                asyncio.run(_FetchRun(self, journal, missing, num_there).run())
            self._entries = journal.entries
        self._tell(rows)

    def answer(
        self, rows: Sequence[RenderedPrompt], on_finished: Callable[[Completion], None]
    ) -> list[AnsweredPrompt | FailedPrompt]:
        """The answers to rows that were fetched, in their order."""
        return [self._answer(row, on_finished) for row in rows]

    async def ask(self, client: openai.AsyncOpenAI, row: RenderedPrompt) -> dict[str, Any]:
        """The journal's entry for a row. Raises PipelineError when the endpoint will refuse every other row too."""
        entry = {"key": self._key(row), "prompt_id": row.prompt.prompt_id}
        api = self._asking.api
        try:
            reply = await client.post(api.value, cast_to=object, body=self._asking.body(row))
            kept = reply_fields(reply, api)
            self._reader.tokens(kept)
            return entry | {"kept": kept}
        except openai.APIStatusError as error:
            message = error.message.removeprefix(f"Error code: {error.status_code}").removeprefix(" - ")
            reason = self._endpoint.redacted(f"HTTP {error.status_code}: {message or error.response.text}")
            if error.status_code in MENDING:
                mend = MENDING[error.status_code]
                raise PipelineError(f"{self._asking.origin.endpoint} answers {reason}; {mend}") from None
        except openai.APITimeoutError:
            reason = f"no answer within {self._endpoint.timeout_seconds:g} s (teacher_cache.openai.timeout_seconds)"
        except openai.APIConnectionError as error:
            reason = self._endpoint.redacted(f"{NO_CONNECTION}: {error.__cause__ or error}")
        except openai.APIError as error:
            reason = self._endpoint.redacted(str(error))
        except ValueError as error:  # no JSON, or no UTF-8
            reason = f"the reply is no JSON: {error}"
        except BadReply as error:
            reason = self._endpoint.redacted(str(error))
        return entry | {"failed": reason}

    @property
    def endpoint(self) -> Endpoint:
        """Where requests are sent."""
        return self._endpoint

    def give_up(self, reasons: Sequence[str], num_asked: int) -> PipelineError:
        """The error of a run in which too many prompts failed."""
        counts = collections.Counter(reasons).most_common()
        more = [f"and {len(counts) - SHOWN_REASONS} other reasons"] if len(counts) > SHOWN_REASONS else []
        listed = "\n  ".join([f"{count} prompts: {reason}" for reason, count in counts[:SHOWN_REASONS]] + more)
        return PipelineError(
            f"{self._asking.origin.endpoint} failed {len(reasons)} of {num_asked} prompts, at most "
            f"{FAILED_SHARE:.0%} may fail; {ANOTHER_RUN}\n  {listed}"
        )

    def _key(self, row: RenderedPrompt) -> str:
        return fingerprint_of([self._endpoint.url, self._asking.api.value, self._asking.body(row)])

    def _answer(self, row: RenderedPrompt, on_finished: Callable[[Completion], None]) -> AnsweredPrompt | FailedPrompt:
        entry = self._entries[self._key(row)]
        if "failed" in entry:
            return FailedPrompt(row.prompt, entry["failed"])
        try:
            token_ids, reason = self._reader.tokens(entry["kept"])
        except BadReply as error:  # of a journal that an older version of this program wrote
            return FailedPrompt(row.prompt, str(error))
        finished = Completion(
            request_id=row.prompt.prompt_id, token_ids=token_ids, finish_reason=reason, accepted_per_round=()
        )
        on_finished(finished)
        return AnsweredPrompt(row.prompt, row.token_ids + token_ids, len(row.token_ids), reason)

    def _tell(self, rows: Sequence[RenderedPrompt]) -> None:
        """Say what is odd about the answers: failures, and prompts that the endpoint wrote otherwise than we did."""
        entries = [(row, self._entries[self._key(row)]) for row in rows]
        failed = [(row, entry["failed"]) for row, entry in entries if "failed" in entry]
        if failed:
            row, reason = failed[0]
            log.warning(
                "teacher_cache: %d of %d prompts got no answer, and are left out; the first, %s: %s",
                len(failed),
                len(rows),
                row.prompt.prompt_id[:12],
                reason,
            )
        others = [row for row, entry in entries if "kept" in entry and not _is_same_prompt(row, entry["kept"])]
        if others:
            log.warning(
                "teacher_cache: %s read %d of %d prompts as other tokens than they have here, the first %s: its chat "
                "template or its date differ; teacher_cache.openai.api=completions sends tokens",
                self._asking.origin.endpoint,
                len(others),
                len(rows),
                others[0].prompt.prompt_id[:12],
            )


def _is_same_prompt(row: RenderedPrompt, kept: dict[str, Any]) -> bool:
    if kept["prompt_token_ids"] is not None:
        return tuple(kept["prompt_token_ids"]) == row.token_ids
    return kept["num_prompt_tokens"] in (None, len(row.token_ids))


class _FetchRun:
    """Asks for the rows that have no reply, `concurrency` at a time."""

    def __init__(
        self, correspondence: EndpointClient, journal: ReplyLog, rows: Sequence[RenderedPrompt], num_there: int
    ) -> None:
        self._correspondence, self._journal = correspondence, journal
        self._rows, self._num_there = rows, num_there
        self._reasons: list[str] = []
        self._num_answered = 0

    async def run(self) -> None:
        """Ask; the first error of a worker ends all of them."""
        endpoint = self._correspondence.endpoint
        waiting = iter(self._rows)
        total = self._num_there + len(self._rows)
        with Progress("teacher_cache: answers", total, "prompts", done=self._num_there) as progress:
            async with endpoint.client() as client:
                count = min(endpoint.concurrency, len(self._rows))
                workers = [asyncio.create_task(self._work(client, waiting, progress)) for _ in range(count)]
                _, others = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
                for worker in others:
                    worker.cancel()
                for ended in await asyncio.gather(*workers, return_exceptions=True):
                    if isinstance(ended, Exception):  # what was cancelled has another cause
                        raise ended
        self._require_enough(is_over=True)

    async def _work(self, client: openai.AsyncOpenAI, waiting: Iterator[RenderedPrompt], progress: Progress) -> None:
        for row in waiting:
            entry = await self._correspondence.ask(client, row)
            self._journal.append(entry)
            if "failed" in entry:
                self._reasons.append(entry["failed"])
            else:
                self._num_answered += 1
            progress.advance(1, f"{len(self._reasons)} failed" if self._reasons else "")
            self._require_enough(is_over=False)

    def _require_enough(self, *, is_over: bool) -> None:
        """Raise PipelineError when too many prompts have failed, as soon as that is certain.

        Of an earlier run's failures, which are asked again first, all may fail again; unreachable it must not be.
        """
        num_failed, limit = len(self._reasons), 1 if is_over else FIRST_FAILURES
        unreached = sum(reason.startswith(NO_CONNECTION) for reason in self._reasons)
        none_come = not self._num_answered and (
            unreached >= FIRST_FAILURES or (not self._num_there and num_failed >= limit)
        )
        if none_come or num_failed > max(1, FAILED_SHARE * (self._num_there + len(self._rows))):
            raise self._correspondence.give_up(self._reasons, self._num_answered + num_failed)
