"""The step by hand, in PyTorch: as a good engineer writes it, and as fast as we could make it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from speed_problem import LR, Problem, Race
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = [
    "VAE",
    "binarized",
    "compiled_loss",
    "compiled_step",
    "cuda_graph",
    "eager",
    "graphed",
    "pixels",
]

BETAS, EPSILON = (0.9, 0.999), 1e-8
WARM_UP = 3
KEEP_RANDOM = {"fallback_random": True}
"""On a CPU PyTorch's generator is three times as fast as Inductor's own."""


class VAE(nn.Module):
    """Estimator B with the networks of a pair: summed over the batch, in nats."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        model, guide = problem.pair()
        self.decoder, self.encoder = copy.deepcopy(model.decoder), copy.deepcopy(guide.encoder)
        self.particles = problem.particles

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).unbind(-2)
        some = (self.particles,) if self.particles > 1 else ()
        noise = torch.randn((*some, *loc.shape), device=loc.device)
        logits = self.decoder(loc + log_scale.exp() * noise)
        misfit = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="sum")
        kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
        return misfit / self.particles + kl


def binarized(images: Tensor, rows: Tensor) -> Tensor:
    """A minibatch, drawn anew."""
    p = images[rows].float() / 255
    return (torch.rand_like(p) < p).float()


def pixels(problem: Problem, images: Tensor, rows: Tensor) -> Tensor:
    """A minibatch as the problem has it."""
    return binarized(images, rows) if problem.binarize else images[rows]


def eager(problem: Problem, images: Tensor) -> Race:
    """As a good engineer writes it."""
    vae = VAE(problem)
    return _each(_descend(lambda rows: vae(pixels(problem, images, rows)), vae))


def compiled_loss(problem: Problem, images: Tensor) -> Race:
    """Images to loss under ``torch.compile``, then the fused Adam."""
    vae = VAE(problem)
    loss_of = torch.compile(
        lambda rows: vae(pixels(problem, images, rows)), **_options(problem, "reduce-overhead")
    )
    step = _descend(loss_of, vae)
    return _each(lambda rows: step(rows).clone())


def compiled_step(problem: Problem, images: Tensor) -> Race:
    """Everything in one function under ``torch.compile``: gather, draw, gradients, Adam.

    What depends on the number of the step is worked out before, for inside it would be worked out
    anew for every weight. On a CPU, pixels are drawn from 16 random bits each; on CUDA the whole
    step is one CUDA graph.
    """
    vae = VAE(problem)
    weights = {name: p.detach().clone() for name, p in vae.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in "mv")
    taken, rate, spread = (torch.zeros((), device=problem.device) for _ in range(3))
    draws = torch.empty(problem.batch * images[0].numel() // 4, dtype=torch.int64)
    on_cpu = problem.device == "cpu"
    by_bits = on_cpu and problem.binarize

    def update(rows: Tensor) -> Tensor:
        x = _from_bits(images, rows, draws) if by_bits else pixels(problem, images, rows)
        gradients, loss = grad_and_value(lambda w: functional_call(vae, w, (x,)))(weights)
        for name, weight in weights.items():
            gradient, m, v = gradients[name], first[name], second[name]
            m.lerp_(gradient, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            weight.sub_(rate * m / (v.sqrt() * spread + EPSILON))
        return loss

    fast = torch.compile(update, **_options(problem))

    @torch.no_grad()
    def step(rows: Tensor) -> Tensor:
        taken.add_(1)
        rate.copy_(LR / (1 - BETAS[0] ** taken))
        spread.copy_((1 - BETAS[1] ** taken).rsqrt())
        if by_bits:
            draws.random_(-(2**63), None)
        return fast(rows)

    return _each(step if on_cpu else _recorded(step, problem))


def graphed(problem: Problem, images: Tensor) -> Race:
    """Images to updated weights, eagerly written, replayed as one CUDA graph."""
    vae = VAE(problem)
    step = _descend(lambda rows: vae(pixels(problem, images, rows)), vae, capturable=True)
    return _each(_recorded(step, problem))


def _descend(loss_of: Callable, vae: VAE, **options: bool) -> Callable[[Tensor], Tensor]:
    adam = torch.optim.Adam(vae.parameters(), lr=LR, betas=BETAS, fused=True, **options)

    def step(rows: Tensor) -> Tensor:
        loss = loss_of(rows)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def _each(step: Callable[[Tensor], Tensor]) -> Race:
    return lambda index: torch.stack([step(rows) for rows in index])


def _from_bits(images: Tensor, rows: Tensor, draws: Tensor) -> Tensor:
    """A minibatch drawn from 16 bits a pixel: each probability is right to 2⁻¹⁶."""
    pixels = images[rows]
    uniform = draws.view(torch.int16).view(pixels.shape).int() + 2**15
    return (uniform * 255 < pixels.int() * 2**16).float()


def _options(problem: Problem, mode: str | None = None) -> dict:
    return {"options": KEEP_RANDOM} if problem.device == "cpu" else {"mode": mode}


def _recorded(step: Callable[[Tensor], Tensor], problem: Problem) -> Callable[[Tensor], Tensor]:
    """A step as one CUDA graph, recorded at its first call, after a few steps on those rows."""
    still = torch.zeros(problem.batch, dtype=torch.int64, device=problem.device)
    recorded: list[tuple[Callable[[], None], Tensor]] = []

    def replay(rows: Tensor) -> Tensor:
        still.copy_(rows)
        if not recorded:
            recorded.append(cuda_graph(lambda: step(still)))
        run, loss = recorded[0]
        run()
        return loss.clone()

    return replay


def cuda_graph(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What replays a function as one CUDA graph, and the tensors that its results lie in."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        results = run()
    return recording.replay, results
