"""Reads a compiled program's text (XLA's HLO): instructions, exchanges between devices, and readers of parameters."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
VMEM = "S(1)"  # how a layout names a TPU's vector memory
# instructions that pass their operands on unchanged
PASSING = ("bitcast", "get-tuple-element", "opt-barrier", "tuple")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\([^{]*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LOOP = re.compile(r"condition=%([\w.-]+), body=%([\w.-]+)")
_ELEMENT = re.compile(r"index=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """Holds an array's type and sizes."""

    kind: str
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Returns the array's bytes, without padding."""
        return math.ceil(math.prod(self.sizes) * ITEM_BYTES.get(self.kind, 0))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Holds one line of a program: the arrays it makes, its opcode, its operands, and the rest of the line.

    `is_in_vmem` says that its (first) array is in vector memory instead of in HBM. `literal` is the value of a
    constant.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_in_vmem: bool = False
    literal: str = ""

    @property
    def op_name(self) -> str:
        """Returns where in our code it comes from; of a parameter, which argument it is."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Holds an exchange between all devices: its kind, the array each of them has after it, and how often it runs."""

    kind: str
    shape: Shape
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """Holds the computations of a module by name, and the name of the one that is run."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    def parameters(self) -> Iterator[Instruction]:
        """Returns the program's arguments."""
        return (one for one in self.computations[self.entry] if one.opcode == "parameter")

    def collectives(self) -> list[Collective]:
        """Returns all exchanges; one in a loop counts as often as the loop runs, or once when that is not known.

        A TPU's program splits an exchange into steps between other work, also in a loop. Each step is written as the
        whole exchange, and all are on one channel: that is one exchange.
        """
        times = self._times()
        on_channel: dict[str, tuple[str, Shape, int]] = {}
        for computation, instructions in self.computations.items():
            for one in instructions:
                kind = one.opcode.removesuffix("-start")
                if kind in COLLECTIVES and times[computation]:
                    channel = _CHANNEL.search(one.attributes)
                    shape = max(one.shapes, key=lambda shape: shape.num_bytes)
                    name = channel[1] if channel else f"{computation} {one.name}"
                    before = on_channel.get(name, (kind, shape, times[computation]))[2]
                    on_channel[name] = (kind, shape, min(before, times[computation]))
        found: collections.Counter[tuple[str, Shape]] = collections.Counter()
        for kind, shape, count in on_channel.values():
            found[kind, shape] += count
        return [Collective(kind, shape, count) for (kind, shape), count in found.items()]

    def readers(self, parameter: str) -> list[Instruction]:
        """Returns the instructions that read an argument of the program, through whatever passes it on to them."""
        uses = self._uses()
        seen: set[tuple[str, str]] = set()
        waiting = [(self.entry, parameter)]
        readers = []
        while waiting:
            computation, name = waiting.pop()
            if (computation, name) in seen:
                continue
            seen.add((computation, name))
            for user in uses[computation, name]:
                if user.opcode in PASSING:
                    waiting.append((computation, user.name))
                elif user.opcode in ("while", "call", "conditional"):
                    waiting += [(inner, self._parameter(inner, user, name)) for inner in _called(user)]
                    waiting.append((computation, user.name))
                else:
                    readers.append(user)
        return readers

    def _parameter(self, computation: str, caller: Instruction, name: str) -> str:
        parameters = [one for one in self.computations[computation] if one.opcode == "parameter"]
        index = caller.operands.index(name) if len(parameters) == len(caller.operands) else 0
        return parameters[index].name

    def _uses(self) -> dict[tuple[str, str], list[Instruction]]:
        uses = collections.defaultdict(list)
        for computation, instructions in self.computations.items():
            for one in instructions:
                for operand in dict.fromkeys(one.operands):
                    uses[computation, operand].append(one)
        return uses

    def _trips(self, loop: Instruction) -> int:
        """Returns how often a loop runs: XLA's note, or by the bound and step of its counter; 1 when neither is known.

        Counters begin at 0.
        """
        noted = _TRIPS.search(loop.attributes)
        parts = _LOOP.search(loop.attributes)
        if noted or not parts:
            return int(noted[1]) if noted else 1
        condition, body = ({one.name: one for one in self.computations[name]} for name in parts.groups())
        for compare in condition.values():
            if compare.opcode == "compare" and "direction=LT" in compare.attributes:
                counter, bound = (condition.get(name) for name in compare.operands)
                if counter and bound and bound.literal.isdecimal():
                    return -(-int(bound.literal) // _step(body, counter))
        return 1

    def _times(self) -> collections.Counter[str]:
        """Returns how often each computation runs in a run of the program."""
        times: collections.Counter[str] = collections.Counter()

        def run(computation: str, count: int) -> None:
            times[computation] += count
            for one in self.computations[computation]:
                trips = self._trips(one) if one.opcode == "while" else 1
                for inner in _called(one):
                    run(inner, count * trips)

        run(self.entry, 1)
        return times


def parse(text: str) -> Program:
    """Reads the text that `Compiled.as_text()` returns; raises ValueError when it is not understood."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    lines: list[Instruction] = []
    entry = name = ""
    for line in _whole_lines(text):
        begins = _COMPUTATION.match(line)
        if begins:
            name, lines = begins[2], []
            entry = name if begins[1] else entry
        elif line == "}" and name:
            computations[name] = tuple(lines)
            name = ""
        elif name:
            found = _INSTRUCTION.match(line)
            if not found:
                raise ValueError(f"this line of a program's text is not understood: {line[:80]!r}")
            lines.append(_instruction(found[1], found[2]))
    if not entry:
        raise ValueError("the text of a program has no ENTRY computation")
    return Program(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Yields the text's lines; an instruction whose attributes have line breaks in them is one line.

    Splash attention notes its block sizes so, and the text after them begins with "}" in the first column.
    """
    whole, is_inside = "", False
    for line in text.splitlines():
        is_whole = line == "}" or line.startswith("  ") or not is_inside
        if is_whole and whole:
            yield whole
        whole = line if is_whole else whole + line
        is_inside = line != "}" and (is_inside or bool(_COMPUTATION.match(line)))
    if whole:
        yield whole


def _instruction(name: str, rest: str) -> Instruction:
    kind, rest = _split_type(rest)
    opcode, _, rest = rest.lstrip().partition("(")
    inside, attributes = _split_parenthesis(rest)
    shapes = tuple(
        Shape(found[1], tuple(int(size) for size in found[2].split(",") if size)) for found in _ARRAY.finditer(kind)
    )
    first = kind.split(", ")[0]
    literal = inside if opcode == "constant" else ""
    return Instruction(name, shapes, opcode, tuple(_OPERAND.findall(inside)), attributes, VMEM in first, literal)


def _split_type(text: str) -> tuple[str, str]:
    """Splits a text into an instruction's type, perhaps a tuple of types in parentheses, and the rest."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    inside, rest = _split_parenthesis(text[1:])
    return inside, rest


def _split_parenthesis(text: str) -> tuple[str, str]:
    """Splits a text at the parenthesis that closes one opened before it."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:index], text[index + 1 :]
    raise ValueError(f"a parenthesis is not closed in {text[:80]!r}")


def _step(body: dict[str, Instruction], counter: Instruction) -> int:
    """Returns how much a run of a loop adds to the element of its state that `counter` reads; 1 when unknown."""
    element = _ELEMENT.search(counter.attributes)
    state = list(body.values())[-1]
    if element and state.opcode == "tuple" and int(element[1]) < len(state.operands):
        new = body.get(state.operands[int(element[1])])
        added = [body[name].literal for name in new.operands if name in body] if new and new.opcode == "add" else []
        steps = [int(literal) for literal in added if literal.isdecimal() and int(literal) > 0]
        if len(steps) == 1:
            return steps[0]
    return 1


def _called(instruction: Instruction) -> list[str]:
    branches = _BRANCHES.search(instruction.attributes)
    inner = _CALLED.findall(instruction.attributes)
    return inner + (_OPERAND.findall(branches[1]) if branches else [])
