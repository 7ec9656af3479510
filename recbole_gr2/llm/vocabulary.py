"""The vocabulary of a language model: add tokens, set their initial embeddings, and remove unused tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recbole_gr2.errors import ConfigurationError, GR2Error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_PIECES = ("system", "user", "assistant", "\n")  # the words of ChatML
LABEL = re.compile(r"<\|([A-Z])\|>")

# The embedding of a new token is mean + NOISE * std * normal. Measured on SmolLM2-135M with 1024 new tokens: with 1.0
# the new tokens receive 39 % of the probability in ordinary text, and training first has to reduce it. With 0 they
# receive 0.004 %, but all have the same embedding. With 0.5 they receive 0.1 %, and their mean cosine similarity is
# 0.76.
NOISE = 0.5


# ---- new tokens ------------------------------------------------------------------------------------------------------


def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str], seed: int = 0) -> None:
    """Add `tokens` to the tokenizer and the model, in place. Existing tokens keep their embeddings.

    The embedding of a label such as `<|A|>` is a copy of that of the letter A, because the model knows how lists use
    letters. All other embeddings are drawn around the mean embedding (see `NOISE`). The tokens are not "special":
    decoding with `skip_special_tokens` keeps them.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        tokens: Texts of the tokens.
        seed: Seed of the random embeddings.

    Raises:
        GR2Error: The tokenizer does not encode one of the tokens as a single id within text.
    """
    insert_tokens(model, tokenizer, tokens, seed, special=False)
    _check_single_ids(tokenizer, tokens)
    sync_ids(model, tokenizer)


def insert_tokens(model: Any, tokenizer: Any, tokens: Sequence[str], seed: int, *, special: bool) -> None:
    """Add `tokens` without the checks of `add_tokens`. `special` tokens are omitted by `skip_special_tokens`."""
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    if not new:
        return
    added = [AddedToken(token, lstrip=False, rstrip=False, normalized=False, special=special) for token in new]
    tokenizer.add_tokens(added, special_tokens=special)
    # A model may have more embeddings than its tokenizer has tokens (Qwen3). Those were never trained.
    trained = len(vocabulary)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    for weight in _token_matrices(model):
        _initialize(weight, tokenizer, new, trained, generator)


@torch.no_grad()
def start_from_codebooks(model: Any, token_ids: torch.Tensor, codebooks: torch.Tensor, seed: int) -> None:
    """Set the embeddings of code tokens in place, so that their distances are those of the code vectors.

    An embedding is the mean embedding of the model plus an offset. The offset is the sum, in equal parts, of a random
    direction of the level and of a random projection of the centred code vector. Its length is the mean distance of
    the model's embeddings from their mean. The model then starts with the similarities of the codes. Measured on
    Amazon Beauty with the preset `laptop`: an item costs 8.88 nats after 300,000 tokens of histories. With random
    embeddings it takes 800,000 tokens. This method is not from a paper.

    Args:
        model: A causal language model of transformers.
        token_ids: Ids of the code tokens, (L * C,), level by level. All smaller ids are tokens of the model.
        codebooks: Code vectors, (L, C, D).
        seed: Seed of the projection and the directions.
    """
    levels, _count, width = codebooks.shape
    generator = torch.Generator().manual_seed(seed)
    matrices = _token_matrices(model)
    size = matrices[0].size(1)
    projection = torch.randn(width, size, generator=generator) / size**0.5
    directions = torch.randn(levels, 1, size, generator=generator) / size**0.5
    vectors = codebooks.float().cpu()
    vectors = vectors - vectors.mean(1, keepdim=True)
    vectors = vectors / vectors.norm(dim=2).mean(1).clamp(min=1e-12).view(-1, 1, 1)
    offsets = ((vectors @ projection + directions) / 2**0.5).flatten(0, 1)
    for weight in matrices:
        trained = weight[: int(token_ids.min())].float()
        mean = trained.mean(0)
        scale = (trained - mean).norm(dim=1).mean()
        weight[token_ids] = (mean + scale * offsets.to(weight.device)).to(weight.dtype)


def _token_matrices(model: Any) -> list[torch.Tensor]:
    """Return the matrices (V, D) with one row per token: one if embedding and head are tied, else two."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return [embedding] if head is embedding else [embedding, head]


