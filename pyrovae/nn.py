"""Small networks whose inputs may carry any number of leading dimensions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from math import prod
from numbers import Integral
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyrovae._tools import InputError
from pyrovae._tools.whole import longest, whole

__all__ = ["BackwardGRU", "ConvDecoder", "ConvEncoder", "MLP", "Units", "lasting", "whole"]

# One column: its name, its kind, its categories, and mean and standard deviation in its units.
Column = tuple[str, str, Sequence[str], float, float]
# In which units a number is about normal.
UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "real": torch.clone,
    "positive": torch.log,
    "count": torch.log1p,
}


class MLP(nn.Module):
    r"""A fully connected network from events of one shape to events of another.

    .. math:: h_0 = \mathrm{vec}(x), \quad h_{i+1} = a(W_i h_i + b_i), \quad
              y = W_L h_L + b_L

    Everything to the left of the input event is a batch dimension, so a plate of particles
    costs no reshaping: ``[K, N, *in_shape]`` gives ``[K, N, *out_shape]``. With a mask, the network
    sees zeros where the input is missing.

    Args:
        in_shape: The event shape of the input, ``[D]`` or ``[C, H, W]``; an int means ``[D]``.
        out_shape: The event shape of the output.
        hidden: The widths of the hidden layers; ``()`` makes the map affine.
        activation: The name of a :mod:`torch.nn` activation (``"ReLU"``), or a class; "GLU" gates
            every hidden layer, h · sigmoid(g) with h and g affine, of the widths as given.
        gated: The same as ``activation="GLU"``.
        blocks: The number of residual blocks after each hidden layer, each
            :math:`h + W_2 a(W_1 h + b_1) + b_2` of the layer's width (arXiv 1603.05027).
        batch_norm: Normalize what each activation is given, over all leading dimensions together
            in training, and by running statistics in evaluation (arXiv 1502.03167). With averaged
            weights these are those of the last steps' weights: seen, 0.005 to 0.1 nats off.

    Raises:
        ValueError: If a width is not positive, or there is no such activation.

    Example:
        >>> MLP(20, (1, 28, 28))(torch.zeros(5, 3, 20)).shape
        torch.Size([5, 3, 1, 28, 28])
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: int | Sequence[int],
        hidden: int | Sequence[int] = (400,),
        activation: str | type[nn.Module] = "ReLU",
        gated: bool = False,
        blocks: int = 0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape = _shape(in_shape), _shape(out_shape)
        widths = [prod(self.in_shape), *_shape(hidden), prod(self.out_shape)]
        if min(widths) < 1:
            raise InputError(f"Expected layers of positive width, got {widths}.")
        activation = _activation("GLU" if gated else activation)
        # torch.nn.GLU halves the last dimension.
        doubled = 2 if activation is nn.GLU else 1

        def hidden_layer(fan_in: int, width: int) -> list[nn.Module]:
            # Before a normalization a bias does nothing, and its gradient is rounding alone.
            affine = nn.Linear(fan_in, doubled * width, bias=not batch_norm)
            return [affine, *([_RowNorm(doubled * width)] if batch_norm else []), activation()]

        layers: list[nn.Module] = []
        for fan_in, width in pairwise(widths[:-1]):
            layers += hidden_layer(fan_in, width)
            for _ in range(blocks):
                layers.append(_Sum(*hidden_layer(width, width), nn.Linear(width, width)))
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))

    @property
    def last(self) -> nn.Linear:
        """The last affine map, with ``weight`` W_L and ``bias`` b_L; the only one if affine."""
        return cast(nn.Linear, self.layers[-1])

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> Tensor:
        """Map ``[..., *in_shape]``, as 0 where ``mask`` is false, to ``[..., *out_shape]``."""
        x, batch = _observed(x, mask), _batch(x, self.in_shape)
        return self.layers(x.reshape(*batch, -1)).reshape(*batch, *self.out_shape)


