"""Reads NVIDIA machine code as cuobjdump prints it, and what ptxas says about registers and spills."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from distmuon.benchmarks.compiled import flow

# "        /*0a10*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*(.*?);")
# Multiply-adds of one tensor-core instruction per warp, or warp group; a tcgen05 instruction does not name its shape.
SHAPE = re.compile(r"^(?:HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(16|8)|UTC[A-Z]*MMA)")
REGISTERS = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its address, whether a predicate guards it, its name with suffixes, and operands."""

    address: int
    guarded: bool
    name: str
    operands: str

    @property
    def base(self) -> str:
        """The name without suffixes."""
        return self.name.split(".")[0]

    @property
    def work(self) -> int:
        """Multiply-adds of a tensor-core instruction, to find the loop that does most of them."""
        match = SHAPE.match(self.name)
        sizes = [int(size) for size in match.groups() if size] if match else [0]
        return math.prod(sizes) if sizes else 1

    @property
    def tensor(self) -> bool:
        """Whether tensor cores execute it."""
        return SHAPE.match(self.name) is not None


def parse(text: str) -> list[Instruction]:
    """Read the instructions that ``cuobjdump -sass`` lists."""
    found = (INSTRUCTION.match(line) for line in text.splitlines())
    return [Instruction(int(m[1], 16), bool(m[2]), m[3] + m[4], m[5]) for m in found if m]


def hot_loop(instructions: list[Instruction]) -> list[Instruction]:
    """Find the loop with the most multiply-adds, on tensor cores or else scalar ones; empty without such a loop."""
    tensor = any(i.tensor for i in instructions)
    work = [i.work if tensor else int(i.base in ("FFMA", "FFMA2")) for i in instructions]
    number = {i.address: at for at, i in enumerate(instructions)}
    successors = [[number[a] for a in following(i) if a in number] for i in instructions]
    for at, i in enumerate(instructions):
        if not ends(i):
            successors[at].append(at + 1)
    return [instructions[at] for at in flow.hot_loop(successors, work)]


def following(instruction: Instruction) -> list[int]:
    """Addresses that an instruction jumps to."""
    if instruction.base != "BRA":
        return []
    return [int(address, 16) for address in re.findall(r"0x([0-9a-f]+)", instruction.operands)[-1:]]


def ends(instruction: Instruction) -> bool:
    """Whether the next instruction never runs after this one."""
    conditional = instruction.guarded or re.match(r"!?U?[PR]\w*,", instruction.operands) is not None
    return instruction.base in {"BRA", "EXIT", "RET", "BRX", "JMP"} and not conditional


def figures(text: str) -> dict[str, object]:
    """Count what matters in a kernel's machine code.

    Args:
        text: output of ``cuobjdump -sass``.

    Returns:
        "instructions" of the kernel; "loop" instructions of the hot loop, or of the whole kernel without a loop;
        "tensor" instructions by name and shape; "ldg" loads of single elements through registers in the loop, as are
        all global loads in a loop and those of less than 16 bytes outside; asynchronous copies "async_copies",
        "tma_loads"; shared memory loads "shared_loads"; "barriers".
    """
    instructions = parse(text)
    loop = hot_loop(instructions)
    body = loop or instructions
    names = Counter(i.base for i in body)
    loads = [i for i in body if i.base == "LDG" and (loop or ".128" not in i.name)]
    return {
        "instructions": len(instructions),
        "has_loop": bool(loop),
        "loop": len(body),
        "tensor": dict(sorted(Counter(shape(i.name) for i in body if i.tensor).items())),
        "ldg": len(loads),
        "async_copies": names["LDGSTS"],
        "tma_loads": names["UTMALDG"],
        "shared_loads": names["LDSM"] + names["LDS"],
        "barriers": names["BAR"],
    }


def shape(name: str) -> str:
    """The name of a tensor-core instruction up to its shape: HGMMA.64x128x16.F32.BF16 is HGMMA.64x128x16."""
    match = SHAPE.match(name)
    return match[0] if match else name


def registers_and_spills(log: str) -> dict[str, int]:
    """Read what ``ptxas -v`` reports.

    Args:
        log: its messages.

    Returns:
        "registers" per thread, "spill_stores" and "spill_loads" in bytes, "stack" in bytes.

    Raises:
        ValueError: if the log reports neither.
    """
    registers, spills = REGISTERS.search(log), SPILLS.search(log)
    if registers is None or spills is None:
        raise ValueError(f"ptxas -v reports no registers and spills, but: {log.strip()[:300]!r}")
    stack, stores, loads = (int(number) for number in spills.groups())
    return {"registers": int(registers[1]), "stack": stack, "spill_stores": stores, "spill_loads": loads}
