"""How long a plain step, a draft pass and the verification of a block take, and what speedup follows from that.

Of a chip's roofline a pass takes the longer of reading what it needs and of its products, at the shares of bandwidth
and of peak that kernels reach. Experts are the difference between verifying a block and decoding a token: a block's
tokens hit more of them, but neighbours often choose the same ones. `agreement` is the share of tokens that add none: of
a block of B tokens, 1 + (B - 1)(1 - agreement) choose as if they chose at random. Where real texts are at hand, what
they choose is counted instead (`ExpertTraffic`).
"""

import dataclasses
from collections.abc import Sequence

from pipeline.cost import memory_traffic
from pipeline.cost.chips import Chip
from pipeline.feasibility.expert_traffic import ExpertTraffic
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.gpt_oss.config import GptOssConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Holds the seconds of a plain step and of a round's parts, at a number of requests at once and a block size.

    `host` is added to either by the program around the devices.
    """

    concurrency: int
    block_size: int
    plain: float
    draft: float
    verify: float
    host: float = 0.0

    @property
    def round(self) -> float:
        """The seconds of a round."""
        return self.draft + self.verify + self.host

    @property
    def break_even(self) -> float:
        """The accept_length with which decoding is as fast as plainly: a round's time in plain steps."""
        return self.round / (self.plain + self.host)

    def speedup(self, accept_length: float) -> float:
        """Returns the speedup with an accept_length."""
        return accept_length / self.break_even

    @property
    def largest_speedup(self) -> float:
        """The speedup of a draft of which every token is accepted."""
        return self.speedup(float(self.block_size))

    def tokens_per_second(self, accept_length: float | None = None) -> float:
        """Returns the tokens of all requests together, plainly or with an accept_length."""
        if accept_length is None:
            return self.concurrency / (self.plain + self.host)
        return self.concurrency * accept_length / self.round


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """Holds what passes run on: so many of a chip, of which kernels reach these shares of bandwidth and of peak.

    `agreement` is described above; `host_seconds` are added to every step and round.
    """

    chip: Chip
    num_devices: int
    bandwidth_share: float
    peak_share: float
    agreement: float
    host_seconds: float = 0.0


def modelled_experts(target: GptOssConfig, concurrency: int, block: int, agreement: float) -> float:
    """Returns how many experts of a layer so many blocks choose, at an agreement as above."""
    return memory_traffic.experts_hit(target, concurrency * (1 + (block - 1) * (1 - agreement)))


def from_roofline(
    target: GptOssConfig,
    draft: DFlashConfig,
    machine: Hardware,
    *,
    concurrency: int,
    context: int,
    packed: bool,
    traffic: ExpertTraffic | None = None,
) -> StepTimes:
    """Returns the times of a roofline, for a draft of its block size; experts are counted where `traffic` has them."""
    block = draft.block_size

    def experts(tokens: int) -> float:
        if traffic is not None:
            return traffic.distinct(concurrency, tokens)
        return modelled_experts(target, concurrency, tokens, machine.agreement)

    def target_pass(tokens: int) -> float:
        read = memory_traffic.target_bytes(target, concurrency, 1, context, packed=packed)
        more = experts(tokens) - memory_traffic.experts_hit(target, concurrency)
        read += target.num_hidden_layers * more * memory_traffic.expert_bytes(target, packed=packed)
        return _pass(machine, read, memory_traffic.target_flops(target, concurrency * tokens, context))

    drafted = memory_traffic.draft_bytes(draft, concurrency, context)
    return StepTimes(
        concurrency=concurrency,
        block_size=block,
        plain=target_pass(1),
        draft=_pass(machine, drafted, memory_traffic.draft_flops(draft, concurrency, context)),
        verify=target_pass(block),
        host=machine.host_seconds,
    )


def accept_length_of_rate(rate: float, block_size: int) -> float:
    """Returns accept_length where every drafted token is accepted with the same probability, if those before it were.

    It is what compares block sizes: 1 + rate + rate^2 + ... + rate^(K-1).
    """
    return sum(rate**k for k in range(block_size))


def best_block_size(times: Sequence[StepTimes], rate: float) -> StepTimes:
    """Returns the times of the block size with the largest speedup, at a rate as above."""
    return max(times, key=lambda one: one.speedup(accept_length_of_rate(rate, one.block_size)))


def _pass(machine: Hardware, read: float, flops: float) -> float:
    chip, count = machine.chip, machine.num_devices
    return max(
        read / (count * machine.bandwidth_share * chip.bytes_per_second),
        flops / (count * machine.peak_share * chip.flops_per_second),
    )