class ConvEncoder(nn.Module):
    """A convolutional network from images to events of another shape.

    Each convolution, 4x4 with stride 2, halves height and width (rounded down); an :class:`MLP`
    reads what is left. Everything to the left of the image is a batch dimension, as in the MLP.

    Args:
        in_shape: The event shape of the images, ``[C, H, W]``.
        out_shape: The event shape of the output.
        channels: The channels of the convolutions, from the image inwards.
        hidden: The widths of the MLP's hidden layers.
        activation: The name of a :mod:`torch.nn` module (``"ReLU"``), or its class.
        blocks: The number of residual blocks at every size but the image's own, each
            :math:`h + W_2 a(W_1 a(h))` with 3x3 convolutions (arXiv 1603.05027).

    Raises:
        ValueError: If the images are no ``[C, H, W]``, or too small to be halved so often.

    Example:
        >>> ConvEncoder((1, 28, 28), (2, 20))(torch.zeros(5, 3, 1, 28, 28)).shape
        torch.Size([5, 3, 2, 20])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: int | Sequence[int],
        channels: Sequence[int] = (32, 64),
        hidden: int | Sequence[int] = (256,),
        activation: str | type[nn.Module] = "ReLU",
        blocks: int = 0,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape = _shape(in_shape), _shape(out_shape)
        *_, last = sizes = _image_sizes(self.in_shape, channels)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers.append(nn.Conv2d(before[0], after[0], 4, 2, 1))
            layers += [_residual(after[0], activation) for _ in range(blocks)]
            layers.append(_activation(activation)())
        self.layers = nn.Sequential(*layers)
        self.head = MLP(last, out_shape, hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> Tensor:
        """Map ``[..., *in_shape]``, as 0 where ``mask`` is false, to ``[..., *out_shape]``."""
        x, batch = _observed(x, mask), _batch(x, self.in_shape)
        seen = self.layers(x.reshape(-1, *self.in_shape))
        return self.head(seen).reshape(*batch, *self.out_shape)


class ConvDecoder(nn.Module):
    """A convolutional network from events of any shape to images: the encoder turned round.

    An :class:`MLP` makes a small image, and each transposed convolution, 4x4 with stride 2,
    doubles it, to the very sizes that :class:`ConvEncoder` passes through.

    Args:
        in_shape: The event shape of the input; an int means ``[D]``.
        out_shape: The event shape of the images, ``[C, H, W]``.
        channels: The channels of the convolutions, from the image inwards, as in the encoder.
        hidden: The widths of the MLP's hidden layers.
        activation: The name of a :mod:`torch.nn` module (``"ReLU"``), or its class.
        blocks: The number of residual blocks at every size but the image's own, each
            :math:`h + W_2 a(W_1 a(h))` with 3x3 convolutions (arXiv 1603.05027).

    Raises:
        ValueError: If the images are no ``[C, H, W]``, or too small to be halved so often.

    Example:
        >>> ConvDecoder(20, (1, 28, 28))(torch.zeros(5, 3, 20)).shape
        torch.Size([5, 3, 1, 28, 28])
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        hidden: int | Sequence[int] = (256,),
        activation: str | type[nn.Module] = "ReLU",
        blocks: int = 0,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape = _shape(in_shape), _shape(out_shape)
        first, *_ = sizes = _image_sizes(self.out_shape, channels)[::-1]
        self.stem = MLP(in_shape, first, hidden, activation)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            odd = after[1] % 2, after[2] % 2
            conv = nn.ConvTranspose2d(before[0], after[0], 4, 2, 1, output_padding=odd)
            layers += [_residual(before[0], activation) for _ in range(blocks)]
            layers += [_activation(activation)(), conv]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Map ``[..., *in_shape]`` to ``[..., *out_shape]``."""
        batch = _batch(z, self.in_shape)
        small = self.stem(z.reshape(-1, *self.in_shape))
        return self.layers(small).reshape(*batch, *self.out_shape)


class BackwardGRU(nn.Module):
    r"""A recurrent network that reads a sequence from its last step to its first.

    .. math:: h_t = \mathrm{GRU}(h_{t+1}, x_t), \qquad h_{T_n + 1} = 0

    Each sequence begins at its own last step T_n, whatever the padding behind it.

    Args:
        in_shape: The number of features of a step.
        hidden: The width of h.

    Example:
        >>> BackwardGRU(88, 32)(torch.zeros(5, 20, 88), torch.full((5,), 20)).shape
        torch.Size([5, 20, 32])
    """

    def __init__(self, in_shape: int, hidden: int) -> None:
        super().__init__()
        self.gru = _GRU(in_shape, hidden)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map ``[N, T, D]`` of lengths ``[N]`` to h ``[N, T, H]``."""
        steps, lengths = torch.arange(x.shape[1], device=x.device), lengths[:, None]
        turned = torch.where(steps < lengths, lengths - 1 - steps, steps)[..., None]
        seen = whole(_read, self.gru, x.gather(1, turned.expand_as(x)), lengths.to(x.dtype))
        return seen.gather(1, turned.expand_as(seen))


