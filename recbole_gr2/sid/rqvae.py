"""Residual-quantised autoencoder: an item's text embedding becomes a short tuple of codes, its semantic ID.

GR2 (arXiv 2602.07774, section 3) after TIGER (arXiv 2305.05065, section 3.1). Every technique of GR2's tokenizer table
is a switch of `RQVAEConfig`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_array
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional as F

from recbole_gr2.errors import ConfigurationError, GateError, MissingFileError
from recbole_gr2.seeding import derive_seed
from recbole_gr2.sid.contrastive import draw_positives, info_nce, known_positives

if TYPE_CHECKING:
    from recbole_gr2.sid.rqkmeans import RQKMeans

RANDOM_MODES = ("unused_first", "uniform")
WEIGHTS, CONFIG = "rqvae.safetensors", "rqvae.json"
CHUNK = 4096  # rows a forward pass outside training: fixed, so that it cannot change a result
KMEANS_POINTS = 256  # rows a centroid that k-means looks at; more do not move the centroids


@dataclass(frozen=True)
class SidConfig:
    """What a semantic ID looks like, whichever tokenizer makes it; symbols are those of GR2, section 3.

    Args:
        levels: L, codes in a semantic ID, 1..26.
        codes: C, entries of each level's codebook, at least 2.
        random_last: M, how many last levels `assign` draws at random, 0..levels-1.
        random_mode: `unused_first` draws among the codes that are free under the same prefix, `uniform` among all.
        seed: of the fit.

    Raises:
        ConfigurationError: a value outside its range; all such values are named together.
    """

    levels: int = 4
    codes: int = 256
    random_last: int = 1
    random_mode: str = "unused_first"
    seed: int = 2020

    def rules(self) -> dict[str, bool]:
        """Every rule in words, and whether it holds."""
        return {
            "levels must be 1..26": 1 <= self.levels <= 26,
            "codes must be at least 2": self.codes >= 2,
            "random_last must be 0..levels-1": 0 <= self.random_last < self.levels,
            f"random_mode must be one of {', '.join(RANDOM_MODES)}": self.random_mode in RANDOM_MODES,
        }

    def __post_init__(self) -> None:
        broken = [rule for rule, holds in self.rules().items() if not holds]
        if broken:
            raise ConfigurationError(
                "; ".join(broken),
                where="semantic-ID tokenizer settings",
                why="such a tokenizer cannot be built",
                do="correct the values named above",
            )


@dataclass(frozen=True)
class RQVAEConfig(SidConfig):
    """Settings of the RQ-VAE.

    The defaults are ours, chosen on MiniLM embeddings of Amazon Beauty (12,101 items): every code of every level
    in use, 98.6 % of SIDs unique with `random_last=0` and all of them with 1. GR2 publishes L only.

    Args:
        latent: width of the space that is quantised.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        commitment: beta, weight of |r_k - sg(q_k)|^2.
        ema: codebooks follow a moving average of their residuals; off: they are trained by a codebook loss.
        ema_decay: g in [0, 1).
        kmeans_init: codebooks start at k-means centroids of the first residuals; off: at small random vectors.
        diversity: lambda, weight of C * sum_j p_j^2 with p_j the share of the batch that code j holds.
        reset_after: tau, batches without use after which a code is replaced by the worst-reconstructed sample; 0 never.
        contrastive: weight of InfoNCE between the latents of items that users took one after the other; 0 off.
        contrastive_temperature: T, its temperature.
        epochs, batch_size, learning_rate: of the fit, by Adam.
    """

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
    """Residual quantisation of a batch: `codes` (B, L), `residuals` r_k and chosen entries `chosen` q_k, (B, L, D)."""

    codes: torch.Tensor
    residuals: torch.Tensor
    chosen: torch.Tensor


class RQVAE(nn.Module):
    """Encoder, L codebooks of C codes, decoder. D is the embedding's width outside and `config.latent` inside.

    Everything that decides a later result is in the state dict: codebooks, their running counts and sums, the batches
    since each code was last used, and whether the codebooks were initialised from data.
    """

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
        """Decode the quantised latents of `embeddings` (B, D); gradients pass straight through the quantiser."""
        latents = self.encoder(embeddings)
        quantised = self.quantise(latents)
        chosen = quantised.chosen.sum(1)
        return self.decoder(latents + (chosen - latents).detach()), quantised

    def quantise(self, latents: torch.Tensor) -> Quantised:
        """r_1 = h, z_k = argmin_j |r_k - e_j|, r_(k+1) = r_k - e_(z_k) for latents h (B, D); ties: lowest j."""
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
        """The weighted terms of the loss, to be summed; squares are summed over D and L and averaged over B."""
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

    def _diversity(self, quantised: Quantised) -> torch.Tensor:
        """Sum over levels of C * sum_j p_j^2, from L (even use) to L * C (one code).

        The value is that of the hard usage shares, the gradient that of soft ones. The softmax is over squared
        distances in units of the mean nearest one, because residuals shrink from level to level.
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
        """Nearest codes (N, L) int64 of embeddings (N, D)."""
        data = torch.from_numpy(np.ascontiguousarray(embeddings, dtype=np.float32))
        return torch.cat([self.quantise(self.encoder(chunk)).codes for chunk in data.split(CHUNK)]).numpy()

    @torch.no_grad()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Embeddings (N, D) that codes (N, L) stand for."""
        chosen = self.codebooks[torch.arange(self.config.levels), torch.from_numpy(codes)]
        return self.decoder(chosen.sum(1)).numpy()

    @torch.no_grad()
    def initialise(self, embeddings: torch.Tensor) -> None:
        """Put each codebook at k-means centroids (k-means++ seeding) of its residuals, once in a model's life."""
        if self.initted:
            return
        config = self.config
        rows = kmeans_rows(len(embeddings), config)
        residual = torch.cat([self.encoder(chunk) for chunk in embeddings[rows].split(CHUNK)])
        batch_share = min(1.0, config.batch_size / len(rows))
        for level in range(config.levels):
            means = kmeans(residual.cpu().numpy(), config.codes, config.seed + level)
            sizes = np.bincount(means.labels_, minlength=config.codes)
            self.codebooks[level] = torch.from_numpy(means.cluster_centers_).to(residual)
            self.ema_count[level] = torch.from_numpy(sizes).to(residual) * batch_share
            self.ema_sum[level] = self.codebooks[level] * self.ema_count[level].unsqueeze(-1)
            residual = residual - self.codebooks[level, torch.from_numpy(means.labels_).long()]
        self.initted.fill_(True)

    @torch.no_grad()
    def update_codebooks(self, quantised: Quantised, errors: torch.Tensor) -> None:
        """After a training step: moving averages, then ages and resets. `errors` (B,) says who is reconstructed worst.

        The averages run over counts and sums, so a code's step grows with the residuals it got (van den Oord et al.,
        arXiv 1711.00937, appendix A.1); at even use this is GR2's e <- g * e + (1 - g) * mean.
        """
        config, residuals = self.config, quantised.residuals
        worst = errors.argsort(descending=True, stable=True)
        for level in range(config.levels):
            hits = F.one_hot(quantised.codes[:, level], config.codes).to(residuals)
            counts = hits.sum(0)
            used = counts > 0
            if config.ema:
                self.ema_count[level].lerp_(counts, 1 - config.ema_decay)
                self.ema_sum[level].lerp_(hits.T @ residuals[:, level], 1 - config.ema_decay)
                # An unused code keeps its place: its sum and count shrink alike, down to 0 / 0.
                self.codebooks[level, used] = self.ema_sum[level, used] / self.ema_count[level, used].unsqueeze(-1)
            self.age[level] = torch.where(used, 0, self.age[level] + 1)
            if config.reset_after:
                dead = (self.age[level] >= config.reset_after).nonzero()[: len(worst), 0]
                fresh = residuals[worst[: len(dead)], level]
                self.codebooks[level, dead] = fresh
                self.ema_count[level, dead] = 1.0
                self.ema_sum[level, dead] = fresh
                self.age[level, dead] = 0

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors) and config (JSON) to `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"dim": self.dim, **asdict(self.config)}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> RQVAE:
        """Read what `save` wrote.

        Raises:
            MissingFileError: one of the two files is not there.
        """
        config, weights = saved_files(folder, CONFIG, WEIGHTS, where="sid.rqvae.RQVAE.load")
        settings = json.loads(config.read_text())
        dim, hidden = settings.pop("dim"), tuple(settings.pop("hidden"))
        model = cls(dim, RQVAEConfig(**settings, hidden=hidden))
        model.load_state_dict(load_file(weights))
        return model


def fit_rqvae(
    embeddings: np.ndarray,
    config: RQVAEConfig,
    *,
    pairs: csr_array | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> RQVAE:
    """Train a tokenizer on embeddings (N, D), best of length 1. The same seed gives the same model.

    Args:
        embeddings: finite, N at least `config.codes` if the codebooks start from k-means.
        config: the settings.
        pairs: what `co_engaged` gives, (N, N); the contrastive loss needs it.
        on_epoch: called with the 1-based epoch and its mean loss terms.

    Raises:
        ConfigurationError: not a finite (N, D) matrix, fewer items than codes, or a contrastive loss without pairs.
        GateError: the loss is not finite; it names the epoch.
    """
    data = torch.from_numpy(checked(embeddings, config.codes if config.kmeans_init else 1))
    if config.contrastive and (pairs is None or not pairs.nnz):
        raise ConfigurationError(
            "the contrastive loss has no pair of items to pull together",
            where="sid_contrastive",
            why="its positives are items that a user took one after the other, in the training data",
            do="set sid_contrastive to 0, or look at the interactions",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = RQVAE(data.shape[1], config)
    if config.kmeans_init:
        model.initialise(data)
    order = torch.Generator().manual_seed(config.seed)
    draws = np.random.default_rng(derive_seed(config.seed, "positives"))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    for epoch in range(1, config.epochs + 1):
        totals: dict[str, float] = {}
        for rows in torch.randperm(len(data), generator=order).split(config.batch_size):
            batch = data[rows]
            decoded, quantised = model(batch)
            terms = model.losses(batch, decoded, quantised)
            if config.contrastive:
                with_one, positives = draw_positives(pairs, rows.numpy(), draws)
                terms["contrastive"] = config.contrastive * info_nce(
                    quantised.residuals[with_one, 0],
                    model.encoder(data[positives]),
                    known_positives(pairs, rows.numpy()[with_one], positives),
                    config.contrastive_temperature,
                )
            loss = torch.stack(list(terms.values())).sum()
            if not torch.isfinite(loss):
                raise GateError(
                    f"the tokenizer's loss is not finite in epoch {epoch}",
                    where="tokenizer stage",
                    why="its codes would be noise",
                    do="lower sid_learning_rate, or look for extreme values in the item embeddings",
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            model.update_codebooks(quantised, (decoded - batch).square().sum(-1).detach())
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value.item() * len(rows) / len(data)
        if on_epoch is not None:
            on_epoch(epoch, totals)
    return model


def saved_files(folder: str | Path, *names: str, where: str) -> list[Path]:
    """The files of a saved tokenizer.

    Raises:
        MissingFileError: one of them is not there.
    """
    files = [Path(folder) / name for name in names]
    for file in files:
        if not file.is_file():
            raise MissingFileError(
                f"no {file.name} in {str(file.parent)!r}",
                where=where,
                why="the tokenizer's codebooks are needed to turn items into semantic IDs",
                do="run the tokenizer stage again",
            )
    return files


def kmeans_rows(items: int, config: SidConfig) -> np.ndarray:
    """The rows that k-means is fitted on: all in a drawn order, or as many as it needs."""
    return np.random.default_rng(config.seed).permutation(items)[: KMEANS_POINTS * config.codes]


def kmeans(points: np.ndarray, codes: int, seed: int) -> KMeans:
    """k-means with k-means++ seeding, the same whatever the number of threads."""
    with threadpool_limits(1):  # k-means adds its threads' sums in the order in which they finish
        return KMeans(codes, n_init=1, random_state=seed).fit(points)


def checked(embeddings: np.ndarray, least: int) -> np.ndarray:
    """Embeddings (N, D) as float32.

    Raises:
        ConfigurationError: not a finite (N, D) matrix, or fewer than `least` items.
    """
    data = np.ascontiguousarray(embeddings, dtype=np.float32)
    chunks = (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))
    if data.ndim != 2 or not len(data) or not all(np.isfinite(chunk).all() for chunk in chunks):
        raise ConfigurationError(
            f"item embeddings must be a finite (N, D) matrix, got shape {data.shape}",
            where="tokenizer stage",
            why="nothing can be learnt from them",
            do="look at the texts and the encoder that made them",
        )
    if len(data) < least:
        raise ConfigurationError(
            f"{len(data)} items cannot start {least} codes a level",
            where="sid_codes",
            why="k-means needs an item for each code",
            do=f"set sid_codes to at most {len(data)}",
        )
    return data


def assign(tokenizer: RQVAE | RQKMeans, embeddings: np.ndarray, *, seed: int) -> np.ndarray:
    """Semantic IDs of N items, (N, L) int64: nearest codes, but for the last `random_last` levels, which are drawn.

    `unused_first` gives the items under one prefix distinct tuples while it holds at most C^M of them, and starts a
    new round after that. The same seed gives the same table.
    """
    config = tokenizer.config
    codes = tokenizer.encode(embeddings)
    if config.random_last == 0:
        return codes
    generator, size = np.random.default_rng(seed), config.codes**config.random_last
    kept = config.levels - config.random_last
    if config.random_mode == "uniform":
        drawn = generator.integers(size, size=len(codes))
    else:
        drawn = np.empty(len(codes), dtype=np.int64)
        _, prefixes, counts = np.unique(codes[:, :kept], axis=0, return_inverse=True, return_counts=True)
        by_prefix = np.argsort(prefixes.reshape(-1), kind="stable")
        for items in np.split(by_prefix, np.cumsum(counts)[:-1]):
            for start in range(0, len(items), size):
                block = items[start : start + size]
                drawn[block] = generator.choice(size, size=len(block), replace=False)
    for level in reversed(range(kept, config.levels)):
        drawn, codes[:, level] = np.divmod(drawn, config.codes)
    return codes


def _offset_distances(residual: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """|r - e_j|^2 - |r|^2, (B, C): what an argmin or a softmax over j needs."""
    return codebook.square().sum(-1) - 2 * residual @ codebook.T


def _mean_square(difference: torch.Tensor) -> torch.Tensor:
    return difference.square().sum() / len(difference)


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
