"""Convolutional networks take images of any size, and any number of leading dimensions."""

import pytest
import torch

from pyrovae.nn import ConvDecoder, ConvEncoder

SIZES = [(1, 8, 8), (3, 9, 13), (2, 11, 8), (1, 28, 28), (3, 4, 5)]
each_size = pytest.mark.parametrize("shape", SIZES, ids=str)
each_depth = pytest.mark.parametrize("blocks", [0, 2])


def encoder(shape, blocks=0):
    return ConvEncoder(shape, (2, 5), channels=(3, 4), hidden=(6,), blocks=blocks)


def decoder(shape, blocks=0):
    return ConvDecoder((2, 5), shape, channels=(3, 4), hidden=(6,), blocks=blocks)


@each_size
@each_depth
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_leading_dimensions_are_a_loop_over_single_images(shape, batch, blocks):
    nets = (encoder(shape, blocks), shape, (2, 5)), (decoder(shape, blocks), (2, 5), shape)
    for net, before, after in nets:
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


@each_depth
def test_every_parameter_takes_part(blocks):
    shape = (1, 8, 8)
    for net, x in (
        (encoder(shape, blocks), torch.randn(4, *shape)),
        (decoder(shape, blocks), None),
    ):
        net(torch.randn(4, 2, 5) if x is None else x).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


def test_a_residual_block_adds_to_what_it_is_given():
    """With its last convolution at zero it is the identity."""
    for make, x in ((encoder, torch.randn(4, 1, 8, 8)), (decoder, torch.randn(4, 2, 5))):
        plain, deep = make((1, 8, 8)), make((1, 8, 8), 2)
        blocks = [layer for layer in deep.layers if hasattr(layer, "layers")]
        assert len(blocks) == 4
        others = [layer for layer in deep.layers if layer not in blocks]
        ends = [getattr(net, "head", None) or net.stem for net in (plain, deep)]
        for one, other in [*zip(plain.layers, others, strict=True), ends]:
            other.load_state_dict(one.state_dict())
        assert not torch.allclose(plain(x), deep(x))
        for block in blocks:
            torch.nn.init.zeros_(block.layers[-1].weight)
            torch.nn.init.zeros_(block.layers[-1].bias)
        assert torch.equal(plain(x), deep(x))


@pytest.mark.parametrize("make", [encoder, decoder])
def test_what_is_no_image_is_refused(make):
    with pytest.raises(ValueError, match=r"Expected images \[C, H, W\]"):
        make((784,))
    with pytest.raises(ValueError, match="give fewer channels"):
        make((1, 3, 28))
    with pytest.raises(ValueError, match="Expected events of shape"):
        make((1, 8, 8))(torch.zeros(4, 1, 8, 9))