@torch.no_grad()
def _initialize(weight: torch.Tensor, tokenizer: Any, new: list[str], trained: int, generator: torch.Generator) -> None:
    """Set the rows of the tokens `new` in `weight` (V, D). The first `trained` rows belong to the model."""
    mean, std = weight[:trained].float().mean(0), weight[:trained].float().std(0)
    for token in new:
        token_id = tokenizer.convert_tokens_to_ids(token)
        if label := LABEL.fullmatch(token):
            (letter,) = tokenizer(label[1], add_special_tokens=False).input_ids
            weight[token_id] = weight[letter]
        else:
            noise = torch.randn(mean.shape, generator=generator).to(mean.device)
            weight[token_id] = (mean + NOISE * std * noise).to(weight.dtype)


def _check_single_ids(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Raise an error unless each token is encoded as one id between letters, without spaces."""
    encoded = set(tokenizer("x" + "x".join(tokens) + "x", add_special_tokens=False).input_ids)
    broken = [token for token in tokens if tokenizer.convert_tokens_to_ids(token) not in encoded]
    if broken:
        raise GR2Error(
            f"the tokenizer splits {len(broken)} added tokens within text: {', '.join(broken[:5])}",
            where=f"tokenizer {tokenizer.name_or_path}",
            why="a ranking can only be read if each label and each code is one id",
            do="choose another language model (llm), or report a bug",
        )


def sync_ids(model: Any, tokenizer: Any) -> None:
    """Copy the special ids and the vocabulary size of the tokenizer to all places where the model keeps them."""
    from transformers import GenerationConfig

    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    for name, token_id in ids.items():
        setattr(model.config, name, token_id)
    if getattr(model.config, "unk_token_id", None) is not None:
        model.config.unk_token_id = tokenizer.unk_token_id
    embedding = model.get_input_embeddings()
    # The padding row of an embedding gets no gradient. A stale index would freeze the row of another token.
    if embedding.padding_idx is not None:
        embedding.padding_idx = tokenizer.pad_token_id
    model.config.vocab_size = embedding.num_embeddings
    # The sampling defaults of a model must not change a measurement.
    model.generation_config = GenerationConfig(do_sample=False, **ids)


# ---- trimming --------------------------------------------------------------------------------------------------------


def trim_vocabulary(model: Any, tokenizer: Any, corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Remove the tokens that `corpus` does not use, from the model in place and from a copy of the tokenizer.

    The new vocabulary contains the tokens of the corpus, all single-byte tokens, all added and special tokens, the
    words of ChatML, and the tokens from which these are merged. A merge stays if its parts and its result stay; the
    order of merges does not change. Byte-pair encoding applies the first possible merge of its list, and no merge on
    the way to a kept token is lost. So each text of the corpus splits into the same tokens as before. Any other text
    splits into shorter tokens, down to bytes: the trimmed tokenizer can write every text.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, a byte-level BPE.
        corpus: Texts exactly as in prompts and answers.

    Returns:
        The trimmed tokenizer with ids 0..V-1 in the old order.

    Raises:
        ConfigurationError: The tokenizer is not a byte-level BPE.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = _byte_level_spec(tokenizer)
    kept = _kept_tokens(tokenizer, spec, corpus)
    new_ids = {token: i for i, token in enumerate(kept)}
    old_ids = tokenizer.get_vocab()
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {token: i for token, i in new_ids.items() if token in vocab}
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if {*pair, "".join(pair)} <= new_ids.keys()]
    for added in spec["added_tokens"]:
        added["id"] = new_ids[added["content"]]
    _renumber(spec["post_processor"], new_ids)
    # Some tokenizer classes rebuild parts of the tokenizer when they are loaded. This class loads its JSON unchanged.
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        **tokenizer.special_tokens_map,
        extra_special_tokens=list(tokenizer.extra_special_tokens),
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
    )
    if trimmed.get_vocab() != new_ids:
        raise GR2Error(
            "the ids of the trimmed tokenizer differ from the rows of the model",
            where="llm_trim_vocabulary",
            why="the model would read other tokens than the text contains",
            do="set llm_trim_vocabulary: False for this model, and report a bug",
        )
    _select_rows(model, [old_ids[token] for token in kept])
    sync_ids(model, trimmed)
    return trimmed


def _byte_level_spec(tokenizer: Any) -> dict[str, Any]:
    """Return the JSON of the tokenizer, with merges as pairs."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}
    pre = spec.get("pre_tokenizer") or {}
    steps = [step["type"] for step in pre.get("pretokenizers", [pre]) if step]
    if spec["model"].get("type") != "BPE" or "ByteLevel" not in steps:
        raise ConfigurationError(
            "only the vocabulary of a byte-level BPE tokenizer can be trimmed",
            where="llm_trim_vocabulary",
            why=f"this one is {spec['model'].get('type', 'not a fast tokenizer')}, with {steps or 'no'} pre-tokenizer",
            do="set llm_trim_vocabulary: False, or use a model such as SmolLM2 or Qwen3",
        )
    spec["model"]["merges"] = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in spec["model"]["merges"]
    ]
    return spec


