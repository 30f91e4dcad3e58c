"""Reading the disassembly of a GPU kernel."""

import re

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)([^;]*);")
_SUFFIX = re.compile(r"\.[US]?(8|16|64|128)\b")
_ADDRESS = re.compile(r"0x([0-9a-f]+)")


def num_loads(opcodes: list[str], bits: int) -> int:
    """How many of them load this much at once from global memory."""
    return sum(opcode.startswith("LDG") and _bits(opcode) == bits for opcode in opcodes)


def loop_of(sass: str, least: int, bits: int) -> list[str]:
    """The opcodes of the first innermost loop that loads this much at once from global memory; none without one.

    Args:
        sass: As cuobjdump prints it.
        least: How often it has to: the assembler may unroll.
        bits: How much.
    """
    lines = [(int(address, 16), opcode, operands) for address, opcode, operands in _LINE.findall(sass)]
    loops = []  # first and last address of those that load so often, and the opcodes
    for last, opcode, operands in lines:
        target = _ADDRESS.search(operands)
        if opcode == "BRA" and target is not None and (first := int(target[1], 16)) < last:
            opcodes = [opcode for address, opcode, _ in lines if first <= address <= last]
            if num_loads(opcodes, bits) >= least:
                loops.append((first, last, opcodes))
    for first, last, opcodes in loops:
        if not any(first <= start and end <= last and (start, end) != (first, last) for start, end, _ in loops):
            return opcodes
    return []


def _bits(opcode: str) -> int:
    width = _SUFFIX.search(opcode)
    return int(width[1]) if width is not None else 32
