"""The DFLASH runtime: batched decoding, greedy or sampled, plain or with a draft, requests coming and going."""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from pipeline.artifacts import PipelineError
from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance
from pipeline.model.draft import DraftConfig, DraftWeights
from pipeline.model.execution import PLAIN, Execution
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights
from pipeline.model.sampling import Sampling
from pipeline.serve import compiled, programs
from pipeline.serve.programs import Chunk
from pipeline.serve.scheduler import Request, Scheduler

PREFILL_ROWS = 8  # prompts a prefill program runs side by side, at most


def rows_of_shard(slots: int) -> int:
    """Prompts that a shard of `slots` slots prefills side by side."""
    return min(slots, PREFILL_ROWS)


def num_positions(max_length: int, prefill_chunk: int, block_size: int) -> int:
    """Positions of a slot whose requests have at most `max_length`: a write never passes the end of a row."""
    return max_length + max(prefill_chunk, block_size)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A draft to decode with."""

    weights: DraftWeights
    config: DraftConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """What one step gave one request. `kept` is the round's kept count; None for prefill and plain steps."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    kept: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """A request's whole answer; `kept` has one entry per DFLASH round."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str
    kept: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """Where an engine's time went. A prompt's first token counts to prefill."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


class Engine:
    """Decoding over a fixed number of slots; owned by one thread.

    `max_length` bounds prompt plus generated tokens of a request; prompts run in chunks of `prefill_chunk`.
    A generation ends with a token of `stop_token_ids` (included in the answer) or at its length. With a
    draft, each step is one DFLASH round; without one, one token. Without `sampling` tokens are the most likely ones;
    with it they are drawn, and depend on a request's key and prompt, not on what runs beside it. With a `mesh`,
    weights lie where `placement.places` says, and every process of a mesh over several hosts drives an engine alike.
    """

    def __init__(
        self,
        target_weights: GptOssWeights,
        target_config: GptOssConfig,
        *,
        stop_token_ids: Sequence[int],
        slots: int,
        max_length: int,
        prefill_chunk: int,
        draft: Draft | None = None,
        sampling: Sampling | None = None,
        run: Execution = PLAIN,
        mesh: Mesh | None = None,
    ) -> None:
        if sampling is not None and draft is not None:
            raise PipelineError(
                f"the engine was given a draft and a temperature of {sampling.temperature}; with a draft decoding is "
                "greedy: leave either out"
            )
        if sampling is not None and not (sampling.temperature > 0 and 0 < sampling.top_p <= 1):
            raise PipelineError(f"{sampling}; temperature must be positive, top_p above 0 and at most 1")
        if max_length > target_config.max_position_embeddings:
            raise PipelineError(
                f"max_length is {max_length}; the target has {target_config.max_position_embeddings} positions"
            )
        if slots % run.shards.data:
            raise PipelineError(f"the engine has {slots} slots for mesh.data={run.shards.data}; make it a multiple")
        self._weights, self._config, self._draft = target_weights, target_config, draft
        self._draft_weights = None if draft is None else draft.weights
        self._draft_config = None if draft is None else draft.config
        self._sampling = sampling
        self._stops = frozenset(stop_token_ids)
        self._stop_ids = np.asarray(sorted(self._stops), dtype=np.int32)
        self._chunk = prefill_chunk
        self._slots_of_shard = slots // run.shards.data
        self._rows_of_shard = rows_of_shard(self._slots_of_shard)
        self._num_shards = run.shards.data
        self._scheduler = Scheduler(slots)
        self.slots = slots
        self.max_length = max_length
        self.block_size = None if draft is None else draft.config.block_size
        self.acceptance = acceptance.empty(self.block_size or 1)
        self.clock = Clock()
        positions = num_positions(max_length, prefill_chunk, self.block_size or 1)
        dtype = target_weights.embedding.dtype
        self._state = compiled.new_state(
            lambda: programs.empty_state(target_config, self._draft_config, slots, positions, dtype, sampling),
            mesh,
            target_weights,
        )
        if mesh is None:
            self._programs = compiled.on_one_device(target_config, self._draft_config, run, sampling)
        else:
            self._programs = compiled.on_mesh(
                target_config, self._draft_config, run, mesh, target_weights, self._draft_weights, self._state, sampling
            )

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._scheduler.running) or self._scheduler.num_waiting > 0

    @property
    def num_waiting(self) -> int:
        """Requests without a slot yet."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._scheduler.running)

    def check(self, request: Request) -> None:
        """Raise PipelineError when a request cannot be run: empty, too long, not the target's tokens, or no key."""
        prompt, new = len(request.prompt_ids), request.max_new_tokens
        if prompt == 0 or new < 1:
            raise PipelineError(f"prompt has {prompt} tokens and max_new_tokens is {new}; both must be at least 1")
        if prompt + new > self.max_length:
            raise PipelineError(
                f"prompt has {prompt} tokens and {new} more are wanted, {prompt + new} in all; the engine holds "
                f"{self.max_length}: shorten either, or raise its max_length"
            )
        vocab_size = self._config.vocab_size
        outside = [token for token in request.prompt_ids if not 0 <= token < vocab_size]
        if outside:
            raise PipelineError(f"prompt has token ids {outside[:5]}; the target knows 0..{vocab_size - 1}")
        if (request.key is None) != (self._sampling is None):
            found, wanted = ("no key", "samples") if request.key is None else ("a key", "decodes greedily")
            raise PipelineError(f"request {request.request_id!r} has {found}; the engine {wanted}")
        if self._scheduler.knows(request.request_id):
            raise PipelineError(f"request id {request.request_id!r} is already in use")

    def add(self, request: Request) -> None:
        """Queue a request; raises PipelineError as `check` does."""
        self.check(request)
        self._scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request, waiting or running; unknown ids are no error (it may just have finished)."""
        slot = self._scheduler.drop(request_id)
        if slot is not None:
            state = self._state
            self._state = dataclasses.replace(state, active=state.active.at[slot].set(False))

    def step(self) -> list[Update]:
        """Prefill what has just found a slot, then run one round; returns what every request got."""
        updates = []
        waiting = admitted = self._scheduler.admit()
        started = time.perf_counter()
        while waiting:
            group, waiting = self._next_group(waiting)
            updates += self._prefill(group)
        prefilled = time.perf_counter()
        rounds = self._decode() if self._scheduler.running else []
        clock = self.clock
        self.clock = Clock(
            prefill_tokens=clock.prefill_tokens + sum(len(request.prompt_ids) for _, request in admitted),
            prefill_seconds=clock.prefill_seconds + prefilled - started,
            decode_tokens=clock.decode_tokens + sum(len(update.token_ids) for update in rounds),
            decode_seconds=clock.decode_seconds + time.perf_counter() - prefilled,
        )
        return updates + rounds

    def warm_up(self) -> None:
        """Compile every program, with one request that leaves no trace in the counters."""
        before = self.acceptance, self.clock
        key = None if self._sampling is None else (0, 0)
        list(self.generate([Request(request_id="warm-up", prompt_ids=(0,), max_new_tokens=2, key=key)]))
        self._decode()  # a first token that stops the generation would leave this one for the first request
        self.acceptance, self.clock = before

    def generate(self, requests: Iterable[Request]) -> Iterator[Finished]:
        """Run requests through the slots, yielding each as it finishes."""
        source = iter(requests)
        tokens: dict[str, list[int]] = {}
        kept: dict[str, list[int]] = {}
        while True:
            room = self.slots - self.num_running - self.num_waiting
            for request in itertools.islice(source, max(room, 0)):
                self.add(request)
                tokens[request.request_id], kept[request.request_id] = [], []
            if not self.has_work:
                return
            for update in self.step():
                tokens[update.request_id] += update.token_ids
                if update.kept is not None:
                    kept[update.request_id].append(update.kept)
                if update.finish_reason is not None:
                    yield Finished(
                        request_id=update.request_id,
                        token_ids=tuple(tokens.pop(update.request_id)),
                        finish_reason=update.finish_reason,
                        kept=tuple(kept.pop(update.request_id)),
                    )

    def _next_group(
        self, admitted: Sequence[tuple[int, Request]]
    ) -> tuple[dict[int, tuple[int, Request]], list[tuple[int, Request]]]:
        """Requests that are prefilled together, by their place in the program, and those left over.

        Each shard has places for its own slots.
        """
        group: dict[int, tuple[int, Request]] = {}
        left = []
        for slot, request in admitted:
            first = slot // self._slots_of_shard * self._rows_of_shard
            free = next((place for place in range(first, first + self._rows_of_shard) if place not in group), None)
            if free is None:
                left.append((slot, request))
            else:
                group[free] = (slot, request)
        return group, left

    def _prefill(self, group: dict[int, tuple[int, Request]]) -> list[Update]:
        updates = []
        longest = max(len(request.prompt_ids) for _, request in group.values())
        for start in range(0, longest, self._chunk):
            chunk = self._chunk_of(group, start)
            self._state, given = self._programs.prefill(
                self._weights, self._draft_weights, self._state, chunk, self._stop_ids
            )
            if chunk.is_last.any():
                updates += self._collect(given, {place: slot for place, (slot, _) in group.items()}, False)
        return updates

    def _chunk_of(self, group: dict[int, tuple[int, Request]], start: int) -> Chunk:
        places = self._num_shards * self._rows_of_shard
        chunk = Chunk(
            rows=np.full(places, self._slots_of_shard, np.int32),  # past the last slot: dropped
            token_ids=np.zeros((places, self._chunk), np.int32),
            start=np.full(places, start, np.int32),
            num_tokens=np.ones(places, np.int32),
            budget=np.zeros(places, np.int32),
            is_last=np.zeros(places, bool),
            keys=None if self._sampling is None else np.zeros((places, 2), np.uint32),
        )
        for place, (slot, request) in group.items():
            part = request.prompt_ids[start : start + self._chunk]
            if part:
                chunk.rows[place] = slot % self._slots_of_shard
                chunk.token_ids[place, : len(part)] = part
                chunk.num_tokens[place] = len(part)
                chunk.budget[place] = request.max_new_tokens
                chunk.is_last[place] = start + self._chunk >= len(request.prompt_ids)
                if chunk.keys is not None:
                    chunk.keys[place] = request.key
        return chunk

    def _decode(self) -> list[Update]:
        if self._draft is None:
            self._state, given = self._programs.plain_step(self._weights, self._state, self._stop_ids)
        else:
            self._state, given = self._programs.dflash_round(
                self._weights, self._draft_weights, self._state, self._stop_ids
            )
        return self._collect(given, {slot: slot for slot in self._scheduler.running}, self._draft is not None)

    def _collect(self, given: programs.Yield, slot_of_row: dict[int, int], is_round: bool) -> list[Update]:
        tokens, counts, finished = jax.device_get((given.token_ids, given.num_tokens, given.finished))
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
            kept = count - 1 if is_round else None
            updates.append(Update(request_id=request.request_id, token_ids=new, finish_reason=reason, kept=kept))
        rounds = [update.kept for update in updates if update.kept is not None]
        if rounds:
            self.acceptance += Acceptance.of(rounds, self.block_size)
        return updates
