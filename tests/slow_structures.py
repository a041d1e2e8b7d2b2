"""A structure run tap by tap, group by group, written from the papers and not from the package: the reference
that layers are compared with.

It shares with the package only the description itself (which maps, in which order, what follows) and the
arrays. Everything runs in NumPy. Arrays may be complex: every operation is analytic, so that the imaginary
part of the output for `w + 1e-30j * v` is 1e-30 times the exact derivative along v.
"""

import itertools

import numpy as np

from repopt_jax.core.branches import AfterPointwise, Average, Frequency, Identity, Kernel, Local, Pool
from repopt_jax.core.structure import Geometry

MOMENTUM, EPSILON = 0.9, 1e-5  # of every batch norm here


def run(structure, arrays, x, *, training=False, wrong=""):
    """The sum of all chains for x, (batch, *spatial, in), and the running statistics afterwards.

    Args:
      structure: a `Structure`.
      arrays: {"weights": {key: w}, "scales": {key: s}, "norms": {key: {"scale", "bias", "mean", "var"}}}.
      x: the input.
      training: with the statistics of the batch.
      wrong: "" or the name of a mistake: "border", zeros in the padding after a norm; "bias", the first
        norm's shift left out; "groups", the first stage's channels handed on in another order; "sum", the
        norm after a sum of chains left out; "batch", in the padding the batch's statistics.
    """
    outputs, statistics = {}, {}
    for name, chain in structure.chains:
        y, border = x, np.zeros((x.shape[-1],))
        for j, stage in enumerate(chain):
            key = name if len(chain) == 1 else f"{name}_{j}"
            last = j + 1 == len(chain)
            layer = _layer(structure.layer, chain, j, y.shape[-1])
            taps = _taps(stage, arrays["weights"].get(key), layer, y.shape[-1])
            y = _sum_of_taps(y, taps, layer, border if wrong != "border" else 0 * border)
            border = sum(_by_group(border[None], w, layer.groups)[0] for _, w in taps)
            if key in arrays["scales"]:
                factors = np.repeat(arrays["scales"][key], stage.shared)
                y, border = y * factors, border * factors
            if key in arrays["norms"]:
                first = wrong == "bias" and not last
                # A norm that maps share sees one channel of each map, its positions as pixels.
                y, border = _maps(y, stage.shared), _maps(border, stage.shared)
                y, border, statistics[key] = _norm(y, border, arrays["norms"][key], training, first, wrong)
                y, border = _flat(y, stage.shared), _flat(border, stage.shared)
            if wrong == "groups" and not last:
                y = _interleaved(y, layer.groups)
            border = np.real(border)  # the padding has no gradient
        outputs[name] = y
    for name, members in structure.sums:
        y = sum(outputs.pop(member) for member in members)
        if wrong != "sum":
            y, _, statistics[name] = _norm(y, np.zeros(y.shape[-1]), arrays["norms"][name], training, False)
        outputs[name] = y
    return sum(outputs.values()), statistics


def _layer(layer, chain, j, inputs):
    """The geometry of stage j: depthwise over the window, 1x1 before or after that, or the layer's own."""
    if (t := chain[j].expansion) is not None:
        options = {name: getattr(layer, name) for name in ("strides", "dilation", "padding", "pad_mode")}
        return Geometry(layer.window, inputs, inputs * t, inputs, **options)
    if j + 1 < len(chain):
        return layer.pointwise(chain[j].channels or inputs)
    return layer if chain[0].expansion is None else layer.pointwise(layer.outputs)


def arrays_of(layer):
    """The layer's arrays as the reference takes them."""
    return {
        "weights": {key: np.asarray(w[...]) for key, w in layer.weights.items()},
        "scales": {key: np.asarray(s[...]) for key, s in layer.scales.items()},
        "norms": {
            key: {name: np.asarray(getattr(norm, name)[...]) for name in ("scale", "bias", "mean", "var")}
            for key, norm in layer.norms.items()
        },
    }


def image(layer, seed=1, size=5):
    """Two images, of odd and even sides where it can be, and large enough for the window."""
    least = [(n - 1) * d + 1 for n, d in zip(layer.window, layer.dilation)]
    shape = (2, *(max(size + i % 2, n) for i, n in enumerate(least)), layer.inputs)
    return np.random.default_rng(seed).normal(size=shape)


def _maps(y, shared):
    """(..., maps * positions) as (..., positions, maps), and as it is if nothing is shared."""
    return y if shared == 1 else np.swapaxes(y.reshape(*y.shape[:-1], -1, shared), -1, -2)


def _flat(y, shared):
    return y if shared == 1 else np.swapaxes(y, -1, -2).reshape(*y.shape[:-2], -1)


