"""The same training by Pythae's trainer."""

from __future__ import annotations

import logging
import tempfile

import torch
from speed_hand import VAE
from speed_problem import LR, SHAPE, Problem, Race
from torch import Tensor, nn

__all__ = ["by_pythae"]


def by_pythae(problem: Problem, images: Tensor) -> Race:
    """``BaseTrainer.train_step`` over a data set that draws each datum when it is fetched.

    Without its progress bar; in Pythae a loss is a mean over the batch.

    Raises:
        ImportError: If Pythae is not installed.
    """
    from pythae.data.datasets import DatasetOutput, collate_dataset_output
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import CallbackHandler, TrainingCallback

    class Encoder(BaseEncoder):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> ModelOutput:
            loc, log_scale = self.network(x).unbind(-2)
            return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.network(z).sigmoid())

    class Binarized(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, row: int) -> DatasetOutput:
            p = images[row].float() / 255
            return DatasetOutput(data=(torch.rand_like(p) < p).float())

    logging.getLogger("pythae.trainers.base_trainer.base_trainer").setLevel(logging.WARNING)
    nets, images = VAE(problem), images.cpu()
    config = VAEConfig(SHAPE, problem.latent, reconstruction_loss="bce")
    settings = BaseTrainerConfig(
        output_dir=tempfile.gettempdir(),
        learning_rate=LR,
        per_device_train_batch_size=problem.batch,
        no_cuda=problem.device == "cpu",
    )
    vae = PythaeVAE(config, Encoder(nets.encoder), Decoder(nets.decoder))
    trainer = BaseTrainer(vae, Binarized(), training_config=settings)
    trainer.set_optimizer()
    trainer.callback_handler = CallbackHandler([TrainingCallback()], vae)

    def run(index: Tensor) -> Tensor:
        trainer.train_loader = torch.utils.data.DataLoader(
            trainer.train_dataset,
            batch_sampler=index.tolist(),
            collate_fn=collate_dataset_output,
        )
        mean = float(trainer.train_step(0))
        return torch.full((len(index),), problem.batch * mean)

    return run
