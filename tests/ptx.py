"""Reading PTX, the text that a GPU kernel is assembled from."""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

_PARAMETER = re.compile(r"\.param\s+(.*?)\s(\w+_param_\d+)\b")
_LABEL = re.compile(r"(\$L__BB\w+):")
_INSTRUCTION = re.compile(r"(?:@!?(%p\d+)\s+)?([a-z][\w.:]*)\s+(.*?);")
_REGISTER = re.compile(r"%[a-z]+\d+")
_WIDTH = re.compile(r"(?:\.v(\d))?\.[a-z]+(\d+)$")


class Instruction(NamedTuple):
    """One line.

    Attributes:
        opcode: With its suffixes.
        operands: As written.
        block: Number of the basic block that it is in.
    """

    opcode: str
    operands: str
    block: int


class Access(NamedTuple):
    """A load from or a store to global memory.

    Attributes:
        parameter: Position, among the kernel's parameters, of the pointer that its address comes from.
        is_store: Whether it is a store.
        bits: That one thread moves at once.
        block: Number of the basic block that it is in.
    """

    parameter: int
    is_store: bool
    bits: int
    block: int


class Ptx:
    """A module of one kernel.

    Args:
        text: Its PTX.
    """

    def __init__(self, text: str) -> None:
        self._parameters = {name: number for number, (_, name) in enumerate(_PARAMETER.findall(text))}
        self._pointers = {self._parameters[name] for kind, name in _PARAMETER.findall(text) if ".ptr" in kind}
        self._blocks = {"": 0}  # by label
        self.instructions: list[Instruction] = []
        for line in map(str.strip, text.partition("\n{")[2].splitlines()):
            if label := _LABEL.match(line):
                self._blocks[label[1]] = len(self._blocks)
            elif found := _INSTRUCTION.match(line):
                self.instructions.append(Instruction(found[2], found[3], len(self._blocks) - 1))

    @cached_property
    def accesses(self) -> list[Access]:
        """Of global memory, but for atomic ones."""
        origins = self._origins()
        accesses = []
        for opcode, operands, block in self.instructions:
            if opcode.startswith(("ld.global", "st.global")):
                width = _WIDTH.search(opcode)
                address = re.search(r"\[\s*(%rd\d+)", operands)
                assert width is not None, opcode
                assert address is not None, operands
                (parameter,) = origins[address[1]]
                bits = int(width[1] or 1) * int(width[2])
                accesses.append(Access(parameter, opcode.startswith("st"), bits, block))
        return accesses

    def loop_over(self, parameters: Iterable[int]) -> set[int]:
        """The basic blocks of the innermost loops that load from any of these parameters; none without a loop."""
        loading = {access.block for access in self.accesses if not access.is_store and access.parameter in parameters}
        loops = [
            range(first, last + 1) for first, last in self._back_edges() if loading.intersection(range(first, last + 1))
        ]
        innermost = [loop for loop in loops if not any(set(other) < set(loop) for other in loops)]
        return {block for loop in innermost for block in loop}

    def count(self, opcode: str, blocks: set[int]) -> int:
        """How many instructions of these blocks begin like this."""
        return sum(line.block in blocks and line.opcode.startswith(opcode) for line in self.instructions)

    def _back_edges(self) -> Iterable[tuple[int, int]]:
        for opcode, operands, block in self.instructions:
            if opcode.startswith("bra"):
                target = self._blocks[operands.strip()]
                if target <= block:
                    yield target, block

    def _origins(self) -> dict[str, set[int]]:
        """Of which pointers among the parameters each register is formed; what is loaded is formed of none."""
        origins: dict[str, set[int]] = {}
        flows = []  # from registers to a register
        for opcode, operands, _ in self.instructions:
            registers = _REGISTER.findall(operands)
            if opcode.startswith("ld.param"):
                name = re.search(r"\[(\w+)", operands)
                assert name is not None, operands
                if (parameter := self._parameters[name[1]]) in self._pointers:
                    origins[registers[0]] = {parameter}
            elif registers and not opcode.startswith(("ld.", "st.", "setp")):
                flows.append((registers[0], registers[1:]))
        is_settled = False
        while not is_settled:  # around loops
            is_settled = True
            for target, sources in flows:
                found = {origin for source in sources for origin in origins.get(source, ())}
                if not found <= origins.get(target, set()):
                    origins[target] = origins.get(target, set()) | found
                    is_settled = False
        return origins
