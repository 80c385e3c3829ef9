"""Describes what an artifact was made for, and compares that before a reader uses one."""

import dataclasses
from typing import Any

from pipeline.artifacts.hashing import flatten
from pipeline.errors import PipelineError

TAP_CONVENTION = "id i = output of decoder layer i (0-based) before the final norm = hidden_states[i + 1]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetIdentity:
    """Identifies the frozen model: fingerprints are sha256 of its config and of its weight files."""

    name: str
    revision: str | None
    config_fingerprint: str
    weights_fingerprint: str
    weight_precision: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextIdentity:
    """Identifies how text becomes tokens, and which end an answer; old contracts have no `stop_token_ids`."""

    tokenizer_fingerprint: str
    chat_template_fingerprint: str
    reasoning_efforts: list[str] | None = None
    stop_token_ids: list[int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """Identifies the target's layers that feed the draft."""

    tapped_layers: list[int]
    convention: str = TAP_CONVENTION


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftIdentity:
    """Identifies the draft: block size, mask token, sizes and RoPE."""

    block_size: int
    mask_token_id: int
    architecture: dict[str, Any]
    rope: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """Holds the contents of `contract.json`. A part that is not decided yet is None and compares with anything."""

    target: TargetIdentity
    text: TextIdentity
    features: FeatureIdentity | None = None
    draft: DraftIdentity | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the dictionary written to contract.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Contract":
        """Inverts `to_json`; raises PipelineError naming unknown or missing keys."""
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
    """Returns every field in which two contracts disagree, as `field: found ..., wanted ...`; provenance aside."""
    left, right = (flatten({**contract.to_json(), "provenance": None}) for contract in (found, wanted))
    undecided = {key for flat in (left, right) for key, value in flat.items() if value is None}
    lines = []
    for key in sorted(left.keys() | right.keys()):
        if key in undecided or any(key.startswith(f"{parent}.") for parent in undecided):
            continue
        if left.get(key) != right.get(key):
            lines.append(f"{key}: found {left.get(key)!r}, wanted {right.get(key)!r}")
    return lines


def require_match(found: Contract, wanted: Contract, *, what: str, mend: str) -> None:
    """Raises one PipelineError that lists all differences between an artifact's contract and the one wanted."""
    lines = differences(found, wanted)
    if lines:
        listed = "\n  ".join(lines)
        raise PipelineError(f"{what} does not fit: {len(lines)} field(s) of its contract differ\n  {listed}\n{mend}")