class Units(nn.Module):
    """The columns of a table as numbers of about unit size, C categories as one number each.

    Real columns are standardized, positive ones and counts by their logarithms.

    Args:
        columns: ``data.columns``, or ``data.context_columns``.

    Example:
        >>> columns = [("age", "real", (), 50.0, 10.0), ("sex", "binary", ("F", "M"), 0.0, 1.0)]
        >>> Units(columns)(torch.tensor([[60.0, 1.0]]))
        tensor([[1., 0., 1.]])
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        self.columns = list(columns)
        self.width = sum(max(len(categories), 1) for _, _, categories, _, _ in columns)

    def forward(self, x: Tensor, mask: Tensor | bool = True) -> Tensor:
        """Map ``[..., D]`` to ``[..., width]``, 0 where ``mask`` is false."""
        mask = torch.ones_like(x, dtype=torch.bool) & mask
        # 1 is possible in every column, and no logarithm of it is infinite.
        values, parts = x.masked_fill(~mask, 1.0)[..., None], [x[..., :0]]
        for j, (_, kind, categories, loc, scale) in enumerate(self.columns):
            if categories:
                value = values[..., j, :] == torch.arange(len(categories), device=x.device)
            else:
                value = (UNITS.get(kind, torch.clone)(values[..., j, :]) - loc) / scale
            parts.append(value * mask[..., j, None])
        return torch.cat(parts, -1)

    def beside(
        self, x: Tensor, *context: Tensor, mask: Tensor | bool = True
    ) -> tuple[Tensor, Tensor]:
        """The covariates ``[N, width]`` of what programs take beside x ``[N, D]``, and the mask.

        ``context`` are these columns ``[N]``, and the mask ``[N, D]`` if it has no name.
        """
        if mask is True and context and context[-1].shape == x.shape:
            context, mask = context[:-1], context[-1]
        if len(context) != len(self.columns):
            raise InputError(
                f"Expected context {[name for name, *_ in self.columns]} and perhaps a mask of x, "
                f"got {len(context)} columns: give context_columns=data.context_columns."
            )
        # Of x only what it is like: a decoder is exported that reads none of it.
        empty = torch.zeros(len(x), 0, dtype=x.dtype, device=x.device)
        covariates = torch.cat([empty, *(value[:, None] for value in context)], -1)
        return self(covariates), torch.ones(x.shape, dtype=torch.bool, device=x.device) & mask


class _GRU(nn.Module):
    """torch's GRU, without the second list of its weights that functional_call leaves behind."""

    def __init__(self, in_shape: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        for name, weight in nn.GRU(in_shape, hidden).named_parameters():
            self.register_parameter(name, weight)

    def forward(self, x: Tensor) -> Tensor:
        first = x.new_zeros(1, len(x), self.hidden)
        # What training asks for is kept where there is a backward pass to come: cuDNN asks for it.
        kept = torch.is_grad_enabled()
        # cuDNN would have the weights in one piece, and copies them to one; it says so each time.
        quiet = warnings.catch_warnings(action="ignore") if x.is_cuda else nullcontext()
        with quiet:
            return torch.gru(x, first, [*self.parameters()], True, 1, 0.0, kept, False, True)[0]


def _read(gru: _GRU, x: Tensor, lengths: Tensor) -> Tensor:
    """h ``[N, T, H]``, as 0 behind the longest sequence."""
    count = longest(lengths, x.shape[1])
    return pad(gru(x[:, :count]), (0, 0, 0, x.shape[1] - count))


def lasting(mask: Tensor) -> Tensor:
    """Which steps ``[N, T]`` are none of the padding, where nothing of ``[N, T, D]`` is seen."""
    return mask.any(-1).flip(-1).cumsum(-1).flip(-1) > 0


class _RowNorm(nn.BatchNorm1d):
    """Batch normalization of ``[..., D]``, particles and data alike."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.reshape(-1, h.shape[-1])).reshape(h.shape)


class _Sum(nn.Module):
    """h + f(h): the sum itself is not bent, so that gradients pass through it whole."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.layers(h)


def _residual(width: int, activation: str | type[nn.Module]) -> _Sum:
    """h + W₂ a(W₁ a(h)), of 3x3 convolutions."""
    bend = _activation(activation)
    convolutions = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
    return _Sum(*(part for conv in convolutions for part in (bend(), conv)))


def _image_sizes(shape: torch.Size, channels: Sequence[int]) -> list[tuple[int, int, int]]:
    """The image's ``[C, H, W]``, and those of what each halving leaves."""
    channels = tuple(_shape(channels))
    if len(shape) != 3:
        raise InputError(f"Expected images [C, H, W], got {list(shape)}: use an MLP for others.")
    if min(shape[1:]) < 2 ** len(channels):
        raise InputError(
            f"Expected images of {2 ** len(channels)} pixels and more on a side, to be halved "
            f"{len(channels)} times, got {list(shape)}: give fewer channels than {channels}."
        )
    return [
        (width, shape[1] >> depth, shape[2] >> depth)
        for depth, width in enumerate((shape[0], *channels))
    ]


def _observed(x: Tensor, mask: Tensor | bool) -> Tensor:
    """x with zeros where it is missing, whatever stands there."""
    return x if isinstance(mask, bool) else x.masked_fill(~mask, 0.0)


def _batch(x: Tensor, shape: torch.Size) -> torch.Size:
    batch = x.shape[: x.dim() - len(shape)]
    if x.shape[len(batch) :] != shape:
        raise InputError(f"Expected events of shape {list(shape)}, got a tensor {list(x.shape)}.")
    return batch


def _shape(shape: int | Sequence[int]) -> torch.Size:
    sizes = [*shape] if isinstance(shape, Iterable) else [shape]
    if not all(isinstance(size, Integral) for size in sizes):
        raise InputError(f"Expected whole numbers for the sizes of a network, got {shape!r}.")
    return torch.Size(sizes)


def _activation(activation: str | type[nn.Module]) -> type[nn.Module]:
    """A class that makes a nonlinearity; by name one of torch's own alone.

    An empty "Sequential", which torch.nn has as well, would make a network linear in silence.
    """
    found = getattr(nn, activation, None) if isinstance(activation, str) else activation
    known = isinstance(found, type) and issubclass(found, nn.Module)
    if known and isinstance(activation, str):
        known = cast(type, found).__module__ in (nn.ReLU.__module__, nn.Identity.__module__)
    try:
        if known:
            cast(type, found)()
    except TypeError:
        known = False
    if not known:
        raise InputError(
            f"Expected an activation of torch.nn that takes no arguments, such as 'ReLU' or "
            f"'Tanh', got {activation!r}."
        )
    return cast("type[nn.Module]", found)
