"""The GPUs that kernels are compiled for: limits of one multiprocessor and published peak numbers."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
# PTX ISA, "Tensor Memory": 512 columns per SM.
TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class Target:
    """One GPU architecture, with the device its peak numbers belong to.

    Args:
        name: as compilers call it, "sm_90" or "gfx942".
        device: the product whose data sheet gives the peak numbers.
        registers: 32-bit registers of one multiprocessor, per lane of a warp on AMD.
        shared: bytes of shared memory of one multiprocessor.
        reserved: bytes of shared memory that the system keeps per CTA.
        warps: most resident warps on one multiprocessor.
        multiprocessors: SMs or compute units of the device.
        peak: dense bfloat16 FLOP/s with float32 accumulation.
        bandwidth: bytes per second of device memory.
    """

    name: str
    device: str
    registers: int
    shared: int
    reserved: int
    warps: int
    multiprocessors: int
    peak: float
    bandwidth: float

    @property
    def nvidia(self) -> bool:
        """Whether ptxas, and not LLVM, makes the machine code."""
        return self.name.startswith("sm_")

    @property
    def capability(self) -> int:
        """The compute capability times ten of an NVIDIA architecture."""
        return int(self.name.removeprefix("sm_"))

    @property
    def warp_size(self) -> int:
        """Lanes of one warp."""
        return 32 if self.nvidia else 64


# Multiprocessor limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 and
# CDNA 4 instruction set guides. Peaks: data sheets of A100 80GB SXM, H100 SXM, HGX B200 (per GPU), MI300X and MI355X.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100 80GB SXM", 65536, 164 * KIB, KIB, 64, 108, 312e12, 2.039e12),
        Target("sm_90", "H100 SXM", 65536, 228 * KIB, KIB, 64, 132, 989e12, 3.35e12),
        Target("sm_100", "B200", 65536, 228 * KIB, KIB, 64, 148, 2250e12, 8.0e12),
        Target("gfx942", "MI300X", 4 * 512, 64 * KIB, 0, 32, 304, 1307e12, 5.3e12),
        Target("gfx950", "MI355X", 4 * 512, 160 * KIB, 0, 32, 256, 2500e12, 8.0e12),
    )
}


def resident(target: Target, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> tuple[int, str]:
    """How many CTAs of a kernel fit on one multiprocessor at once.

    Args:
        target: the architecture.
        registers: registers per thread.
        shared: bytes of shared memory of one CTA.
        warps: warps of one CTA.
        tensor_columns: columns of tensor memory of one CTA, on sm_100.

    Returns:
        The number of CTAs and what limits it: "registers", "shared memory", "warps" or "tensor memory".
    """
    if target.nvidia:
        # Registers are handed out to warps in units of 256.
        per_warp = -(-registers * target.warp_size // 256) * 256
        by_registers = target.registers // per_warp // warps
    else:
        # Each of 4 SIMDs has 512 per lane, handed out in units of 8, and runs at most 8 waves.
        by_registers = 4 * min(512 // (-(-registers // 8) * 8), 8) // warps
    limits = {
        "registers": by_registers,
        "shared memory": target.shared // max(shared + target.reserved, 1),
        "warps": target.warps // warps,
    }
    if tensor_columns:
        limits["tensor memory"] = TENSOR_COLUMNS // tensor_columns
    tightest = min(limits, key=lambda name: limits[name])
    return limits[tightest], tightest
