"""Reads from the text of a compiled program what it moves between devices, what it keeps in memory, and what
the update of every parameter reads.

The text is XLA's HLO after optimization, `jax.jit(f).lower(...).compile().as_text()`: computations of
instructions, of which the entry's are the ones that write buffers; what a fusion computes inside stays in
registers. Nothing here needs JAX.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Where the gradient comes from: the update begins after the last of these.
SOURCES = (*COLLECTIVES, "convolution", "dot", "while", "conditional", "custom-call", "scatter", "sort")

# What gives a buffer another name, or brings it into faster memory: it computes nothing.
MOVES = (
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "copy",
    "opt-barrier",
    "slice-start",
    "slice-done",
)
MOVES += ("copy-start", "copy-done", "async-start", "async-done")

# Of dtypes whose items have not 4.
ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}


@dataclasses.dataclass(frozen=True)
class Array:
    """Dtype and dimensions of an array, on one device."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.size * ITEM_BYTES.get(self.dtype, 4)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = arrays opcode(operands), attributes`. Of a tuple, `arrays` are its leaves."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str  # what stands between the brackets: the number of a parameter
    attributes: str

    @property
    def kind(self) -> str:
        """The opcode, without the two halves in which it may be carried out."""
        return self.opcode.removesuffix("-start").removesuffix("-done")

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.attributes)
        return found and found[1]

    @property
    def called(self) -> str | None:
        """The computation of a fusion, of a call or of what runs beside the program."""
        return self.attribute("calls") or (self.attribute("to_apply") if self.opcode == "call" else None)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its computations by name, and which output overwrites which input."""

    computations: dict[str, Computation]
    roots: dict[str, str]
    entry: str
    aliases: dict[int, int]  # number of an input -> number of the output that takes its place

    @property
    def inputs(self) -> dict[str, Instruction]:
        """Inputs by what `argument_name` makes of them."""
        entry = self.computations[self.entry].values()
        return {argument_name(i): i for i in entry if i.opcode == "parameter"}

    def written(self) -> Iterator[Instruction]:
        """The instructions that write buffers: all but those inside of fusions and reductions."""
        inside = {i.called for c in self.computations.values() for i in c.values() if i.opcode == "fusion"}
        inside |= {
            i.attribute("to_apply")
            for c in self.computations.values()
            for i in c.values()
            if i.opcode != "call"
        }
        for name, computation in self.computations.items():
            if name not in inside:
                yield from computation.values()


def parse(text: str) -> Program:
    """The program that `text` writes down.

    Raises:
      ValueError: a text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    roots: dict[str, str] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif current and (found := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*)$", line)):
            instruction = _instruction(found[2], found[3])
            computations[current][instruction.name] = instruction
            if found[1]:
                roots[current] = instruction.name
    if not entry:
        raise ValueError("`text` has no entry computation: it must be that of a compiled program")
    aliases = {}
    if header := re.search(r"input_output_alias=\{(.*?)\}[,\s]+\w+=", text.splitlines()[0]):
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}", header[1])
        aliases = {int(given): int(output or 0) for output, given in pairs}
    return Program(computations, roots, entry, aliases)


