"""What compiling a program told: whether it fits, what it costs, what its devices exchange, what is wrong with it."""

import dataclasses
import re
from collections.abc import Sequence

from pipeline.compile.hlo import Collective, Instruction, Program
from pipeline.cost.chips import GIB, Chip
from pipeline.model.gpt_oss.experts_pallas import HIT_EXPERTS
from pipeline.progress import MIB

COPIED_BYTES = MIB  # smaller copies are told by nobody
_EXPERTS = re.compile(r"\.experts\.(gate|up|down)(\.|$)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one run on one device, as the compiler counts: a loop's body once, experts as if all that can be were hit.

    `seconds` is the compiler's own estimate, None where it gives none. `floor_seconds` is what reading the weights
    and caches that the step needs, or multiplying, takes on this chip at the least.
    """

    flops: float
    bytes: float
    seconds: float | None
    floor_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """One program. Bytes are per device; `problems` is empty when all is well."""

    name: str
    seconds_to_compile: float
    argument_bytes: int = 0
    temporary_bytes: int = 0
    costs: Costs | None = None
    copied_bytes: int = 0
    collectives: tuple[Collective, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def hbm_bytes(self) -> int:
        """All that the program needs at once."""
        return self.argument_bytes + self.temporary_bytes


def gathered_caches(program: Program, cache_lengths: Sequence[int], head_dim: int) -> list[str]:
    """Every exchange of something as long as a cache: keys and values never leave their device."""
    return [
        f"a key/value cache is exchanged: {one.kind} of {one.shape.kind}{list(one.shape.sizes)}"
        for one in program.collectives()
        if head_dim in one.shape.sizes and set(cache_lengths) & set(one.shape.sizes)
    ]


def experts_read_whole(program: Program) -> list[str]:
    """Every expert matrix that something else reads than the kernel that reads those that are hit."""
    wrong = []
    for parameter in program.parameters():
        if not _EXPERTS.search(parameter.op_name):
            continue
        others = [one for one in program.readers(parameter.name) if not _is_kernel(one)]
        wrong += [
            f"experts that are not hit are read: {parameter.op_name} by {one.opcode} {one.name}" for one in others
        ]
    return wrong


def copied_bytes(program: Program) -> int:
    """Bytes of all copies and transpositions within HBM of at least COPIED_BYTES; fetching ahead is none."""
    copies = [
        one.shapes[0].num_bytes
        for instructions in program.computations.values()
        for one in instructions
        if one.opcode in ("copy", "copy-start", "transpose") and not one.is_near
    ]
    return sum(size for size in copies if size >= COPIED_BYTES)


def does_not_fit(told: ProgramReport, chip: Chip) -> list[str]:
    """Whether a program needs more memory than the chip has."""
    if told.hbm_bytes <= chip.hbm_bytes:
        return []
    return [
        f"does not fit: {told.argument_bytes / GIB:.2f} GiB of arguments and {told.temporary_bytes / GIB:.2f} GiB of "
        f"temporaries, the chip has {chip.hbm_bytes / GIB:.0f} GiB"
    ]


def program_table(all_told: Sequence[ProgramReport], chip: Chip) -> str:
    """One line a program, its exchanges below it, problems last."""
    head = (
        "program",
        "compiled in",
        "arguments",
        "temporaries",
        "of HBM",
        "flops",
        "bytes",
        "copies",
        "estimate",
        "floor",
    )
    rows = [head, *(_row(one, chip) for one in all_told)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    for one in all_told:
        lines.append(f"{one.name}: {_exchanged(one)}")
        lines += [f"  PROBLEM: {problem}" for problem in one.problems]
    return "\n".join(lines)


def _row(told: ProgramReport, chip: Chip) -> tuple[str, ...]:
    if told.costs is None:
        return (told.name, "not", *[""] * 8)
    costs = told.costs
    return (
        told.name,
        f"{told.seconds_to_compile:.0f} s",
        f"{told.argument_bytes / GIB:.2f} GiB",
        f"{told.temporary_bytes / GIB:.2f} GiB",
        f"{told.hbm_bytes / chip.hbm_bytes:.0%}",
        f"{costs.flops / 1e9:.1f} G",
        f"{costs.bytes / 1e9:.2f} GB",
        f"{told.copied_bytes / MIB:.0f} MiB",
        "-" if costs.seconds is None else f"{costs.seconds * 1e3:.2f} ms",
        f"{costs.floor_seconds * 1e3:.2f} ms",
    )


def _exchanged(told: ProgramReport) -> str:
    kinds: dict[str, list[int]] = {}
    for one in told.collectives:
        counted = kinds.setdefault(one.kind, [0, 0])
        counted[0] += one.times
        counted[1] += one.times * one.shape.num_bytes
    listed = [f"{count} {kind} ({size / 1e3:.0f} kB)" for kind, (count, size) in sorted(kinds.items())]
    return "exchanges " + (", ".join(listed) if listed else "nothing")


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and f"/{HIT_EXPERTS}/" in instruction.op_name
