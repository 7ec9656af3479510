"""Residual-quantised autoencoder (RQ-VAE): it converts the text embedding of an item to a semantic ID.

The method is that of GR2 (arXiv 2602.07774, section 3), after TIGER (arXiv 2305.05065, section 3.1). `RQVAEConfig` has
a setting for each technique in the tokenizer table of GR2.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_array
from torch import nn
from torch.nn import functional as F

from recbole_gr2.errors import ConfigurationError, QualityCheckError
from recbole_gr2.progress import progress
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.contrastive import info_nce, positive_mask, sample_positives
from recbole_gr2.sid.quantizer import CHUNK, SidConfig, check_embeddings, kmeans, kmeans_sample, saved_files

WEIGHTS, CONFIG = "rqvae.safetensors", "rqvae.json"
# Least number of training steps, our choice. With 20 steps the codebooks of catalogues with 70 to 150 items collapse;
# from 60 on they do not. ml-100k has 140 steps with preset smoke and 210 with the others, larger catalogues have more.
MIN_STEPS = 100


@dataclass(frozen=True)
class RQVAEConfig(SidConfig):
    """Settings of the RQ-VAE.

    The defaults are our choice, except `levels`, which GR2 publishes. They were selected on MiniLM embeddings of Amazon
    Beauty (12,101 items). There all codes of all levels are in use. 98.6 % of the semantic IDs are unique with
    `random_last=0`, and 100 % with 1.

    Args:
        latent: dimension of the latent space that is quantised.
        hidden: widths of the hidden layers of the encoder. The decoder has the same widths in reverse order.
        commitment: beta, weight of |r_k - sg(q_k)|^2.
        ema: True: codebooks follow a moving average of their residuals. False: a codebook loss trains them.
        ema_decay: g in [0, 1), decay of the moving average.
        kmeans_init: True: codebooks start at k-means centroids of the first residuals. False: at small random vectors.
        diversity: lambda, weight of C * sum_j p_j^2, where p_j is the share of the batch that has code j.
        reset_after: tau, number of batches after which an unused code is replaced by the item with the largest
            reconstruction error. 0 turns this off.
        contrastive: weight of the InfoNCE loss between the latents of consecutive items of a user. 0 turns it off.
        contrastive_temperature: T, temperature of the InfoNCE loss.
        epochs: number of training epochs. Small catalogues get more, see `epochs_for`.
        batch_size: items per training step.
        learning_rate: learning rate of Adam.
    """

    by_steps: ClassVar[bool] = True
    latent: int = 32
    hidden: tuple[int, ...] = (512, 256)
    commitment: float = 0.25
    ema: bool = True
    ema_decay: float = 0.95
    kmeans_init: bool = True
    diversity: float = 0.0
    reset_after: int = 24
    contrastive: float = 0.0
    contrastive_temperature: float = 0.1
    epochs: int = 30
    batch_size: int = 256
    learning_rate: float = 1e-3

    def rules(self) -> dict[str, bool]:
        """Return each rule as a sentence, and whether the settings meet it."""
        return super().rules() | {
            "latent and hidden must be positive": min((self.latent, *self.hidden)) >= 1,
            "commitment, diversity and contrastive must not be negative": min(
                self.commitment, self.diversity, self.contrastive
            )
            >= 0,
            "ema_decay must be in [0, 1)": 0 <= self.ema_decay < 1,
            "reset_after must not be negative": self.reset_after >= 0,
            "contrastive_temperature must be positive": self.contrastive_temperature > 0,
            "epochs and batch_size must be positive": min(self.epochs, self.batch_size) >= 1,
            "learning_rate must be positive": self.learning_rate > 0,
        }


@dataclass(frozen=True)
class Quantised:
    """Residual quantisation of a batch.

    Attributes:
        codes: index of the nearest code on each level, (B, L) int64.
        residuals: r_k, the residual on each level before quantisation, (B, L, D).
        chosen: q_k, the codebook vector of the code on each level, (B, L, D).
    """

    codes: torch.Tensor
    residuals: torch.Tensor
    chosen: torch.Tensor


class RQVAE(nn.Module):
    """An encoder, L codebooks of C vectors, and a decoder.

    The state dict contains all that later results depend on: the codebooks, their running counts and sums, the number
    of batches since each code was last used, and whether k-means has initialised the codebooks.

    Args:
        dim: dimension of the item embeddings. The quantised vectors have the dimension `config.latent`.
        config: settings of the model.
    """

    ema_count: torch.Tensor
    ema_sum: torch.Tensor
    age: torch.Tensor
    initted: torch.Tensor

    def __init__(self, dim: int, config: RQVAEConfig) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        self.encoder = _mlp(dim, *config.hidden, config.latent)
        self.decoder = _mlp(config.latent, *reversed(config.hidden), dim)
        shape = (config.levels, config.codes)
        codebooks = torch.empty(*shape, config.latent).uniform_(-1 / config.codes, 1 / config.codes)
        self.codebooks = nn.Parameter(codebooks, requires_grad=not config.ema)
        self.register_buffer("ema_count", torch.ones(shape))
        self.register_buffer("ema_sum", codebooks.clone())
        self.register_buffer("age", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("initted", torch.tensor(False))

    def forward(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, Quantised]:
        """Decode the quantised latents of embeddings (B, D). Gradients skip the quantiser (straight-through).

        Returns:
            (decoded embeddings (B, D), the quantised latents).
        """
        latents = self.encoder(embeddings)
        quantised = self.quantise(latents)
        chosen = quantised.chosen.sum(1)
        return self.decoder(latents + (chosen - latents).detach()), quantised

    def quantise(self, latents: torch.Tensor) -> Quantised:
        """Quantise latents h (B, D): r_1 = h, z_k = argmin_j |r_k - e_j|, r_(k+1) = r_k - e_(z_k).

        The lowest j wins a tie.
        """
        codes, residuals, chosen = [], [], []
        residual = latents
        for codebook in self.codebooks:
            code = _offset_distances(residual, codebook).argmin(-1)
            entry = codebook[code]
            codes.append(code)
            residuals.append(residual)
            chosen.append(entry)
            residual = residual - entry.detach()
        return Quantised(torch.stack(codes, 1), torch.stack(residuals, 1), torch.stack(chosen, 1))

    def losses(self, embeddings: torch.Tensor, decoded: torch.Tensor, quantised: Quantised) -> dict[str, torch.Tensor]:
        """Return the weighted terms of the loss, except the contrastive one. The loss is their sum.

        Squares are summed over dimensions and levels and averaged over the batch.

        Args:
            embeddings: item embeddings, (B, D).
            decoded: decoded embeddings as `forward` returns them, (B, D).
            quantised: the quantised latents as `forward` returns them.
        """
        residuals, chosen = quantised.residuals, quantised.chosen
        terms = {
            "reconstruction": _mean_square(decoded - embeddings),
            "commitment": self.config.commitment * _mean_square(residuals - chosen.detach()),
        }
        if not self.config.ema:
            terms["codebook"] = _mean_square(chosen - residuals.detach())
        if self.config.diversity:
            terms["diversity"] = self.config.diversity * self._diversity(quantised)
        return terms

    def contrastive_loss(
        self,
        quantised: Quantised,
        embeddings: torch.Tensor,
        positions: np.ndarray,
        pairs: csr_array,
        generator: np.random.Generator,
    ) -> torch.Tensor:
        """Return the weighted contrastive term of a batch: InfoNCE between its latents and those of drawn positives.

        Args:
            quantised: the quantised latents of the batch.
            embeddings: embeddings of all items, (N, D).
            positions: positions of the items of the batch, from 0, (B,).
            pairs: counts of co-engaged items, (N, N), see `recbole_gr2.sid.contrastive.co_engaged`.
            generator: source of the drawn positives.
        """
        anchors, positives = sample_positives(pairs, positions, generator)
        return self.config.contrastive * info_nce(
            quantised.residuals[anchors, 0],
            self.encoder(embeddings[positives]),
            positive_mask(pairs, positions[anchors], positives),
            self.config.contrastive_temperature,
        )

    def _diversity(self, quantised: Quantised) -> torch.Tensor:
        """Return the sum over levels of C * sum_j p_j^2. It is L for equal use of all codes, and L * C for one code.

        The value comes from the hard shares, the gradient from soft shares. The softmax is over squared distances in
        units of the mean nearest one, because residuals shrink from level to level.
        """
        total = quantised.residuals.new_zeros(())
        for level, codebook in enumerate(self.codebooks):
            residual, entry = quantised.residuals[:, level], quantised.chosen[:, level]
            scale = _mean_square(residual - entry).detach().clamp_min(1e-12)
            soft = torch.softmax(-_offset_distances(residual, codebook) / scale, -1).mean(0)
            hard = F.one_hot(quantised.codes[:, level], self.config.codes).to(soft).mean(0)
            shares = hard + soft - soft.detach()
            total = total + self.config.codes * shares.square().sum()
        return total

    @torch.no_grad()
    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the nearest codes of embeddings (N, D), (N, L) int64."""
        data = torch.from_numpy(np.ascontiguousarray(embeddings, dtype=np.float32))
        return torch.cat([self.quantise(self.encoder(chunk)).codes for chunk in data.split(CHUNK)]).numpy()

    @torch.no_grad()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return the embeddings (N, D) that codes (N, L) represent."""
        chosen = self.codebooks[torch.arange(self.config.levels), torch.from_numpy(codes)]
        return self.decoder(chosen.sum(1)).numpy()

    @torch.no_grad()
    def initialise(self, embeddings: torch.Tensor) -> None:
        """Set each codebook to the k-means centroids of its residuals. A second call has no effect.

        Args:
            embeddings: embeddings of all items, (N, D).
        """
        if self.initted:
            return
        config = self.config
        sample = kmeans_sample(len(embeddings), config)
        residual = torch.cat([self.encoder(chunk) for chunk in embeddings[sample].split(CHUNK)])
        batch_share = min(1.0, config.batch_size / len(sample))
        for level in range(config.levels):
            clusters = kmeans(residual.cpu().numpy(), config.codes, config.seed + level)
            sizes = np.bincount(clusters.labels_, minlength=config.codes)
            self.codebooks[level] = torch.from_numpy(clusters.cluster_centers_).to(residual)
            self.ema_count[level] = torch.from_numpy(sizes).to(residual) * batch_share
            self.ema_sum[level] = self.codebooks[level] * self.ema_count[level].unsqueeze(-1)
            residual = residual - self.codebooks[level, torch.from_numpy(clusters.labels_).long()]
        self.initted.fill_(True)

    @torch.no_grad()
    def update_codebooks(self, quantised: Quantised, errors: torch.Tensor) -> None:
        """Update the moving averages, the ages of the codes, and reset unused codes. Call it after a training step.

        The averages are those of counts and sums, so the step of a code grows with its number of residuals (van den
        Oord et al., arXiv 1711.00937, appendix A.1). If all codes are used equally often, this is the update of GR2,
        e <- g * e + (1 - g) * mean.

        Args:
            quantised: the quantised latents of the batch.
            errors: reconstruction error of each item, (B,). Unused codes are replaced by the items with the largest
                errors.
        """
        config, residuals = self.config, quantised.residuals
        by_error = errors.argsort(descending=True, stable=True)
        for level in range(config.levels):
            assigned = F.one_hot(quantised.codes[:, level], config.codes).to(residuals)
            counts = assigned.sum(0)
            used = counts > 0
            if config.ema:
                self.ema_count[level].lerp_(counts, 1 - config.ema_decay)
                self.ema_sum[level].lerp_(assigned.T @ residuals[:, level], 1 - config.ema_decay)
                # An unused code keeps its vector, because its sum and its count shrink alike, down to 0 / 0.
                self.codebooks[level, used] = self.ema_sum[level, used] / self.ema_count[level, used].unsqueeze(-1)
            self.age[level] = torch.where(used, 0, self.age[level] + 1)
            if config.reset_after:
                unused = (self.age[level] >= config.reset_after).nonzero()[: len(by_error), 0]
                replacements = residuals[by_error[: len(unused)], level]
                self.codebooks[level, unused] = replacements
                self.ema_count[level, unused] = 1.0
                self.ema_sum[level, unused] = replacements
                self.age[level, unused] = 0

    def save(self, folder: str | Path) -> None:
        """Write the weights (safetensors) and the settings (JSON) to a folder. The folder is created if necessary."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"dim": self.dim, **asdict(self.config)}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> RQVAE:
        """Read a tokenizer that `save` wrote.

        Raises:
            MissingFileError: one of the two files does not exist.
        """
        config, weights = saved_files(folder, CONFIG, WEIGHTS, where="sid.rqvae.RQVAE.load")
        settings = json.loads(config.read_text())
        dim, hidden = settings.pop("dim"), tuple(settings.pop("hidden"))
        model = cls(dim, RQVAEConfig(**settings, hidden=hidden))
        model.load_state_dict(load_file(weights))
        return model


