"""The decoding loop: batched, plain or with a draft; requests come and go between steps.

A step is dispatched before the one before it is read, so that the devices never wait for the host: what decides whether
a request goes on (stop tokens, budgets) is on the devices already. The host knows a request's tokens one step late, and
takes pages for as many as the steps under way may commit.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine import compiled_steps, log_probs
from pipeline.engine.block_choice import BlockChoice, Estimate
from pipeline.engine.config import EngineConfig
from pipeline.engine.in_flight import Dispatched, EngineTimes, InFlight
from pipeline.engine.layout import rows_of_shard
from pipeline.engine.page_pool import Key, keys_of
from pipeline.engine.request import Completion, Request, StepUpdate, TokenLogProb
from pipeline.engine.request_check import require_runnable
from pipeline.engine.row_pages import RowPages
from pipeline.engine.sampling_params import GREEDY, SamplingParams, history_of, set_row
from pipeline.engine.scheduler import NoRoom, Running, Scheduler
from pipeline.engine.state import DEFERRED_STEPS, PrefillChunk, StepOutput, block_sizes_of, layout_of
from pipeline.engine.step_rows import StepRows, rows_for
from pipeline.engine.token_masks import fill_masks
from pipeline.errors import PipelineError
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers.kv_pages import NOWHERE, PageTables
from pipeline.model.layers.token_rules import greedy_rules
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
        self._greedy = jax.tree.map(np.asarray, greedy_rules(1))
        self._scheduler = Scheduler(config.num_slots)
        self._layout = layout_of(target, draft, config, num_shards)
        self._pages = [
            RowPages(self._layout, self._slots_of_shard, reuse=config.reuse_prefixes) for _ in range(num_shards)
        ]
        self.block_size = None if draft is None else draft.config.block_size
        counts = {count for count in config.row_counts if count < self._slots_of_shard} | {self._slots_of_shard}
        self._choices = {count: BlockChoice(block_sizes_of(draft, config)) for count in sorted(counts)}
        self._last_count = self._slots_of_shard  # rows of a shard in the last step that decoded
        self._num_deferred = 0
        self._has_masks = False  # on the devices, from a step before
        self.acceptance = acceptance.empty(self.block_size or 1)
        self.smaller_blocks: dict[int, Acceptance] = {}
        self.times = EngineTimes()
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
        return self._layout.num_pages * self._num_shards

    @property
    def num_free_pages(self) -> int:
        """The number of pages that no request uses, of layers that see everything."""
        return sum(pages.num_available for pages in self._pages)

    @property
    def block_estimates(self) -> dict[int, Estimate]:
        """What a round of each block size is expected to yield and to take; empty where nothing is chosen.

        Times are those of as many rows as the last round had.
        """
        choice = self._choices[self._last_count]
        return choice.estimates() if len(choice.sizes) > 1 else {}

    def plain_beside(self) -> "Engine":
        """Returns an engine of the same target without a draft, with slots and pages of its own."""
        return Engine(self._target, None, dataclasses.replace(self.config, block_sizes=()), self._runtime)

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
            self._scheduler.add(request, [] if is_scored else self._keys_of(request.prompt_ids))

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
        before = self.acceptance, self.smaller_blocks, self.times
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
        for count, choice in self._choices.items():
            rows = rows_for({}, [count], self._slots_of_shard, self._num_shards)
            self._choices[count] = BlockChoice(choice.sizes)
            for size in choice.sizes:
                self._warm_up_round(rows, size)
                name = f"a round of {size}" if size > 1 else "a plain step"
                on_compiled(f"{name}, {count} of {self._slots_of_shard} slots")
        self.acceptance, self.smaller_blocks, self.times = before

    def _warm_up_round(self, rows: StepRows, size: int) -> None:
        """Compiles a round with so many rows and a block size, where none has run yet, and takes its time."""
        jax.block_until_ready(self._dispatch_round(rows, size))
        if self.config.samples and 1 < size == self._choices[rows.count].sizes[-1]:
            jax.block_until_ready(self._verify(rows, self._drafted(rows, size)))
        for _ in range(3):
            started = time.perf_counter()
            jax.block_until_ready(self._dispatch_round(rows, size))
            self._choices[rows.count].took(size, time.perf_counter() - started)

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
        self._state, output = step(self._target, self._draft, self._state, self._tables(rows), rows.indices)
        return output

    def _extend_context(self, rows: StepRows) -> None:
        self._state = self._steps.extend_context(self._draft, self._state, self._tables(rows), rows.indices)
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
        draft_apart, tables = self._steps.draft_apart(size), self._tables(rows)
        return np.array(draft_apart(self._target, self._draft, self._state, tables, rows.indices))

    def _verify(self, rows: StepRows, drafted: np.ndarray) -> StepOutput:
        self._state, output = self._steps.verify_apart(
            self._target, self._draft, self._state, self._tables(rows), rows.indices, drafted
        )
        return output

    def _set_masks(self, constrained: Mapping[int, Running], drafted: Mapping[int, np.ndarray] | None = None) -> None:
        """Says which tokens may follow in the next step, and changes those drafted where that is known (by slots)."""
        length = self.block_size or 1
        masks = fill_masks(constrained, drafted or {}, self.config.num_slots, length, self.vocab_size)
        self._state = self._steps.set_masks(self._state, *masks)
        self._has_masks = bool(constrained)

    def _keys_of(self, tokens: Sequence[int], before: Sequence[Key] = ()) -> list[Key]:
        return keys_of(tokens, self.config.page_size, before) if self.config.reuse_prefixes else []

    def _slot_for(self, one: Running, free: Sequence[int]) -> int | None:
        """Chooses a free slot for a request and opens its row: where most of its pages are, or most are free.

        Returns None while another request computes pages that this one can share, and raises NoRoom.
        """
        count = one.num_to_prefill
        found = []
        for shard in sorted({slot // self._slots_of_shard for slot in free}):
            pages = self._pages[shard]
            reusable = pages.num_reusable(one.keys, count)
            if pages.is_coming(one.keys[: (count - 1) // self.config.page_size], reusable):
                return None
            if pages.can_open(reusable, one.keys, count):
                found.append((reusable, pages.num_available, shard))
        if not found:
            raise NoRoom
        reusable, _, shard = max(found, key=lambda each: each[:2])
        slot = next(slot for slot in reversed(free) if slot // self._slots_of_shard == shard)
        reused = self._pages[shard].open(slot % self._slots_of_shard, reusable, one.keys, count)
        one.num_prefilled = reused
        if not one.num_generated:
            one.num_reused = reused
        if one.request.sampling.is_penalised:
            self._set_history(one, slot)
        self.times = dataclasses.replace(self.times, reused_tokens=self.times.reused_tokens + reused)
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
        chunk = self._chunk_of(rows, height)
        ending = {one.slot: one for row, one in rows.items() if chunk.is_last[row] and one.constraint is not None}
        if ending or self._has_masks:
            self._set_masks(ending)
        self._state, output = self._steps.prefill(self._target, self._draft, self._state, chunk)
        for row, one in rows.items():
            one.num_prefilled += int(chunk.num_tokens[row])
            one.last_prefill = self._num_steps
            one.is_decoding = bool(chunk.is_last[row])
            self._pages_of(one).commit(self._row_of(one), one.tokens, one.num_prefilled)
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
            rows = rows_for(by_slot, tuple(self._choices), self._slots_of_shard, self._num_shards)
            size = size or self._choose_size(rows, any(one.constraint is not None for one in by_slot.values()))
            if all(self._grow(one, size) for one in by_slot.values()):
                break
            if self._in_flight:
                self._read(0)
            else:
                self._preempt()
        constrained = {slot: one for slot, one in by_slot.items() if one.constraint is not None}
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

    def _choose_size(self, rows: StepRows, is_constrained: bool) -> int:
        self._last_count = rows.count
        choice = self._choices[rows.count]
        size = choice.choose()
        return choice.sizes[-1] if is_constrained and size > 1 else size  # of which draft and verification run apart

    def _grow(self, one: Running, size: int) -> bool:
        """Takes pages for what the next round may commit; returns False when there are too few."""
        prompt = len(one.request.prompt_ids)
        most = max(prompt, len(one.tokens) - 1) + one.tokens_ahead + size
        return self._pages_of(one).grow(self._row_of(one), min(most, prompt + one.request.max_new_tokens))

    def _preempt(self) -> None:
        """Takes the slot of the request that arrived last; what is under way must have been read."""
        one = self._scheduler.youngest()
        self._scheduler.preempt(one, self._keys_of(one.tokens, one.keys))
        self._stop_slot(one.slot)
        self.num_preempted += 1

    def _stop_slot(self, slot: int) -> None:
        """Lets a slot's request run no further, and gives back its pages.

        Steps that are under way still write to them, but only behind what is committed, and before any later step.
        """
        self._state = dataclasses.replace(self._state, active=self._state.active.at[slot].set(False))
        self._pages[slot // self._slots_of_shard].close(slot % self._slots_of_shard)

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
            self._count(step, num_tokens, accepted, seconds, waited)

    def _update(self, one: Running, output: StepOutput, row_of_output: int, size: int | None) -> None:
        """Adds a row's tokens to what is known of a request, and ends it when they are its last ones."""
        new = tuple(output.token_ids[row_of_output, : output.num_tokens[row_of_output]].tolist())
        one.tokens += new
        if one.constraint is not None:
            one.constraint.advance(new)
        pages, row = self._pages_of(one), self._row_of(one)
        pages.commit(row, one.tokens, len(one.tokens) - 1, num_pending=self._num_deferred)
        reason = None
        if output.finished[row_of_output]:
            reason = "stop" if new[-1] in self._stops_of(one) else "length"
            self._scheduler.release(one.slot)
            pages.close(row)
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

    def _count(self, step: Dispatched, num_tokens: int, accepted: list[int], seconds: float, waited: float) -> None:
        times, size, wait_seconds = self.times, step.block_size, self.times.wait_seconds + waited
        if size is None:
            self.times = dataclasses.replace(
                times,
                prefill_tokens=times.prefill_tokens + sum(step.num_columns.values()),
                prefill_seconds=times.prefill_seconds + seconds,
                wait_seconds=wait_seconds,
            )
            return
        self.times = dataclasses.replace(
            times,
            decode_tokens=times.decode_tokens + num_tokens,
            decode_seconds=times.decode_seconds + seconds,
            wait_seconds=wait_seconds,
        )
        if not accepted:
            return
        if not step.is_masked:
            self._choices[step.num_rows].took(size, seconds)
        for choice in self._choices.values():
            choice.accepted(size, accepted)
        if size == self.block_size:
            self.acceptance += Acceptance.of(accepted, size)
        elif size > 1:
            before = self.smaller_blocks.get(size, acceptance.empty(size))
            self.smaller_blocks = {**self.smaller_blocks, size: before + Acceptance.of(accepted, size)}

    def _chunk_of(self, by_row: dict[int, Running], height: int) -> PrefillChunk:
        """Returns the next tokens of the requests in these rows; each shard has `height` rows, for its own slots."""
        rows, columns = self._num_shards * height, self.config.prefill_chunk
        full: Callable[..., Any] = np.full  # a jitted step takes NumPy's arrays as it takes JAX's
        tables = np.full((2, rows, self._layout.pages_of_row), NOWHERE, np.int32)
        chunk = PrefillChunk(
            rows=full(rows, self._slots_of_shard, np.int32),  # past the last slot: dropped
            token_ids=full((rows, columns), 0, np.int32),
            start=full(rows, 0, np.int32),
            num_tokens=full(rows, 1, np.int32),
            budget=full(rows, 0, np.int32),
            is_last=full(rows, False, bool),
            first_ids=full(rows, -1, np.int32),
            following=full((rows, columns), 0, np.int32),
            scored=full(rows, False, bool),
            tables=PageTables(*tables),
            rules=jax.tree.map(lambda one: np.repeat(one, rows, axis=0), self._greedy),
        )
        for row, one in by_row.items():
            start, slot = one.num_prefilled, self._row_of(one)
            part = one.tokens[start : min(start + columns, one.num_to_prefill)]
            grown = self._pages_of(one).grow(slot, start + len(part))
            assert grown, "a prompt's pages are taken when it gets its slot"
            chunk.rows[row] = slot
            chunk.token_ids[row, : len(part)] = part
            chunk.start[row] = start
            chunk.num_tokens[row] = len(part)
            chunk.budget[row] = one.request.max_new_tokens - max(one.num_generated - 1, 0)
            chunk.is_last[row] = start + len(part) == one.num_to_prefill
            chunk.first_ids[row] = self._first_id(one)
            if one.request.sampling.prompt_logprobs is not None:
                behind = one.tokens[start + 1 : start + 1 + len(part)]
                chunk.following[row, : len(behind)] = behind
                chunk.scored[row] = True
            tables[:, row] = self._pages_of(one).row_tables(slot)
            set_row(chunk.rules, row, one.request.sampling, self._stops_of(one), len(one.request.prompt_ids))
        return chunk

    def _tables(self, rows: StepRows) -> PageTables:
        tables = [pages.tables() for pages in self._pages]
        if rows.indices is not None:
            parts = rows.indices.reshape(self._num_shards, -1)
            tables = [
                np.take(table, part, axis=1, mode="clip") for table, part in zip(tables, parts, strict=True)
            ]  # a row past the last slot is not active
        return PageTables(*(tables[0] if len(tables) == 1 else np.concatenate(tables, axis=1)))

    def _stops_of(self, one: Running) -> tuple[int, ...]:
        wanted = one.request.sampling.stop_token_ids
        return self.config.stop_token_ids if wanted is None else wanted

    def _pages_of(self, one: Running) -> RowPages:
        return self._pages[one.slot // self._slots_of_shard]

    def _row_of(self, one: Running) -> int:
        return one.slot % self._slots_of_shard


def _require_fitting(target: TargetModel, config: EngineConfig, num_shards: int) -> None:
    positions = target.config.max_position_embeddings
    if config.max_length > positions:
        raise PipelineError(f"max_length is {config.max_length}; the target has {positions} positions")
    if config.num_slots % num_shards:
        raise PipelineError(f"the engine has {config.num_slots} slots for mesh.data={num_shards}; make it a multiple")
