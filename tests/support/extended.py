"""The block and the loss in numpy's long double, forward and backward by hand: the truth for float64.

It is independent of `mrcn_fast.reference`, which it also checks: the backward here is the chain rule written
out step by step through the literal equations, with the normalized features and the residual as arrays. On a
machine whose long double is a float64, `PRECISE` is False and these results are no better than float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PRECISE = bool(np.finfo(np.longdouble).eps < np.finfo(np.float64).eps)
PLANE = (2, 3)


class Normalization:
    """F̃ (eq. 1, 2); the constructor computes the forward."""

    def __init__(self, x: Array, weight: Array, bias: Array, eps: float) -> None:
        centered = x - x.mean(axis=PLANE, keepdims=True)
        self.deviation = np.sqrt((centered**2).mean(axis=PLANE, keepdims=True) + np.longdouble(eps))
        self.unit = centered / self.deviation
        self.weight = weight[:, None, None]
        self.result: Array = self.weight * self.unit + bias[:, None, None]

    def backward(self, gradient: Array) -> tuple[Array, Array, Array]:
        """Gradients of x, weight and bias."""
        of_unit = gradient * self.weight
        of_x = (
            of_unit
            - of_unit.mean(axis=PLANE, keepdims=True)
            - self.unit * (of_unit * self.unit).mean(axis=PLANE, keepdims=True)
        ) / self.deviation
        return of_x, (gradient * self.unit).sum(axis=(0, 2, 3)), gradient.sum(axis=(0, 2, 3))


class Gate:
    """A(M) of one modality and one gate; the constructor computes the forward."""

    def __init__(self, kind: str, residual: Array, parameters: Sequence[Array]) -> None:
        self.kind, self.residual, self.parameters = kind, residual, parameters
        self.pooled = [residual.mean(axis=PLANE)]
        if kind == "cbam-channel":
            self.pooled.append(residual.max(axis=PLANE))
        logits = self._convolved() if kind == "eca" else self._excited()
        self.result: Array = 1 / (1 + np.exp(-logits))

    def _convolved(self) -> Array:
        (weight,) = self.parameters
        half, channels = len(weight) // 2, self.residual.shape[1]
        self.padded = np.pad(self.pooled[0], ((0, 0), (half, half)))
        terms = (weight[k] * self.padded[:, k : k + channels] for k in range(len(weight)))
        return sum(terms, np.zeros_like(self.pooled[0]))

    def _excited(self) -> Array:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = self.parameters
        self.hidden = [z @ fc1_weight.T + fc1_bias for z in self.pooled]
        terms = (np.maximum(h, 0) @ fc2_weight.T + fc2_bias for h in self.hidden)
        return sum(terms, np.zeros_like(self.pooled[0]))

    def backward(self, gradient: Array) -> tuple[Array, list[Array]]:
        """Gradients of the residual and of the parameters."""
        of_logits = gradient * self.result * (1 - self.result)
        size = self.residual.shape[2] * self.residual.shape[3]
        if self.kind == "eca":
            of_pooled, of_parameters = self._convolved_backward(of_logits)
            return np.broadcast_to(of_pooled[:, :, None, None] / size, self.residual.shape), of_parameters
        fc1_weight, _, fc2_weight, _ = self.parameters
        totals = [np.zeros_like(p) for p in self.parameters]
        pooled_gradients = []
        for z, h in zip(self.pooled, self.hidden, strict=True):
            of_hidden = (of_logits @ fc2_weight) * (h > 0)
            for total, term in zip(
                totals,
                (of_hidden.T @ z, of_hidden.sum(0), of_logits.T @ np.maximum(h, 0), of_logits.sum(0)),
                strict=True,
            ):
                total += term
            pooled_gradients.append((of_hidden @ fc1_weight)[:, :, None, None])
        of_residual = np.broadcast_to(pooled_gradients[0] / size, self.residual.shape).copy()
        if self.kind == "cbam-channel":
            largest = self.residual == self.pooled[1][:, :, None, None]
            of_residual += largest * pooled_gradients[1] / largest.sum(axis=PLANE, keepdims=True)
        return of_residual, totals

    def _convolved_backward(self, of_logits: Array) -> tuple[Array, list[Array]]:
        (weight,) = self.parameters
        half, channels = len(weight) // 2, self.residual.shape[1]
        of_padded = np.zeros_like(self.padded)
        of_weight = np.zeros_like(weight)
        for k in range(len(weight)):
            of_padded[:, k : k + channels] += weight[k] * of_logits
            of_weight[k] = (of_logits * self.padded[:, k : k + channels]).sum()
        return of_padded[:, half : half + channels], [of_weight]


class Modality:
    """F̃, M and the gates of one input; gradients gather in `of_normalized`, `of_residual`, `of_input`."""

    def __init__(
        self, x: Array, weight: Array, bias: Array, gates: dict[int, Sequence[Array]], kind: str, eps: float
    ) -> None:
        self.x = x
        self.normalization = Normalization(x, weight, bias, eps)
        self.normalized = self.normalization.result
        self.residual = x - self.normalized
        self.gates = {index: Gate(kind, self.residual, p) for index, p in gates.items()}
        self.of_input, self.of_normalized = np.zeros_like(x), np.zeros_like(x)
        self.of_residual = np.zeros_like(x)
        self.of_gates = {index: np.zeros_like(gate.result) for index, gate in self.gates.items()}

    def scale(self, index: int) -> Array:
        return self.gates[index].result[:, :, None, None]

    def distilled(self, index: int) -> Array:
        """M x A(M) (eq. 4, 6)."""
        return self.residual * self.scale(index)

    def distilled_backward(self, index: int, gradient: Array) -> None:
        self.of_residual += gradient * self.scale(index)
        self.of_gates[index] += (gradient * self.residual).sum(axis=PLANE)

    def backward(self) -> tuple[Array, Array, Array, dict[int, list[Array]]]:
        """Gradients of x, norm weight, norm bias and each gate's parameters."""
        of_parameters = {}
        for index, gate in self.gates.items():
            of_residual, of_parameters[index] = gate.backward(self.of_gates[index])
            self.of_residual += of_residual
        of_x, of_weight, of_bias = self.normalization.backward(self.of_normalized - self.of_residual)
        return of_x + self.of_input + self.of_residual, of_weight, of_bias, of_parameters


