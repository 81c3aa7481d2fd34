"""Work of the matrix kernels by arithmetic: tiles, multiply-adds, bytes, and the time no run can be shorter than."""

from __future__ import annotations

from dataclasses import dataclass

from distmuon.benchmarks.compiled.targets import Target


@dataclass(frozen=True)
class Work:
    """What one launch does.

    Args:
        tiles: programs launched, each of which computes one tile.
        flops: floating-point operations of these tiles, two per multiply-add, padding included.
        full_flops: the same without symmetry and padding.
        bytes: every input read once and every output written once.
    """

    tiles: int
    flops: int
    full_flops: int
    bytes: int

    def bound(self, target: Target) -> tuple[float, str]:
        """Seconds that the launch takes at least at published peak numbers, and what sets them.

        A tile runs on one multiprocessor, so that the busiest computes the tiles over their number, rounded up.
        """
        busiest = -(-self.tiles // target.multiprocessors) * self.flops / self.tiles
        arithmetic, memory = busiest * target.multiprocessors / target.peak, self.bytes / target.bandwidth
        return max(arithmetic, memory), "arithmetic" if arithmetic >= memory else "memory"


def symmetric(batch: int, n: int, k: int, tile: int, depth: int, *, has_c: bool = False, itemsize: int = 2) -> Work:
    """Y = alpha A A^T + beta C, lower triangle of tiles only.

    Args:
        batch: matrices.
        n: rows of A.
        k: columns of A.
        tile: rows and columns of a tile.
        depth: columns of A multiplied at a time.
        has_c: whether there is a C other than A.
        itemsize: bytes of an element.

    Returns:
        The launch's work, with exactly t(t + 1)/2 tiles per matrix, t = ceil(n / tile).
    """
    t = -(-n // tile)
    tiles = batch * (t * (t + 1) // 2)
    padded = -(-k // depth) * depth
    moved = batch * (n * k + n * n * (2 if has_c else 1)) * itemsize
    return Work(tiles, 2 * tiles * tile * tile * padded, 2 * batch * n * n * k, moved)


def product(batch: int, n: int, m: int, tile: tuple[int, int], depth: int, itemsize: int = 2) -> Work:
    """Y = aX + PX.

    Args:
        batch: matrices.
        n: rows of X.
        m: columns of X.
        tile: rows and columns of a tile.
        depth: columns of P multiplied at a time.
        itemsize: bytes of an element.

    Returns:
        The launch's work.
    """
    rows, columns = tile
    tiles = batch * -(-n // rows) * -(-m // columns)
    padded = -(-n // depth) * depth
    moved = batch * (n * n + 2 * n * m) * itemsize
    return Work(tiles, 2 * tiles * rows * columns * padded, 2 * batch * n * n * m, moved)