def _norm(y, border, norm, training, without_shift, wrong=""):
    mean, var = norm["mean"], norm["var"]
    if training:
        axes = tuple(range(y.ndim - 1))
        m, v = y.mean(axis=axes), ((y - y.mean(axis=axes)) ** 2).mean(axis=axes)
        mean, var = MOMENTUM * mean + (1 - MOMENTUM) * m, MOMENTUM * var + (1 - MOMENTUM) * v
    else:
        m, v = mean, var
    shift = 0 if without_shift else 1
    normalised = (y - shift * m) / np.sqrt(v + EPSILON) * norm["scale"] + shift * norm["bias"]
    at_mean, at_var = (m, v) if wrong == "batch" else (mean, var)
    at_border = (border - at_mean) / np.sqrt(at_var + EPSILON) * norm["scale"] + norm["bias"]
    return normalised, at_border, {"mean": mean, "var": var}


def _taps(stage, w, layer, inputs):
    """[(position in the window, (in/groups, out))] of one stage."""
    groups, out = layer.groups, layer.outputs
    window = layer.window
    centre = tuple(n // 2 for n in window)
    everywhere = list(itertools.product(*(range(n) for n in window)))
    own = np.zeros((inputs // groups, out))
    for o in range(out):
        own[o % (inputs // groups), o] = 1.0
    match stage.map:
        case Kernel(size, dilation):
            first = [(n - ((k - 1) * d + 1)) // 2 for n, k, d in zip(window, size, dilation)]
            found = []
            for index in itertools.product(*(range(k) for k in size)):
                at = tuple(f + i * d for f, i, d in zip(first, index, dilation))
                found.append((at, w[index] + (own if stage.residual else 0.0)))
            return found
        case AfterPointwise(size, matrix):
            matrix, each = np.asarray(matrix), out // groups
            first = [(n - k) // 2 for n, k in zip(window, size)]
            found = []
            for index in itertools.product(*(range(k) for k in size)):
                columns = [matrix[o // each % len(matrix)] @ w[index][:, o] for o in range(out)]
                found.append((tuple(f + i for f, i in zip(first, index)), np.stack(columns, -1)))
            return found
        case Identity():
            v = np.ones(out) if w is None else w
            return [(centre, own * v)]
        case Pool():
            v = np.ones(out) if w is None else w
            return [(at, own * v / len(everywhere)) for at in everywhere]
        case Frequency():
            return [(at, w.reshape(-1, out) * _cosines(at, window, out)) for at in everywhere]
        case Local(size):
            # Output channel s T + p is position p of map s, where pixel q has the tap q - p + size // 2.
            found = []
            for q in everywhere:
                matrix = np.zeros((inputs // groups, out), w.dtype)
                for o in range(out):
                    s, p = divmod(o, len(everywhere))
                    tap = [a - b + k // 2 for a, b, k in zip(q, everywhere[p], size)]
                    if all(0 <= t < k for t, k in zip(tap, size)):
                        matrix[:, o] = w[(*tap, slice(None), s)]
                found.append((q, matrix))
            return found
        case Average():
            return [(at, w.reshape(-1, out) / len(everywhere)) for at in everywhere]
    raise TypeError(stage.map)


def _cosines(at, window, out):
    """The frequency table at one tap: each axis has its share of the channels, and its own index of them."""
    row, share = np.zeros(out), [out * i // len(window) for i in range(len(window) + 1)]
    for axis, n in enumerate(window):
        for c in range(share[axis], share[axis + 1]):
            row[c] = np.cos(np.pi * (at[axis] + 0.5) * (c - share[axis] + 1) / n)
    return row


def _sum_of_taps(x, taps, layer, border):
    padded = _padded(x, layer, border)
    spans = [(k - 1) * d + 1 for k, d in zip(layer.window, layer.dilation)]
    sizes = [(n - span) // s + 1 for n, span, s in zip(padded.shape[1:-1], spans, layer.strides)]
    total = 0.0
    for at, w in taps:
        slices = [
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, n, s in zip(at, layer.dilation, sizes, layer.strides)
        ]
        total = total + _by_group(padded[(slice(None), *slices)], w, layer.groups)
    return total


def _padded(x, layer, border):
    """x with the constant `border` (or what `pad_mode` says) around it, or cut where padding is negative."""
    for axis, (before, after) in enumerate(layer.padding, start=1):
        size = x.shape[axis]
        cut = slice(max(-before, 0), size - max(-after, 0))
        x = x[(slice(None),) * axis + (cut,)]
        before, after = max(before, 0), max(after, 0)
        if layer.pad_mode == "constant":
            parts = []
            for count in (before, after):
                shape = [*x.shape]
                shape[axis] = count
                parts.append(np.broadcast_to(border, tuple(shape)))
            x = np.concatenate([parts[0], x, parts[1]], axis=axis)
        else:
            pads = [(0, 0)] * x.ndim
            pads[axis] = (before, after)
            x = np.pad(x, pads, layer.pad_mode)
    return x


def _by_group(x, w, groups):
    """(..., in) with (in/groups, out), group after group."""
    ins, outs = x.shape[-1] // groups, w.shape[-1] // groups
    return np.concatenate(
        [x[..., g * ins : (g + 1) * ins] @ w[:, g * outs : (g + 1) * outs] for g in range(groups)], axis=-1
    )


def _interleaved(y, groups):
    """Channels in the order that a layout with the groups last would give."""
    shape = y.shape
    return np.swapaxes(y.reshape(*shape[:-1], groups, shape[-1] // groups), -1, -2).reshape(shape)
