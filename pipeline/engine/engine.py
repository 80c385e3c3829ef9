"""The decoding loop: batched, plain or with a draft; requests come and go between steps.

A step is dispatched before the one before it is read, so that the devices never wait for the host: what decides whether
a request goes on (stop tokens, budgets) is on the devices already. The host knows a request's tokens one step late, and
takes pages for as many as the steps under way may commit.
"""

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from pipeline.dflash.acceptance import Acceptance
from pipeline.engine import compiled_steps, log_probs
from pipeline.engine.block_choice import Estimate
from pipeline.engine.config import EngineConfig
from pipeline.engine.in_flight import Dispatched, EngineTimes, InFlight
from pipeline.engine.layout import rows_of_shard
from pipeline.engine.prompt_chunk import chunk_of
from pipeline.engine.request import Completion, Request, StepUpdate, TokenLogProb
from pipeline.engine.request_check import require_runnable
from pipeline.engine.sampling_params import GREEDY, SamplingParams, history_of
from pipeline.engine.scheduler import Running, Scheduler
from pipeline.engine.slot_pages import SlotPages
from pipeline.engine.state import DEFERRED_STEPS, StepOutput, block_sizes_of, layout_of
from pipeline.engine.step_counts import StepCounts
from pipeline.engine.step_rows import StepRows, rows_for
from pipeline.engine.token_masks import fill_masks
from pipeline.errors import PipelineError
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime

MANY_ROWS = 4  # of a prefill step, of which a single prompt is not to pay for all: it gets a program of its own


