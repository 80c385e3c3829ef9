"""What every artifact says about itself, and the comparison that a reader makes before it trusts one."""

import dataclasses
from typing import Any

from pipeline.artifacts import PipelineError

TAP_CONVENTION = "id i = output of decoder layer i (0-based) before the final norm = hidden_states[i + 1]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetIdentity:
    """Which frozen model: fingerprints are sha256 of its config and of its weight files."""

    name: str
    revision: str | None
    config_fingerprint: str
    weights_fingerprint: str
    weight_precision: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextIdentity:
    """How text becomes tokens."""

    tokenizer_fingerprint: str
    chat_template_fingerprint: str
    reasoning_efforts: list[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """Which of the target's layers feed the draft."""

    tapped_layers: list[int]
    convention: str = TAP_CONVENTION


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftIdentity:
    """What the draft is: block, mask token, sizes and RoPE."""

    block_size: int
    mask_token_id: int
    architecture: dict[str, Any]
    rope: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """`contract.json`. A part that a stage has not decided yet is None and compares with anything."""

    target: TargetIdentity
    text: TextIdentity
    features: FeatureIdentity | None = None
    draft: DraftIdentity | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The dictionary written to contract.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Contract":
        """The inverse of `to_json`; raises PipelineError naming unknown or missing keys."""
        try:
            return cls(
                target=TargetIdentity(**value["target"]),
                text=TextIdentity(**value["text"]),
                features=FeatureIdentity(**value["features"]) if value["features"] else None,
                draft=DraftIdentity(**value["draft"]) if value["draft"] else None,
                provenance=value["provenance"],
            )
        except (KeyError, TypeError) as error:
            raise PipelineError(
                f"contract.json is not one this version writes ({error}); make the artifact again with this version"
            ) from error


def differences(found: Contract, wanted: Contract) -> list[str]:
    """Every field in which two contracts disagree, as `field: found ..., wanted ...`; provenance aside."""
    left, right = (_flatten(contract.to_json()) for contract in (found, wanted))
    undecided = {key for flat in (left, right) for key, value in flat.items() if value is None}
    lines = []
    for key in sorted(left.keys() | right.keys()):
        if key in undecided or any(key.startswith(f"{parent}.") for parent in undecided):
            continue
        if left.get(key) != right.get(key):
            lines.append(f"{key}: found {left.get(key)!r}, wanted {right.get(key)!r}")
    return lines


def require_match(found: Contract, wanted: Contract, *, what: str, mend: str) -> None:
    """Raise one PipelineError listing all differences between what an artifact says and what is wanted."""
    lines = differences(found, wanted)
    if lines:
        listed = "\n  ".join(lines)
        raise PipelineError(f"{what} does not fit: {len(lines)} field(s) of its contract differ\n  {listed}\n{mend}")


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, item in value.items():
        if not prefix and key == "provenance":
            continue
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            flat |= _flatten(item, f"{name}.")
        else:
            flat[name] = item
    return flat
