"""What a draft costs before it saves anything, and what a million tokens cost with and without it."""

import dataclasses

from pipeline.cost import train_flops
from pipeline.feasibility.step_times import Hardware
from pipeline.model.dflash.config import DFlashConfig
from pipeline.store.layout import CacheLayout

HOUR, MILLION = 3600.0, 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Holds how much text a draft is trained on: prompts, and tokens of each and of its answer."""

    num_prompts: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def num_tokens(self) -> int:
        """The tokens of all prompts and answers."""
        return self.num_prompts * (self.prompt_tokens + self.answer_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bill:
    """Holds what making a draft takes: bytes of features on disk, hours of answering and of training."""

    cache_bytes: int
    cache_hours: float
    train_hours: float

    def cost(self, price_per_hour: float) -> float:
        """Returns the money of all devices together, at the price of all of them."""
        return (self.cache_hours + self.train_hours) * price_per_hour


def bill(
    draft: DFlashConfig,
    texts: Texts,
    layout: CacheLayout,
    machine: Hardware,
    *,
    plain_tokens_per_second: float,
    num_steps: int,
    batch_sequences: int,
    anchors: int,
) -> Bill:
    """Returns the bill; answers are written plainly at this speed, and training reaches `peak_share` of the peak."""
    positions = texts.prompt_tokens + texts.answer_tokens
    flops = train_flops.step_flops(
        draft,
        num_sequences=float(batch_sequences),
        num_positions=float(positions),
        num_anchors=anchors,
        context_tokens=positions / 2,
    )
    peak = machine.peak_share * machine.num_devices * machine.chip.flops_per_second
    return Bill(
        cache_bytes=texts.num_tokens * layout.token_bytes,
        cache_hours=texts.num_prompts * texts.answer_tokens / plain_tokens_per_second / HOUR,
        train_hours=num_steps * flops / peak / HOUR,
    )


def cost_per_million(price_per_hour: float, tokens_per_second: float) -> float:
    """Returns the money that a million tokens cost at a speed."""
    return price_per_hour / HOUR / tokens_per_second * MILLION