def epochs_for(items: int, config: RQVAEConfig) -> int:
    """Return the number of training epochs for N items: `config.epochs`, or more if these have too few steps.

    An epoch of a small catalogue has one step or few. All epochs together have at least `MIN_STEPS` steps.

    >>> epochs_for(1682, RQVAEConfig(epochs=20)), epochs_for(70, RQVAEConfig(epochs=20))
    (20, 100)
    """
    steps = math.ceil(items / config.batch_size)
    return max(config.epochs, math.ceil(MIN_STEPS / steps))


def fit_rqvae(embeddings: np.ndarray, config: RQVAEConfig, *, pairs: csr_array | None = None) -> RQVAE:
    """Train an RQ-VAE. The same seed gives the same model.

    Args:
        embeddings: finite item embeddings, (N, D), preferably of length 1. N is at least `config.codes` if the
            codebooks start from k-means.
        config: settings of the model and of the training.
        pairs: counts of co-engaged items, (N, N), see `recbole_gr2.sid.contrastive.co_engaged`. The contrastive loss
            needs them.

    Raises:
        ConfigurationError: the embeddings are not a finite (N, D) matrix, there are fewer items than codes, or the
            contrastive loss has no pairs.
        QualityCheckError: the loss is not finite. The error names the epoch.
    """
    data = torch.from_numpy(check_embeddings(embeddings, config.codes if config.kmeans_init else 1))
    if config.contrastive and (pairs is None or not pairs.nnz):
        raise ConfigurationError(
            "the contrastive loss has no pair of co-engaged items",
            where="sid_contrastive",
            why="its positives are consecutive items of a user in the training interactions",
            do="set sid_contrastive to 0, or check the interactions of the data set",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = RQVAE(data.shape[1], config)
    if config.kmeans_init:
        model.initialise(data)
    batches = torch.Generator().manual_seed(config.seed)
    positives = np.random.default_rng(derive_seed(config.seed, "positives"))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    for epoch in progress(range(1, epochs_for(len(data), config) + 1), "epoch"):
        for positions in torch.randperm(len(data), generator=batches).split(config.batch_size):
            if not _train_step(model, optimiser, data, positions, pairs, positives):
                raise QualityCheckError(
                    f"the loss of the tokenizer is not finite in epoch {epoch}",
                    where="tokenizer stage",
                    why="the codes of such a model are random",
                    do="lower sid_learning_rate, or look for extreme values in the item embeddings",
                )
    return model


def _train_step(
    model: RQVAE,
    optimiser: torch.optim.Optimizer,
    data: torch.Tensor,
    positions: torch.Tensor,
    pairs: csr_array | None,
    generator: np.random.Generator,
) -> bool:
    """Train on the items at `positions` (B,) of the embeddings `data` (N, D). Return False if the loss is not finite.

    In this case the model is unchanged.
    """
    batch = data[positions]
    decoded, quantised = model(batch)
    terms = model.losses(batch, decoded, quantised)
    if model.config.contrastive and pairs is not None:
        terms["contrastive"] = model.contrastive_loss(quantised, data, positions.numpy(), pairs, generator)
    loss = torch.stack(list(terms.values())).sum()
    if not torch.isfinite(loss):
        return False
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    model.update_codebooks(quantised, (decoded - batch).square().sum(-1).detach())
    return True


def _offset_distances(residual: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return |r - e_j|^2 - |r|^2, (B, C). An argmin or a softmax over j does not need the last term."""
    return codebook.square().sum(-1) - 2 * residual @ codebook.T


def _mean_square(difference: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares, divided by the size of the first dimension."""
    return difference.square().sum() / len(difference)


def _mlp(*widths: int) -> nn.Sequential:
    """Return linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