def block(
    mode: str,
    inputs: Sequence[Array],
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    *,
    gate: str,
    eps: float,
    restitute_to: str,
    output_names: Sequence[str],
    input_names: Sequence[str],
    parameter_names: Sequence[str],
) -> dict[str, Array]:
    """Outputs and gradients of a block operation, named as `block_cases.evaluate` names them."""
    norm_weight, norm_bias, *gate_parameters = parameters
    # Gates in the order A_v1, A_n1, A_v2, A_n2: modality m has m and m + 2.
    owned = ((0, 2), (1, 3)) if len(inputs) == 2 else ((0,),)
    modalities = [
        Modality(x, w, b, {i: [p[i] for p in gate_parameters] for i in indices}, gate, eps)
        for x, w, b, indices in zip(inputs, norm_weight, norm_bias, owned, strict=True)
    ]
    operation = {"pair": _pair, "concat": _concat, "restitute": _restitute, "snr": _snr}[mode]
    outputs = operation(modalities, list(gradients), restitute_to)
    results = dict(zip(output_names, outputs, strict=True))
    of_parameters = [np.zeros_like(p) for p in parameters]
    for m, modality in enumerate(modalities):
        of_x, of_parameters[0][m], of_parameters[1][m], of_gates = modality.backward()
        results[f"grad {input_names[m]}"] = of_x
        for index, of_gate in of_gates.items():
            for total, term in zip(of_parameters[2:], of_gate, strict=True):
                total[index] = term
    return results | {f"grad {name}": g for name, g in zip(parameter_names, of_parameters, strict=True)}


def _restituted(m: Modality, index: int, gradient: Array, restitute_to: str) -> Array:
    """The restituted features (eq. 5); their gradients are added to the modality's."""
    to_input = restitute_to == "input"
    (m.of_input if to_input else m.of_normalized)[...] += gradient
    m.distilled_backward(index, gradient)
    return (m.x if to_input else m.normalized) + m.distilled(index)


def _compensated(m: Modality, other: Modality, index: int, gradient: Array) -> Array:
    """The compensated features (eq. 7); their gradients are added to the modalities'."""
    m.of_normalized += gradient
    other.distilled_backward(index, gradient)
    return m.normalized + other.distilled(index)


def _pair(modalities: list[Modality], gradients: list[Array], restitute_to: str) -> tuple[Any, ...]:
    v, n = modalities
    return (
        _restituted(v, 0, gradients[0], restitute_to),
        _compensated(v, n, 3, gradients[1]),
        _compensated(n, v, 2, gradients[2]),
        _restituted(n, 1, gradients[3], restitute_to),
    )