class Engine:
    """An engine decodes requests over a fixed number of slots. One thread owns it.

    With a draft, each step is one DFLASH round; without one, it is one token. With a mesh in `runtime`, weights must be
    sharded as `placement.target_shardings` and `draft_shardings` say, and every process of a mesh over several hosts
    must drive its engine alike. Raises PipelineError when target, draft, configuration and mesh do not go together.
    """

    steps_ahead = 1  # steps that may be under way when one has been dispatched and before an older one is read

    def __init__(
        self,
        target: TargetModel,
        draft: DraftModel | None,
        config: EngineConfig,
        runtime: Runtime = SINGLE_DEVICE,
    ) -> None:
        num_shards = runtime.execution.shards.data
        _require_fitting(target, config, num_shards)
        self.config = config
        self._target, self._draft = target, draft
        self._slots_of_shard = config.num_slots // num_shards
        self._rows_of_shard = rows_of_shard(self._slots_of_shard, config)
        self._num_shards = num_shards
        self._runtime = runtime
        self._scheduler = Scheduler(config.num_slots)
        layout = layout_of(target, draft, config, num_shards)
        self._pages = SlotPages(
            layout, slots_of_shard=self._slots_of_shard, num_shards=num_shards, reuse=config.reuse_prefixes
        )
        self.block_size = None if draft is None else draft.config.block_size
        counts = {count for count in config.row_counts if count < self._slots_of_shard} | {self._slots_of_shard}
        self._counts = StepCounts(self.block_size, block_sizes_of(draft, config), sorted(counts))
        self._num_deferred = 0
        self._has_masks = False  # on the devices, from a step before
        self.num_preempted = 0
        self._num_steps = 0
        self._in_flight = InFlight()
        self._updates: list[StepUpdate] = []
        self._state = compiled_steps.allocate_state(target, draft, config, runtime)
        if runtime.mesh is None:
            self._steps = compiled_steps.compile_single(runtime.execution)
        else:
            self._steps = compiled_steps.compile_mesh(target, draft, self._state, runtime)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._scheduler.running) or self._scheduler.num_waiting > 0

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the target knows."""
        return self._target.config.vocab_size

    @property
    def num_waiting(self) -> int:
        """The number of requests without a slot."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """The number of requests with a slot."""
        return len(self._scheduler.running)

    @property
    def num_pages(self) -> int:
        """The number of pages of layers that see everything."""
        return self._pages.layout.num_pages * self._num_shards

    @property
    def num_free_pages(self) -> int:
        """The number of pages that no request uses, of layers that see everything."""
        return self._pages.num_available

    @property
    def acceptance(self) -> Acceptance:
        """What rounds of the draft's own block size accepted."""
        return self._counts.acceptance

    @property
    def smaller_blocks(self) -> Mapping[int, Acceptance]:
        """What rounds of smaller block sizes accepted, by their size."""
        return self._counts.smaller_blocks

    @property
    def times(self) -> EngineTimes:
        """The tokens and seconds of all steps that were read."""
        return self._counts.times

    @property
    def block_estimates(self) -> Mapping[int, Estimate]:
        """What a round of each block size is expected to yield and to take; empty where nothing is chosen.

        Times are those of as many rows as the last round had.
        """
        return self._counts.estimates()

    def plain_beside(self) -> "Engine":
        """Returns an engine of the same target without a draft, with slots and pages of its own."""
        return Engine(self._target, None, dataclasses.replace(self.config, block_sizes=()), self._runtime)

    def with_draft(self, draft: DraftModel) -> "Engine":
        """Returns an engine of the same target and sizes with another draft, with slots and pages of its own."""
        return Engine(self._target, draft, self.config, self._runtime)

    def check(self, request: Request) -> None:
        """Raises PipelineError when a request cannot be run.

        It may be empty or too long, hold or name tokens that the target does not know, want more tokens at least than
        at most, or have the id of another request.
        """
        require_runnable(request, self.config, self.vocab_size)
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
            is_scored = request.sampling.prompt_logprobs is not None  # so all of the prompt must be computed
            self._scheduler.add(request, [] if is_scored else self._pages.keys_of(request.prompt_ids))

    def cancel(self, request_id: str) -> None:
        """Forgets a request, waiting or running; an unknown id is no error, for the request may just have finished."""
        slot = self._scheduler.drop(request_id)
        if slot is not None:
            self._stop_slot(slot)
        if not self.has_work:
            self._in_flight.clear()

    def step(self) -> list[StepUpdate]:
        """Admits requests, dispatches a chunk of prompts and a round, and returns what the steps before them gave."""
        if not self.has_work:
            return []
        self._num_steps += 1
        self._scheduler.admit(self._slot_for)
        dispatched = self._prefill()
        dispatched |= self._decode()
        self._read(self.steps_ahead if dispatched else 0)
        if not self.has_work:
            self._in_flight.clear()  # a round for requests that had just ended
        updates, self._updates = self._updates, []
        return updates

    def warm_up(self, on_compiled: Callable[[str], None] = lambda name: None) -> None:
        """Compiles every step, with requests that leave no trace in the counters.

        `on_compiled` gets the name of each part when it is ready.
        """
        before = copy.copy(self._counts)
        sampling = SamplingParams(presence_penalty=1.0) if self.config.samples else GREEDY  # has a history to set
        for count in sorted({1, min(self._num_shards + 1, self.config.num_slots)}):  # then a shard has two prompts
            names = [f"warm-up {index}" for index in range(count)]
            list(
                self.generate(
                    Request(request_id=name, prompt_ids=(0,), max_new_tokens=2, sampling=sampling) for name in names
                )
            )
        on_compiled("prefill")
        if self.config.samples:
            self._set_masks({})
        for count in self._counts.row_counts:
            rows = rows_for({}, [count], self._slots_of_shard, self._num_shards)
            self._counts.forget_times(count)
            for size in self._counts.sizes:
                self._warm_up_round(rows, size)
                name = f"a round of {size}" if size > 1 else "a plain step"
                on_compiled(f"{name}, {count} of {self._slots_of_shard} slots")
        self._counts = before  # whose block choices are the same

    def _warm_up_round(self, rows: StepRows, size: int) -> None:
        """Compiles a round with so many rows and a block size, where none has run yet, and takes its time."""
        jax.block_until_ready(self._dispatch_round(rows, size))
        if self.config.samples and 1 < size == self._counts.sizes[-1]:
            jax.block_until_ready(self._verify(rows, self._drafted(rows, size)))
        for _ in range(3):
            started = time.perf_counter()
            jax.block_until_ready(self._dispatch_round(rows, size))
            self._counts.took(rows.count, size, time.perf_counter() - started)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Runs requests through the slots and yields each one's completion when it finishes."""
        source = iter(requests)
        tokens: dict[str, list[int]] = {}
        accepted: dict[str, list[int]] = {}
        likely: dict[str, list[TokenLogProb]] = {}
        while True:
            free = self.config.num_slots - self.num_running - self.num_waiting
            for request in itertools.islice(source, max(free, 0)):
                self.add(request)
                tokens[request.request_id], accepted[request.request_id] = [], []
                likely[request.request_id] = []
            if not self.has_work:
                return
            for update in self.step():
                tokens[update.request_id] += update.token_ids
                likely[update.request_id] += update.log_probs
                if update.num_accepted is not None:
                    accepted[update.request_id].append(update.num_accepted)
                if update.finish_reason is not None:
                    yield Completion(
                        request_id=update.request_id,
                        token_ids=tuple(tokens.pop(update.request_id)),
                        finish_reason=update.finish_reason,
                        accepted_per_round=tuple(accepted.pop(update.request_id)),
                        log_probs=tuple(likely.pop(update.request_id)),
                    )

    def _first_id(self, one: Running) -> int:
        """Returns the token from which a request decodes when its prompt is computed, or -1 for the target's own.

        A hook: an engine along known answers has another one.
        """
        return one.tokens[-1] if one.num_generated else -1

    def _dispatch_round(self, rows: StepRows, size: int) -> StepOutput:
        """Dispatches one DFLASH round with blocks of a size, or one plain step, over rows.

        A hook: an engine along known answers runs another step.
        """
        if self._num_deferred == DEFERRED_STEPS or (size > 1 and self._num_deferred):
            self._extend_context(rows)
        step = self._steps.dflash_round(size) if size > 1 else self._steps.plain_step
        self._num_deferred += size == 1 and self._draft is not None
        self._state, output = step(self._target, self._draft, self._state, self._pages.tables(rows), rows.indices)
        return output

    def _extend_context(self, rows: StepRows) -> None:
        self._state = self._steps.extend_context(self._draft, self._state, self._pages.tables(rows), rows.indices)
        self._num_deferred = 0

    def _dispatch_masked(self, rows: StepRows, constrained: dict[int, Running], size: int) -> StepOutput:
        """Dispatches a round, or a plain step, in which grammars rule tokens out.

        What may follow a drafted token is known when the host has seen it, so draft and verification run apart.
        """
        if size == 1:
            self._set_masks(constrained)
            return self._dispatch_round(rows, 1)
        if self._num_deferred:
            self._extend_context(rows)
        drafted = self._drafted(rows, size)
        self._set_masks(constrained, {slot: drafted[row] for row, slot in rows.slots.items()})
        return self._verify(rows, drafted)

    def _drafted(self, rows: StepRows, size: int) -> np.ndarray:
        draft_apart, tables = self._steps.draft_apart(size), self._pages.tables(rows)
        return np.array(draft_apart(self._target, self._draft, self._state, tables, rows.indices))

    def _verify(self, rows: StepRows, drafted: np.ndarray) -> StepOutput:
        self._state, output = self._steps.verify_apart(
            self._target, self._draft, self._state, self._pages.tables(rows), rows.indices, drafted
        )
        return output

    def _set_masks(self, constrained: Mapping[int, Running], drafted: Mapping[int, np.ndarray] | None = None) -> None:
        """Says which tokens may follow in the next step, and changes those drafted where that is known (by slots)."""
        length = self.block_size or 1
        masks = fill_masks(constrained, drafted or {}, self.config.num_slots, length, self.vocab_size)
        self._state = self._steps.set_masks(self._state, *masks)
        self._has_masks = bool(constrained)

    def _slot_for(self, one: Running, free: Sequence[int]) -> int | None:
        """Chooses a free slot for a request, as `SlotPages.open` does, and begins with what is computed already."""
        opened = self._pages.open(one, free)
        if opened is None:
            return None
        slot, reused = opened
        one.num_prefilled = reused
        if not one.num_generated:
            one.num_reused = reused
        if one.request.sampling.is_penalised:
            self._set_history(one, slot)
        self._counts.reused(reused)
        return slot

    def _set_history(self, one: Running, slot: int) -> None:
        """Gives the device what a request is penalised for: its prompt, and an answer that was preempted."""
        vocab_size = self.vocab_size
        rows = np.full(self._num_shards, self._slots_of_shard, np.int32)  # past the last slot: dropped
        generated = np.zeros((self._num_shards, vocab_size), np.int32)
        in_prompt = np.zeros((self._num_shards, vocab_size), bool)
        shard = slot // self._slots_of_shard
        rows[shard] = slot % self._slots_of_shard
        known = one.tokens[: one.num_to_prefill]  # the token behind them counts when it becomes the anchor
        generated[shard], in_prompt[shard] = history_of(known, len(one.request.prompt_ids), vocab_size)
        self._state = self._steps.set_history(self._state, rows, generated, in_prompt)

    def _prefill(self) -> bool:
        """Dispatches one chunk of prompts, as many as a step has rows for; returns whether there was one."""
        free = [iter(range(self._rows_of_shard)) for _ in range(self._num_shards)]
        chosen = []
        for one in self._scheduler.to_prefill():
            shard = one.slot // self._slots_of_shard
            row = next(free[shard], None)
            if row is not None:
                chosen.append((shard, row, one))
        if not chosen:
            return False
        is_single = self._rows_of_shard >= MANY_ROWS and all(row == 0 for _, row, _ in chosen)
        height = 1 if is_single else self._rows_of_shard
        rows = {shard * height + row: one for shard, row, one in chosen}
        chunk = chunk_of(
            rows,
            self._pages,
            (self._num_shards * height, self.config.prefill_chunk),
            first_id=self._first_id,
            stops_of=self._stops_of,
        )
        ending = {one.slot: one for row, one in rows.items() if chunk.is_last[row] and one.constraint is not None}
        if ending or self._has_masks:
            self._set_masks(ending)
        self._state, output = self._steps.prefill(self._target, self._draft, self._state, chunk)
        for row, one in rows.items():
            one.num_prefilled += int(chunk.num_tokens[row])
            one.last_prefill = self._num_steps
            one.is_decoding = bool(chunk.is_last[row])
            self._pages.commit(one, one.num_prefilled)
        self._in_flight.add(Dispatched(output, rows, None, {row: int(chunk.num_tokens[row]) for row in rows}))
        return True

    def _decode(self) -> bool:
        """Dispatches a round when any request decodes; returns whether one does.

        Each gets pages for all that may be committed by then; if there are too few, what is under way is read first,
        and then the request that arrived last has to wait. Where a grammar rules tokens out, the host must know the
        answer so far.
        """
        size = None
        if any(one.constraint is not None and one.is_decoding for one in self._scheduler.running.values()):
            self._read(0)
        while True:
            by_slot = {slot: one for slot, one in self._scheduler.running.items() if one.is_decoding}
            if all(one.is_surely_done for one in by_slot.values()):
                return False
            constrained = {slot: one for slot, one in by_slot.items() if one.constraint is not None}
            rows = rows_for(by_slot, self._counts.row_counts, self._slots_of_shard, self._num_shards)
            size = size or self._counts.choose_size(rows.count, is_constrained=bool(constrained))
            if all(self._grow(one, size) for one in by_slot.values()):
                break
            if self._in_flight:
                self._read(0)
            else:
                self._preempt()
        if constrained:
            output = self._dispatch_masked(rows, constrained, size)
        else:
            if self._has_masks:
                self._set_masks({})
            output = self._dispatch_round(rows, size)
        for one in by_slot.values():
            one.rounds_ahead += 1
            one.tokens_ahead += size
        self._in_flight.add(Dispatched(output, rows.by_row, size, num_rows=rows.count, is_masked=bool(constrained)))
        return True

    def _grow(self, one: Running, size: int) -> bool:
        """Takes pages for what the next round may commit; returns False when there are too few."""
        prompt = len(one.request.prompt_ids)
        most = max(prompt, len(one.tokens) - 1) + one.tokens_ahead + size
        return self._pages.grow(one.slot, min(most, prompt + one.request.max_new_tokens))

    def _preempt(self) -> None:
        """Takes the slot of the request that arrived last; what is under way must have been read."""
        one = self._scheduler.youngest()
        self._scheduler.preempt(one, self._pages.keys_of(one.tokens, one.keys))
        self._stop_slot(one.slot)
        self.num_preempted += 1

    def _stop_slot(self, slot: int) -> None:
        """Lets a slot's request run no further, and gives back its pages.

        Steps that are under way still write to them, but only behind what is committed, and before any later step.
        """
        self._state = dataclasses.replace(self._state, active=self._state.active.at[slot].set(False))
        self._pages.close(slot)

    def _read(self, num_left: int) -> None:
        """Reads the oldest steps until `num_left` are under way."""
        while len(self._in_flight) > num_left:
            step, output, seconds, waited = self._in_flight.take()
            size = step.block_size
            accepted = []
            num_tokens = 0
            for row, one in step.by_row.items():
                if self._scheduler.running.get(one.slot) is not one:
                    continue  # cancelled, or finished in a round before this one
                if size is not None:
                    one.rounds_ahead -= 1
                    one.tokens_ahead -= size
                elif one.request.sampling.prompt_logprobs is not None and not one.num_generated:
                    one.prompt_log_probs += log_probs.of_prompt(
                        one, output.prompt_log_probs, row, step.num_columns[row]
                    )
                count = int(output.num_tokens[row])
                if count == 0 or (size is None and one.num_generated):  # a prompt that goes on, or a preempted answer
                    continue
                num_tokens += count
                accepted.append(count - 1)
                self._update(one, output, row, size)
            self._counts.add(step, num_tokens, accepted, seconds, waited)

    def _update(self, one: Running, output: StepOutput, row_of_output: int, size: int | None) -> None:
        """Adds a row's tokens to what is known of a request, and ends it when they are its last ones."""
        new = tuple(output.token_ids[row_of_output, : output.num_tokens[row_of_output]].tolist())
        one.tokens += new
        if one.constraint is not None:
            one.constraint.advance(new)
        self._pages.commit(one, len(one.tokens) - 1, num_pending=self._num_deferred)
        reason = None
        if output.finished[row_of_output]:
            reason = "stop" if new[-1] in self._stops_of(one) else "length"
            self._scheduler.release(one.slot)
            self._pages.close(one.slot)
        num_drafted = 0 if size is None else size - 1
        self._updates.append(
            StepUpdate(
                request_id=one.request.request_id,
                token_ids=new,
                finish_reason=reason,
                num_accepted=len(new) - 1 if num_drafted else None,
                num_drafted=num_drafted or None,
                log_probs=log_probs.of_tokens(one.request.sampling.logprobs, new, output.log_probs, row_of_output),
                prompt_log_probs=tuple(one.prompt_log_probs) if one.num_generated == len(new) else (),
                num_reused=one.num_reused,
            )
        )

    def _stops_of(self, one: Running) -> tuple[int, ...]:
        wanted = one.request.sampling.stop_token_ids
        return self.config.stop_token_ids if wanted is None else wanted


def _require_fitting(target: TargetModel, config: EngineConfig, num_shards: int) -> None:
    positions = target.config.max_position_embeddings
    if config.max_length > positions:
        raise PipelineError(f"max_length is {config.max_length}; the target has {positions} positions")
    if config.num_slots % num_shards:
        raise PipelineError(f"the engine has {config.num_slots} slots for mesh.data={num_shards}; make it a multiple")
