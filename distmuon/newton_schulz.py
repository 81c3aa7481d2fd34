"""Orthogonalization of batches of matrices by Newton-Schulz iteration.

Shapes: B matrices, M rows, N columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmuon.errors import ConfigError, ParameterError
from distmuon.iteration import iterate
from distmuon.kernels import host
from distmuon.kernels.products import Products
from distmuon.kernels.reference import power_of_two
from distmuon.ns_settings import NewtonSchulz
from distmuon.schedule import make_schedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Precision of Newton-Schulz inputs before they are scaled; float16 would overflow or underflow there.
INPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.bfloat16}
# Elements of a batch that is computed at once: fills any device; temporaries take 18 to 24 bytes of each.
BATCH_NUMEL = 2**26
# Elements from which torch transposes a matrix five times faster alone than in a batch, on a CPU.
TRANSPOSED_ALONE = 2**16
# Elements from which a matrix is measured faster alone than in a batch, on a CPU.
MEASURED_ALONE = 2**14
# float16 keeps matrices at a Frobenius norm in [16, 32): with 1, XX^T of 2,048 rows underflows; 64 would overflow it.
HALF_NORM = 32.0


@torch.no_grad()
def orthogonalize(x: Tensor, ns: NewtonSchulz | None = None, largest: Tensor | None = None) -> Tensor:
    """Replace each matrix by an approximation of its polar factor UV^T, outside of autograd and autocast.

    Args:
        x: [..., M, N], any floating dtype. Not written to.
        ns: settings; None means ``NewtonSchulz()``.
        largest: [...] float32, the largest magnitude of each matrix where that is known; None measures it.

    Returns:
        [..., M, N] in ``ns.dtype``. A zero matrix stays zero, a non-finite one becomes non-finite. Multiplying x by a
        power of two changes no bit, and a matrix gets the same bits in a batch of any size on a CPU.

    Raises:
        ParameterError: x has fewer than two dimensions or is not floating point, or largest does not go with it.
        ConfigError: the matrix products that were asked for cannot run on the device.
    """
    ns = ns or NewtonSchulz()
    if x.ndim < 2 or not x.is_floating_point():
        raise ParameterError(
            f"orthogonalize got a {x.ndim}-D {x.dtype} tensor; it takes floating-point [..., M, N] matrices."
        )
    if largest is not None:
        _check_largest(largest, x)
    dtype = DTYPES[ns.dtype]
    if x.numel() == 0:
        return x.to(dtype, copy=True)
    products = find_products(x.device, ns)
    x_BMN = x.reshape(-1, *x.shape[-2:])
    rows, cols = sorted(x.shape[-2:])
    schedule = make_schedule(ns, rows, cols, products.symmetric_fraction)
    size = max(1, BATCH_NUMEL // math.prod(x.shape[-2:]))
    done = []
    with torch.autocast(x.device.type, enabled=False), host.precision(x.device, dtype):
        for part in (slice(start, start + size) for start in range(0, x_BMN.shape[0], size)):
            scaled_BMN = prescale(x_BMN[part], dtype, None if largest is None else largest.reshape(-1)[part])
            done.append(iterate(_wide(scaled_BMN), schedule, products))
    o_BMN = done[0] if len(done) == 1 else torch.cat(done)
    return (o_BMN.mT if x.shape[-2] > x.shape[-1] else o_BMN).reshape(x.shape)


# Smallest normal number of float32 and bfloat16.
_SMALLEST_NORMAL = 2.0**-126


def _check_largest(largest: Tensor, x: Tensor) -> None:
    if largest.shape != x.shape[:-2] or largest.dtype != torch.float32 or x.dtype == torch.float64:
        raise ParameterError(
            f"largest is {largest.dtype} of shape {tuple(largest.shape)} for {x.dtype} matrices {tuple(x.shape)}; it "
            f"must be float32 of shape {tuple(x.shape[:-2])}, for other than float64; leave it out to measure it."
        )


def find_products(device: torch.device, ns: NewtonSchulz) -> Products:
    """Choose the matrix products for a device.

    Args:
        device: where the matrices are.
        ns: settings.

    Returns:
        The products.

    Raises:
        ConfigError: those that were asked for cannot run there, or ``DISTMUON_KERNELS`` has no legal value.
    """
    try:
        return host.products(device, ns.kernels)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def prescale(
    x_BMN: Tensor, dtype: torch.dtype, largest_B: Tensor | None = None, long_side: int | None = None
) -> Tensor:
    """Divide each matrix by a power of two, so that its products neither overflow nor underflow, and cast it.

    Args:
        x_BMN: [B, M, N], any floating dtype, not empty. Not written to.
        dtype: dtype to iterate in.
        largest_B: [B] float32 largest magnitudes of matrices that are not float64; None measures them.
        long_side: of the whole matrices, if these are slices of them and dtype is not float16; None: they are whole.

    Returns:
        [B, M, N] in that dtype: with its largest element around 1 / sqrt(max(M, N)), or for float16 with a Frobenius
        norm in [16, 32). The cast is the only rounding. A zero matrix stays zero, one without an element of at least
        2^-126 becomes zero, a non-finite one stays non-finite.
    """
    if x_BMN.dtype == torch.float64:
        x_BMN = _into_float32_range(x_BMN)
    given_BMN = x_BMN
    # A cast to bfloat16 gives the same bits before the division as after it, at half the traffic.
    x_BMN = x_BMN.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    largest_B11 = largest_magnitude(x_BMN) if largest_B is None else largest_B[:, None, None].to(x_BMN.dtype)
    divisor_B11 = power_of_two(largest_B11)
    if dtype == torch.float16:
        x_BMN = x_BMN / divisor_B11
        norm_B11 = torch.linalg.vector_norm(x_BMN, dim=(1, 2), keepdim=True, dtype=torch.float64).float()
        divisor_B11 = (power_of_two(norm_B11) * (2 / HALF_NORM)).clamp(min=2.0**-126)
    else:
        root = 2.0 ** math.ceil(math.log2(long_side or max(x_BMN.shape[-2:])) / 2)
        divisor_B11 = (divisor_B11 * root).clamp(max=2.0**127)
    # A subnormal matrix would keep a norm too small to be measured, and be scaled until it diverges; it counts as zero.
    divisor_B11 = divisor_B11.masked_fill(largest_B11 < _SMALLEST_NORMAL, math.inf)
    # What the cast made anew is divided where it is.
    return (x_BMN / divisor_B11 if x_BMN is given_BMN else x_BMN.div_(divisor_B11)).to(dtype)


def largest_magnitude(x_BMN: Tensor) -> Tensor:
    """Measure matrices.

    Args:
        x_BMN: [B, M, N], not empty.

    Returns:
        [B, 1, 1] largest magnitude of each; NaN if one is not a number.
    """
    if x_BMN.shape[0] == 1 or (x_BMN.device.type == "cpu" and math.prod(x_BMN.shape[-2:]) >= MEASURED_ALONE):
        extremes = [x_MN.aminmax() for x_MN in x_BMN]
        return torch.stack([torch.maximum(high, -low) for low, high in extremes])[:, None, None]
    return torch.maximum(x_BMN.amax(dim=(1, 2), keepdim=True), -x_BMN.amin(dim=(1, 2), keepdim=True))


def _into_float32_range(x_BMN: Tensor) -> Tensor:
    """Divide float64 matrices by a power of two near their largest element and round them to float32."""
    _, exponent_B11 = torch.frexp(x_BMN.abs().amax(dim=(1, 2), keepdim=True))
    return torch.ldexp(torch.ldexp(x_BMN, -exponent_B11 // 2), exponent_B11 // 2 - exponent_B11).float()


def _wide(x_BMN: Tensor) -> Tensor:
    # One transposition costs less than products of transposed operands in every step.
    if x_BMN.shape[-2] <= x_BMN.shape[-1]:
        return x_BMN.contiguous()
    wide_BNM = x_BMN.new_empty(x_BMN.mT.shape)
    if math.prod(x_BMN.shape[-2:]) < TRANSPOSED_ALONE:
        return wide_BNM.copy_(x_BMN.mT)
    for wide_NM, x_MN in zip(wide_BNM, x_BMN, strict=True):
        wide_NM.copy_(x_MN.mT)
    return wide_BNM
