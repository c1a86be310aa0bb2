"""How the deltas of probes are put together: W(u) = W + sum_k c_k(u) D_k, D_k = s B_k A_k.

    linear    c = u                         the paper's (arXiv 2605.15220, section 3)
    norm      c = rho(u) u                  rho(u) = sum_k u_k |D_k| / |sum_k u_k D_k|

Deltas of different data hardly point the same way, so that their mean is shorter than each of them: with K
orthogonal ones of one length, by the square root of K. A model that trains on the mixture goes as far as one
that trains on a part of it. `norm` gives the mean back the length that the deltas have on average (Frobenius
norms over all adapted layers together). It changes nothing where one probe stands alone. rho is at most the
square root of K, which it is where K deltas are orthogonal: opposed ones, which cancel, are not blown up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from opmix_dist.models.lora import JointAdapters
from opmix_dist.search_config import InterpolationName


@torch.no_grad()
def gram(adapters: JointAdapters) -> np.ndarray:
    """Inner products <D_j, D_k> [K, K] float64, by layer s^2 tr((A_j A_k^T)(B_k^T B_j)): no delta is made."""
    count = len(adapters.names)
    found = torch.zeros(count, count, dtype=torch.float64)
    for layer in adapters.layers.values():
        A, B = layer.A.double(), layer.B.double()
        low, high = torch.einsum("jri,ksi->jkrs", A, A), torch.einsum("jor,kos->jkrs", B, B)
        found += (low * high).sum(dim=(2, 3)).cpu()
    products: np.ndarray = adapters.scale**2 * found.numpy()
    return products


@dataclass(frozen=True)
class Interpolation:
    """``gram``: of the probes' deltas; None: linear."""

    gram: np.ndarray | None = None

    @classmethod
    def of(cls, name: InterpolationName, adapters: JointAdapters) -> Interpolation:
        return cls(gram(adapters) if name == "norm" else None)

    def coefficients(self, U: np.ndarray) -> np.ndarray:
        """c [M, K] of candidates U [M, K]; of zeros, which are the snapshot, zeros."""
        if self.gram is None:
            return U
        found: np.ndarray = self._rho(U)[:, None] * U
        return found

    def gradients(self, U: np.ndarray, of_coefficients: np.ndarray) -> np.ndarray:
        """From dL/dc to dL/du, both [M, D, K], by the chain rule: rho dL/dc + (u . dL/dc) drho/du."""
        if self.gram is None:
            return of_coefficients
        rho, (mean, length) = self._rho(U), self._lengths(U)
        free = (length > 0) & (rho < self._most)
        slopes = np.zeros_like(U)
        slopes[free] = self._norms / length[free, None]
        slopes[free] -= (mean[free] / length[free] ** 3)[:, None] * (U[free] @ self.gram)
        along = np.einsum("mdk,mk->md", of_coefficients, U)
        found: np.ndarray = rho[:, None, None] * of_coefficients + along[:, :, None] * slopes[:, None, :]
        return found

    @property
    def _norms(self) -> np.ndarray:
        assert self.gram is not None
        return np.sqrt(np.diag(self.gram))

    @property
    def _most(self) -> float:
        return float(np.sqrt(len(self._norms)))

    def _lengths(self, U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the deltas' lengths, and the length of their mean, [M] each."""
        assert self.gram is not None
        squares = np.einsum("mj,jk,mk->m", U, self.gram, U)
        return U @ self._norms, np.sqrt(np.maximum(squares, 0))

    def _rho(self, U: np.ndarray) -> np.ndarray:
        mean, length = self._lengths(U)
        whole = np.full(len(U), self._most)  # also where deltas cancel to the last digit
        np.divide(mean, length, out=whole, where=length > 0)
        return np.minimum(whole, self._most)
