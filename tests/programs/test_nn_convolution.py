"""Convolutional networks take images of any size, and any number of leading dimensions."""

import pytest
import torch

from pyrovae.nn import ConvDecoder, ConvEncoder

SIZES = [(1, 8, 8), (3, 9, 13), (2, 11, 8), (1, 28, 28)]
each_size = pytest.mark.parametrize("shape", SIZES, ids=str)


def encoder(shape):
    return ConvEncoder(shape, (2, 5), channels=(3, 4), hidden=(6,))


def decoder(shape):
    return ConvDecoder((2, 5), shape, channels=(3, 4), hidden=(6,))


@each_size
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_leading_dimensions_are_a_loop_over_single_images(shape, batch):
    for net, before, after in ((encoder(shape), shape, (2, 5)), (decoder(shape), (2, 5), shape)):
        x = torch.randn(*batch, *before)
        y = net(x)
        assert y.shape == (*batch, *after)
        alone = [net(one) for one in x.reshape(-1, *before)]
        torch.testing.assert_close(y.reshape(-1, *after), torch.stack(alone))


@each_size
def test_the_decoder_passes_through_the_sizes_of_the_encoder(shape):
    inwards, outwards = [shape], []
    x = torch.randn(1, *shape)
    for layer in encoder(shape).layers:
        x = layer(x)
        inwards += [x.shape[1:]] if isinstance(layer, torch.nn.Conv2d) else []
    net = decoder(shape)
    x = net.stem(torch.randn(1, 2, 5))
    outwards.append(x.shape[1:])
    for layer in net.layers:
        x = layer(x)
        outwards += [x.shape[1:]] if isinstance(layer, torch.nn.ConvTranspose2d) else []
    assert [tuple(size) for size in inwards] == [tuple(size) for size in reversed(outwards)]


def test_a_pixel_is_seen_nearby_alone():
    net, x = encoder((1, 28, 28)), torch.zeros(1, 1, 28, 28)
    moved = x.clone()
    moved[..., 14, 14] = 1.0
    changed = (net.layers(moved) != net.layers(x)).any(1)[0]
    rows, columns = changed.nonzero().T
    assert len(rows) > 0
    for place in (rows, columns):
        assert place.min() >= 2
        assert place.max() <= 4


def test_convolutions_are_bent_in_between():
    nets = (
        (ConvEncoder((1, 8, 8), 5, (3,), hidden=()), (1, 8, 8)),
        (ConvDecoder(5, (1, 8, 8), (3,), hidden=()), (5,)),
    )
    for net, shape in nets:
        x = torch.randn(1, *shape)
        bend = net(x) + net(-x) - 2 * net(torch.zeros_like(x))
        assert bend.abs().max() > 1e-3


def test_every_parameter_takes_part():
    for net, x in ((encoder((1, 8, 8)), torch.randn(4, 1, 8, 8)), (decoder((1, 8, 8)), None)):
        net(torch.randn(4, 2, 5) if x is None else x).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


@pytest.mark.parametrize("make", [encoder, decoder])
def test_what_is_no_image_is_refused(make):
    with pytest.raises(ValueError, match=r"Expected images \[C, H, W\]"):
        make((784,))
    with pytest.raises(ValueError, match="give fewer channels"):
        make((1, 3, 28))
    with pytest.raises(ValueError, match="Expected events of shape"):
        make((1, 8, 8))(torch.zeros(4, 1, 8, 9))