def _instruction(name: str, text: str) -> Instruction:
    type_end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    arrays = tuple(_arrays(text[:type_end]))
    opcode, rest = text[type_end:].strip().split("(", 1)
    end = _closing("(" + rest, 0) - 1
    operands = tuple(re.findall(r"%([\w.-]+)", rest[:end]))
    return Instruction(name, arrays, opcode, operands, rest[:end], rest[end + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in re.finditer(r"[()]", text[start:]):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return start + place.start()
    raise ValueError(f"a bracket that does not close in {text[:80]!r}")


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text):
        yield Array(dtype, tuple(int(n) for n in dims.split(",") if n))


def argument_name(parameter: Instruction) -> str:
    """An input of a training step in words: `params a/b`, `trace a/b`, `scales a/b`, `count`, ...

    JAX writes the path into the text, as `state.opt_state[0].trace['a']['b']`; where in a chain of
    transformations a state stands is left out, because it differs between chains.
    """
    found = re.search(r'op_name="([^"]*)"', parameter.attributes)
    if not found:
        return f"input {parameter.inside}"
    path = found[1].replace("\\'", "'").removeprefix("state.")
    path = re.sub(r"^opt_state(\[\d+\]|\.inner\w*|\.hyperparams\w*)*\.", "", path)
    kind, *keys = re.split(r"\['?|'?\]\['?|'?\]", path)
    return " ".join((kind, "/".join(key for key in keys if key))).strip()


def collectives(program: Program) -> dict[str, tuple[int, int]]:
    """What moves between devices: kind and arrays -> (how many such collectives, bytes of the arrays of all).

    One collective may stand in the text several times, where it is carried out beside something else: it is
    counted by its channel.
    """
    found: dict[str, set[str]] = collections.defaultdict(set)
    sizes: dict[str, int] = {}
    for computation in program.computations.values():
        for i in computation.values():
            if i.kind in COLLECTIVES and not i.opcode.endswith("-done"):
                # The first half of one gives its inputs too, and bookkeeping.
                arrays = sorted(map(str, i.arrays))
                key = f"{i.kind} {' '.join(arrays)}"
                found[key].add(i.attribute("channel_id") or i.name)
                sizes[key] = sum(a.bytes for a in i.arrays)
    return {key: (len(channels), len(channels) * sizes[key]) for key, channels in sorted(found.items())}


def buffers(program: Program, larger_than: int) -> dict[str, int]:
    """The arrays of more than `larger_than` elements that are computed into memory: array -> how many."""
    count: collections.Counter[str] = collections.Counter()
    for i in program.written():
        if i.opcode not in (*MOVES, "constant") and not _is_view(i):
            count.update(str(a) for a in i.arrays if a.size > larger_than)
    return dict(sorted(count.items()))


def largest_constant(program: Program) -> int:
    """Elements of the largest array that is written into the program."""
    lines = (i for computation in program.computations.values() for i in computation.values())
    return max((a.size for i in lines if i.opcode == "constant" for a in i.arrays), default=0)


@dataclasses.dataclass(frozen=True)
class Update:
    """How inputs of a step get their new values.

    Attributes:
      reads: names of the inputs that the new values depend on element by element, and where their gradient
        comes from: collectives and products, with their arrays.
      writers: the instructions that compute them in memory, and have a result of more elements than asked.
      bytes: of memory that the writers read and write.
    """

    reads: tuple[str, ...]
    writers: tuple[str, ...]
    bytes: int


def update(program: Program, names: Iterable[str], larger_than: int) -> Update:
    """How the inputs `names` get their new values, from the inputs and their gradient on; `larger_than` says
    which writers are worth telling."""
    entry = program.computations[program.entry]
    reads: set[str] = set()
    writers: dict[str, Instruction] = {}
    for name in names:
        output = program.aliases[int(program.inputs[name].inside)]
        for (callers, i, index), is_source in _behind(program, output):
            if is_source:
                array = i.arrays[index if index is not None and len(i.arrays) > 1 else 0]
                reads.add(argument_name(i) if i.opcode == "parameter" else f"{i.kind} {array}")
                continue
            writer = callers[0] if callers else i
            if writer.opcode not in MOVES and any(a.size > larger_than for a in writer.arrays):
                writers[writer.name] = writer
    moved = sum(a.bytes for i in writers.values() for a in i.arrays)
    moved += sum(a.bytes for i in writers.values() for name in set(i.operands) for a in entry[name].arrays)
    return Update(tuple(sorted(reads)), tuple(sorted(writers)), moved)


# The fusions that an instruction is in, the instruction, which part of the tuple that it gives (None: all).
Place = tuple[tuple[Instruction, ...], Instruction, int | None]


def _behind(program: Program, output: int) -> Iterator[tuple[Place, bool]]:
    """Everything that an output is made from, back to the inputs and to `SOURCES`, and whether the way ends
    there."""
    seen = set()
    root = program.computations[program.entry][program.roots[program.entry]]
    stack: list[Place] = [((), root, output)]
    while stack:
        callers, i, index = stack.pop()
        key = (tuple(c.name for c in callers), i.name, index)
        if key in seen:
            continue
        seen.add(key)
        is_input = i.opcode == "parameter" and not callers
        if is_input or (i.kind in SOURCES and not _is_view(i)):
            yield (callers, i, index), True
            continue
        # A fusion is looked into: what it computes besides is none of this output's.
        if i.called is None and i.opcode != "parameter" and not _is_view(i):
            yield (callers, i, index), False
        stack.extend(_step_back(program, callers, i, index))


def _is_view(i: Instruction) -> bool:
    return i.opcode == "custom-call" and "Bitcast" in i.attributes


def _step_back(
    program: Program, callers: tuple[Instruction, ...], i: Instruction, index: int | None
) -> list[Place]:
    def of(name: str, callers: tuple[Instruction, ...], index: int | None = None) -> Place:
        where = callers[-1].called if callers else program.entry
        return callers, program.computations[where or ""][name], index

    if i.opcode == "parameter":
        return [of(callers[-1].operands[int(i.inside)], callers[:-1], index)]
    if i.called:
        return [of(program.roots[i.called], (*callers, i), index)]
    if i.opcode == "get-tuple-element":
        return [of(i.operands[0], callers, int(i.attribute("index") or 0))]
    if i.opcode == "tuple" and index is not None:
        return [of(i.operands[index], callers)]
    if i.opcode == "opt-barrier":
        return [of(i.operands[0], callers, index)]
    return [of(name, callers) for name in i.operands]