def _concat(modalities: list[Modality], gradients: list[Array], restitute_to: str) -> tuple[Any, ...]:
    v, n = modalities
    of_v, *of_made, of_n = np.split(gradients[0], 6)
    v.of_input += of_v
    n.of_input += of_n
    return (np.concatenate([v.x, *_pair(modalities, of_made, restitute_to), n.x]),)


def _restitute(modalities: list[Modality], gradients: list[Array], restitute_to: str) -> tuple[Any, ...]:
    return (_restituted(modalities[0], 0, gradients[0], restitute_to),)


def _snr(modalities: list[Modality], gradients: list[Array], restitute_to: str) -> tuple[Any, ...]:
    (m,) = modalities
    restituted, contaminated, normalized = gradients
    m.of_normalized += restituted + contaminated + normalized
    m.distilled_backward(0, restituted - contaminated)
    m.of_residual += contaminated
    return (m.normalized + m.distilled(0), m.normalized + m.residual - m.distilled(0), m.normalized)


class UnitRows:
    """Rows divided by their length, which must be at least 1e-12; the constructor computes the forward."""

    def __init__(self, x: Array) -> None:
        self.length = np.sqrt((x**2).sum(axis=1, keepdims=True))
        self.result: Array = x / self.length

    def backward(self, gradient: Array) -> Array:
        along = (self.result * gradient).sum(axis=1, keepdims=True)
        return (gradient - self.result * along) / self.length


def cqc(
    features: Sequence[Array],
    labels: NDArray[np.int64],
    infrared_labels: NDArray[np.int64],
    gradient: Array,
    *,
    margin: float,
    reduction: str,
    detach_negative: bool,
    normalize: bool,
) -> dict[str, Array]:
    """Loss and gradients of eq. 8-10, named as `cqc_cases.evaluate` names them."""
    visible, infrared = len(labels), len(infrared_labels)
    ends = np.cumsum([visible] * 3 + [infrared] * 3)[:-1]
    sets = np.split(features[0], ends) if len(features) == 1 else list(features)
    given = [UnitRows(s) for s in sets]
    if normalize:
        sets = [rows.result for rows in given]
    of_sets = [np.zeros_like(s) for s in sets]
    identities = np.intersect1d(labels, infrared_labels)
    factor = np.longdouble(1) / (len(identities) if reduction == "mean" else 1)
    losses = np.zeros(len(identities), dtype=np.longdouble)
    for i, identity in enumerate(identities):
        members = [of == identity for of in (labels,) * 3 + (infrared_labels,) * 3]
        c = [s[m].mean(axis=0) for s, m in zip(sets, members, strict=True)]
        of_c = [np.zeros_like(x) for x in c]
        weight = gradient[i] if reduction == "none" else gradient * factor
        # new center, the other modality's original, its own original: eq. 8 twice, eq. 9 twice
        for new, other, own in ((1, 5, 0), (4, 0, 5), (2, 5, 0), (3, 0, 5)):
            positive, towards = _distance(c[new], c[other])
            negative, away = _distance(c[new], c[own])
            hinge = np.longdouble(margin) + positive - negative
            if hinge <= 0:
                continue
            losses[i] += hinge
            of_c[new] += weight * towards
            of_c[other] -= weight * towards
            if not detach_negative:
                of_c[new] -= weight * away
                of_c[own] += weight * away
        for of_set, m, g in zip(of_sets, members, of_c, strict=True):
            of_set[m] += g / m.sum()
    if normalize:
        of_sets = [rows.backward(g) for rows, g in zip(given, of_sets, strict=True)]
    loss = losses if reduction == "none" else losses.sum() * factor
    of_features = [np.concatenate(of_sets)] if len(features) == 1 else of_sets
    return {"loss": np.asarray(loss), **{f"grad {i}": g for i, g in enumerate(of_features)}}


def _distance(a: Array, b: Array) -> tuple[np.longdouble, Array]:
    """D(a, b) and its gradient with respect to a, which is zero where D is clamped."""
    square = ((a - b) ** 2).sum()
    if square < 1e-12:
        return np.sqrt(np.longdouble(1e-12)), np.zeros_like(a)
    root = np.sqrt(square)
    return root, (a - b) / root