def _kept_tokens(tokenizer: Any, spec: dict[str, Any], corpus: Iterable[str]) -> list[str]:
    """Return the tokens that stay, in the order of their new ids."""
    vocab = spec["model"]["vocab"]
    backend = tokenizer.backend_tokenizer
    kept = {token for token in vocab if len(token) == 1}  # byte-level: one character is one byte
    texts, used = [*CHAT_PIECES, *corpus], set()
    for start in range(0, len(texts), 1000):  # an encoding needs much more memory than its text
        for encoding in backend.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False):
            used.update(encoding.ids)
    kept.update(backend.id_to_token(token_id) for token_id in used)
    kept.update(token for token in (added["content"] for added in spec["added_tokens"]) if token in vocab)
    parts: dict[str, list[str]] = {}
    for left, right in spec["model"]["merges"]:
        parts.setdefault(left + right, []).extend((left, right))
    todo = list(kept)
    while todo:
        fresh = [part for part in parts.get(todo.pop(), ()) if part not in kept]
        kept.update(fresh)
        todo.extend(fresh)
    # `tokenizers` numbers added tokens outside the model's vocabulary after it, in the order of their old ids.
    inside = sorted(kept & vocab.keys(), key=vocab.__getitem__)
    outside = sorted((a for a in spec["added_tokens"] if a["content"] not in vocab), key=lambda a: a["id"])
    return inside + [added["content"] for added in outside]


def _renumber(post_processor: dict[str, Any] | None, new_ids: dict[str, int]) -> None:
    """Replace the ids of special tokens in a post-processor, in place."""
    for step in _steps(post_processor):
        if step["type"] == "TemplateProcessing":
            for special in step["special_tokens"].values():
                special["ids"] = [new_ids[token] for token in special["tokens"]]
        elif step["type"] != "ByteLevel":
            raise ConfigurationError(
                f"a tokenizer with a {step['type']} post-processor cannot be trimmed",
                where="llm_trim_vocabulary",
                why="the post-processor may contain token ids that change",
                do="set llm_trim_vocabulary: False for this model",
            )


def _steps(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if processor and processor["type"] == "Sequence":
        for inner in processor["processors"]:
            yield from _steps(inner)
    elif processor:
        yield processor


def _select_rows(model: Any, token_ids: list[int]) -> None:
    """Keep the rows of these tokens in the input embedding and in the output head. Tied weights stay tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    index = torch.tensor(token_ids, device=embedding.weight.device)
    embedding.weight = nn.Parameter(embedding.weight.detach()[index])
    head.weight = embedding.weight if tied else nn.Parameter(head.weight.detach()[index])
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[index])
    embedding.num_embeddings = head.out_features = len(token_ids)
