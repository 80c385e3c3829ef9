"""The decoding loop: batched, greedy or sampled, plain or with a draft; requests come and go between steps."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine import compiled_steps
from pipeline.engine.config import EngineConfig
from pipeline.engine.layout import rows_of_shard
from pipeline.engine.request import Completion, Request, StepUpdate
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.state import PrefillChunk, StepOutput
from pipeline.errors import PipelineError
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineTimes:
    """Holds the tokens and seconds of an engine's two phases. The first token of an answer counts to prefill."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


class Engine:
    """An engine decodes requests over a fixed number of slots. One thread owns it.

    With a draft, each step is one DFLASH round; without one, it is one token. With a mesh in `runtime`, weights must be
    sharded as `placement.target_shardings` and `draft_shardings` say, and every process of a mesh over several hosts
    must drive its engine alike. Raises PipelineError when target, draft, configuration and mesh do not go together.
    """

    def __init__(
        self,
        target: TargetModel,
        draft: DraftModel | None,
        config: EngineConfig,
        runtime: Runtime = SINGLE_DEVICE,
    ) -> None:
        num_shards = runtime.execution.shards.data
        _require_fitting(target, draft, config, num_shards)
        self.config = config
        self._target, self._draft = target, draft
        self._stops = frozenset(config.stop_token_ids)
        self._stop_ids = np.asarray(sorted(self._stops), dtype=np.int32)
        self._slots_of_shard = config.num_slots // num_shards
        self._rows_of_shard = rows_of_shard(self._slots_of_shard)
        self._num_shards = num_shards
        self._scheduler = Scheduler(config.num_slots)
        self.block_size = None if draft is None else draft.config.block_size
        self.acceptance = acceptance.empty(self.block_size or 1)
        self.times = EngineTimes()
        self._state = compiled_steps.allocate_state(target, draft, config, runtime.mesh)
        if runtime.mesh is None:
            self._steps = compiled_steps.compile_single(runtime.execution, config.sampling)
        else:
            self._steps = compiled_steps.compile_mesh(target, draft, self._state, runtime, config.sampling)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._scheduler.running) or self._scheduler.num_waiting > 0

    @property
    def num_waiting(self) -> int:
        """The number of requests without a slot."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """The number of requests with a slot."""
        return len(self._scheduler.running)

    def check(self, request: Request) -> None:
        """Raises PipelineError when a request cannot be run.

        It may be empty or too long, hold tokens that the target does not know, lack a sampling key or have one that
        greedy decoding cannot use, or have the id of another request.
        """
        prompt, new = len(request.prompt_ids), request.max_new_tokens
        if prompt == 0 or new < 1:
            raise PipelineError(f"prompt has {prompt} tokens and max_new_tokens is {new}; both must be at least 1")
        if prompt + new > self.config.max_length:
            raise PipelineError(
                f"prompt has {prompt} tokens and {new} more are wanted, {prompt + new} in all; the engine holds "
                f"{self.config.max_length}: shorten either, or raise its max_length"
            )
        vocab_size = self._target.config.vocab_size
        unknown = [token for token in request.prompt_ids if not 0 <= token < vocab_size]
        if unknown:
            raise PipelineError(f"prompt has token ids {unknown[:5]}; the target knows 0..{vocab_size - 1}")
        if (request.sampling_key is None) != (self.config.sampling is None):
            found, wanted = ("no key", "samples") if request.sampling_key is None else ("a key", "decodes greedily")
            raise PipelineError(f"request {request.request_id!r} has {found}; the engine {wanted}")
        if self._scheduler.knows(request.request_id):
            raise PipelineError(f"request id {request.request_id!r} is already in use")

    def add(self, request: Request) -> None:
        """Queues a request; raises PipelineError as `check` does."""
        self.add_all([request])

    def add_all(self, requests: Sequence[Request]) -> None:
        """Queues requests, all or none; raises PipelineError as `check` does."""
        for request in requests:
            self.check(request)
        for request in requests:
            self._scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """Forgets a request, waiting or running; an unknown id is no error, for the request may just have finished."""
        slot = self._scheduler.drop(request_id)
        if slot is not None:
            state = self._state
            self._state = dataclasses.replace(state, active=state.active.at[slot].set(False))

    def step(self) -> list[StepUpdate]:
        """Prefills the requests that have just got a slot, then runs one round; returns what every request got."""
        updates = []
        waiting = admitted = self._scheduler.admit()
        started = time.perf_counter()
        while waiting:
            group, waiting = self._next_group(waiting)
            updates += self.prefill_first_tokens(group)
        prefilled = time.perf_counter()
        rounds = self.decode_round() if self._scheduler.running else []
        times = self.times
        self.times = EngineTimes(
            prefill_tokens=times.prefill_tokens + sum(len(request.prompt_ids) for _, request in admitted),
            prefill_seconds=times.prefill_seconds + prefilled - started,
            decode_tokens=times.decode_tokens + sum(len(update.token_ids) for update in rounds),
            decode_seconds=times.decode_seconds + time.perf_counter() - prefilled,
        )
        return updates + rounds

    def warm_up(self) -> None:
        """Compiles every step, with one request that leaves no trace in the counters."""
        before = self.acceptance, self.times
        key = None if self.config.sampling is None else (0, 0)
        list(self.generate([Request(request_id="warm-up", prompt_ids=(0,), max_new_tokens=2, sampling_key=key)]))
        self.decode_round()  # if the first token stops the generation, no round has run yet
        self.acceptance, self.times = before

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Runs requests through the slots and yields each one's completion when it finishes."""
        source = iter(requests)
        tokens: dict[str, list[int]] = {}
        accepted: dict[str, list[int]] = {}
        while True:
            free = self.config.num_slots - self.num_running - self.num_waiting
            for request in itertools.islice(source, max(free, 0)):
                self.add(request)
                tokens[request.request_id], accepted[request.request_id] = [], []
            if not self.has_work:
                return
            for update in self.step():
                tokens[update.request_id] += update.token_ids
                if update.num_accepted is not None:
                    accepted[update.request_id].append(update.num_accepted)
                if update.finish_reason is not None:
                    yield Completion(
                        request_id=update.request_id,
                        token_ids=tuple(tokens.pop(update.request_id)),
                        finish_reason=update.finish_reason,
                        accepted_per_round=tuple(accepted.pop(update.request_id)),
                    )

    def prefill_first_tokens(self, group: Mapping[int, tuple[int, Request]]) -> list[StepUpdate]:
        """Prefills the prompts of a group (slot and request by row of the step); returns their first tokens.

        A hook: an engine that forces tokens replaces the first ones.
        """
        updates = []
        longest = max(len(request.prompt_ids) for _, request in group.values())
        for start in range(0, longest, self.config.prefill_chunk):
            chunk = self._chunk_of(group, start)
            self._state, output = self._steps.prefill(self._target, self._draft, self._state, chunk, self._stop_ids)
            if chunk.is_last.any():
                updates += self._collect(output, {row: slot for row, (slot, _) in group.items()}, is_round=False)
        return updates

    def decode_round(self) -> list[StepUpdate]:
        """Runs one DFLASH round, or one plain step, over all slots; returns what every running request got.

        A hook: an engine that forces tokens runs another step.
        """
        if self._draft is None:
            self._state, output = self._steps.plain_step(self._target, self._state, self._stop_ids)
        else:
            self._state, output = self._steps.dflash_round(self._target, self._draft, self._state, self._stop_ids)
        return self._collect_round(output)

    def _next_group(
        self, admitted: Sequence[tuple[int, Request]]
    ) -> tuple[dict[int, tuple[int, Request]], list[tuple[int, Request]]]:
        """Returns the requests that are prefilled together, by their row in the step, and those that are left over.

        Each shard has rows for its own slots.
        """
        group: dict[int, tuple[int, Request]] = {}
        left = []
        for slot, request in admitted:
            first = slot // self._slots_of_shard * self._rows_of_shard
            free = next((row for row in range(first, first + self._rows_of_shard) if row not in group), None)
            if free is None:
                left.append((slot, request))
            else:
                group[free] = (slot, request)
        return group, left

    def _chunk_of(self, group: Mapping[int, tuple[int, Request]], start: int) -> PrefillChunk:
        rows, columns = self._num_shards * self._rows_of_shard, self.config.prefill_chunk
        full: Callable[..., Any] = np.full  # a jitted step takes NumPy's arrays as it takes JAX's
        chunk = PrefillChunk(
            rows=full(rows, self._slots_of_shard, np.int32),  # past the last slot: dropped
            token_ids=full((rows, columns), 0, np.int32),
            start=full(rows, start, np.int32),
            num_tokens=full(rows, 1, np.int32),
            budget=full(rows, 0, np.int32),
            is_last=full(rows, False, bool),
            keys=None if self.config.sampling is None else full((rows, 2), 0, np.uint32),
        )
        for row, (slot, request) in group.items():
            part = request.prompt_ids[start : start + columns]
            if part:
                chunk.rows[row] = slot % self._slots_of_shard
                chunk.token_ids[row, : len(part)] = part
                chunk.num_tokens[row] = len(part)
                chunk.budget[row] = request.max_new_tokens
                chunk.is_last[row] = start + columns >= len(request.prompt_ids)
                if chunk.keys is not None:
                    chunk.keys[row] = request.sampling_key
        return chunk

    def _collect_round(self, output: StepOutput) -> list[StepUpdate]:
        return self._collect(output, {slot: slot for slot in self._scheduler.running}, is_round=self._draft is not None)

    def _collect(self, output: StepOutput, slot_of_row: Mapping[int, int], *, is_round: bool) -> list[StepUpdate]:
        """Takes a step's output to the host: the one transfer of a step."""
        tokens, counts, finished = jax.device_get((output.token_ids, output.num_tokens, output.finished))
        updates = []
        for row, slot in slot_of_row.items():
            count = int(counts[row])
            if count == 0:
                continue
            request = self._scheduler.running[slot]
            new = tuple(int(token) for token in tokens[row, :count])
            reason = None
            if finished[row]:
                reason = "stop" if new[-1] in self._stops else "length"
                self._scheduler.release(slot)
            num_accepted = count - 1 if is_round else None
            updates.append(
                StepUpdate(
                    request_id=request.request_id, token_ids=new, finish_reason=reason, num_accepted=num_accepted
                )
            )
        rounds = [update.num_accepted for update in updates if update.num_accepted is not None]
        if rounds and self.block_size is not None:
            self.acceptance += Acceptance.of(rounds, self.block_size)
        return updates


def _require_fitting(target: TargetModel, draft: DraftModel | None, config: EngineConfig, num_shards: int) -> None:
    if config.sampling is not None and draft is not None:
        raise PipelineError(
            f"the engine was given a draft and a temperature of {config.sampling.temperature}; with a draft decoding "
            "is greedy: leave either out"
        )
    positions = target.config.max_position_embeddings
    if config.max_length > positions:
        raise PipelineError(f"max_length is {config.max_length}; the target has {positions} positions")
    if config.num_slots % num_shards:
        raise PipelineError(f"the engine has {config.num_slots} slots for mesh.data={num_shards}; make it a multiple")
