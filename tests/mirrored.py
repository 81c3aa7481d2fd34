"""Products as the Triton kernels compute them, without Triton."""

from __future__ import annotations

from torch import Tensor

from distmuon.kernels.products import TorchProducts


class Mirrored(TorchProducts):
    """Symmetric products as the Triton kernels compute them: the lower triangle, and its mirror image."""

    def gram(self, x_BMN: Tensor) -> Tensor:
        return mirror(super().gram(x_BMN))

    def square(self, r_BMM: Tensor, alpha: float) -> Tensor:
        return mirror(super().square(r_BMM, alpha))

    def product(self, p_BMM: Tensor, w_BMM: Tensor) -> Tensor:
        return mirror(super().product(p_BMM, w_BMM))

    def polynomial(self, r_BMM: Tensor, a: float, b: float, c: float) -> Tensor:
        return mirror(super().polynomial(r_BMM, a, b, c))


def mirror(y_BMM: Tensor) -> Tensor:
    return y_BMM.tril() + y_BMM.tril(-1).mT
