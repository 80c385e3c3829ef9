"""The report on a compiled program: its memory, costs, exchanges between devices, and problems."""

import dataclasses
import re
from collections.abc import Collection, Sequence

from pipeline.compile.hlo import Collective, Instruction, Program
from pipeline.cost.chips import GIB, Chip
from pipeline.model.gpt_oss.experts_pallas import HIT_EXPERTS
from pipeline.pages.columns import columns
from pipeline.progress import MIB

COPIED_BYTES = MIB  # smaller copies are not counted
_EXPERTS = re.compile(r"\.experts\.(gate|up|down)(\.|$)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Holds the costs of a run on one device, as the compiler counts: loop bodies once, experts as if all were hit.

    `seconds` is the compiler's own estimate, None where it gives none. `floor_seconds` is the least time that reading
    the needed weights and caches, or multiplying, takes on this chip.
    """

    flops: float
    bytes: float
    seconds: float | None
    floor_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """Holds the findings about one program. Bytes are per device; `problems` is empty when there are none."""

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
        """Returns the memory that the program needs at once."""
        return self.argument_bytes + self.temporary_bytes


def gathered_caches(program: Program, num_pages: Collection[int], width: int) -> list[str]:
    """Returns a problem for every exchange of an array of so many pages: no device may send keys or values.

    `width` is that of a key with its value.
    """
    return [
        f"a key/value cache is exchanged: {one.kind} of {one.shape.kind}{list(one.shape.sizes)}"
        for one in program.collectives()
        if width in one.shape.sizes and set(num_pages) & set(one.shape.sizes)
    ]


def experts_read_whole(program: Program) -> list[str]:
    """Returns a problem for every expert matrix that is read outside of the kernel that reads only experts hit."""
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
    """Returns the bytes of copies and transpositions within HBM, each of COPIED_BYTES or more, without prefetches."""
    copies = [
        one.shapes[0].num_bytes
        for instructions in program.computations.values()
        for one in instructions
        if one.opcode in ("copy", "copy-start", "transpose") and not one.is_in_vmem
    ]
    return sum(size for size in copies if size >= COPIED_BYTES)


def does_not_fit(report: ProgramReport, chip: Chip) -> list[str]:
    """Returns a problem when a program needs more memory than the chip has, else none."""
    if report.hbm_bytes <= chip.hbm_bytes:
        return []
    return [
        f"does not fit: {report.argument_bytes / GIB:.2f} GiB of arguments and {report.temporary_bytes / GIB:.2f} GiB "
        f"of temporaries, the chip has {chip.hbm_bytes / GIB:.0f} GiB"
    ]


def program_table(reports: Sequence[ProgramReport], chip: Chip) -> str:
    """Returns the table: a line for each program, then its exchanges and its problems."""
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
    rows = [head, *(_row(one, chip) for one in reports)]
    lines = [columns(rows)]
    for one in reports:
        lines.append(f"{one.name}: {_exchanged(one)}")
        lines += [f"  PROBLEM: {problem}" for problem in one.problems]
    return "\n".join(lines)


def _row(report: ProgramReport, chip: Chip) -> tuple[str, ...]:
    if report.costs is None:
        return (report.name, "not", *[""] * 8)
    costs = report.costs
    return (
        report.name,
        f"{report.seconds_to_compile:.0f} s",
        f"{report.argument_bytes / GIB:.2f} GiB",
        f"{report.temporary_bytes / GIB:.2f} GiB",
        f"{report.hbm_bytes / chip.hbm_bytes:.0%}",
        f"{costs.flops / 1e9:.1f} G",
        f"{costs.bytes / 1e9:.2f} GB",
        f"{report.copied_bytes / MIB:.0f} MiB",
        "-" if costs.seconds is None else f"{costs.seconds * 1e3:.2f} ms",
        f"{costs.floor_seconds * 1e3:.2f} ms",
    )


def _exchanged(report: ProgramReport) -> str:
    kinds: dict[str, list[int]] = {}
    for one in report.collectives:
        counted = kinds.setdefault(one.kind, [0, 0])
        counted[0] += one.times
        counted[1] += one.times * one.shape.num_bytes
    listed = [f"{count} {kind} ({size / 1e3:.0f} kB)" for kind, (count, size) in sorted(kinds.items())]
    return "exchanges " + (", ".join(listed) if listed else "nothing")


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and f"/{HIT_EXPERTS}/" in instruction.op_name
