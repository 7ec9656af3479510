"""Load and save a causal language model for re-ranking, and choose its layers and its dtype.

The method needs a chat model whose vocabulary also contains the semantic-ID codes, the candidate labels and the ranking
mark, one id each (GR2, section 3). The paper uses Qwen3-8B. A few layers of a pretrained model and the tokens of one
data set make a model that a laptop CPU can train.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recbole_gr2.errors import ConfigurationError, DependencyError, MissingFileError, nearest
from recbole_gr2.llm.download import resolve
from recbole_gr2.llm.vocabulary import add_tokens, insert_tokens, sync_ids, trim_vocabulary
from recbole_gr2.progress import progress

RANDOM = "random"  # the name of a tiny untrained model for smoke runs
TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", TEXT_END)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# If layers are removed, the last norm gets inputs for which it was not trained, and the model is confidently wrong: the
# first 6 of the 30 layers of SmolLM2-135M give 17.4 nats per token on plain text. With the weights of the norm times
# 0.2 it is 7.1.
CUT_NORM = 0.2


def load_language_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    layers: Sequence[int] | None = None,
    corpus: Iterable[str] | None = None,
    trim: bool = False,
    extra_tokens: Sequence[str] = (),
    seed: int = 0,
    random_config: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Return a model in eval mode and its tokenizer, both with `extra_tokens`.

    Args:
        source: A packaged name, a folder or a hub id (see `download.resolve`), or "random" for a tiny untrained Llama
            whose byte-level tokenizer is trained on `corpus`.
        dtype: Type of the weights. Mixed precision needs float32 here and autocast in training.
        layers: Decoder layers to keep, counted from 0. None keeps all.
        corpus: Texts exactly as in prompts and answers. `trim` and "random" need them. A token stays if it occurs in
            these texts, and " lip" is another token than "lip".
        trim: Remove the tokens that `corpus` does not use.
        extra_tokens: Tokens to add, e.g. `sid.tokens.added_tokens(...)`.
        seed: Seed of a random model and of the embeddings of new tokens.
        random_config: For "random": `vocab_size` and all fields of transformers' LlamaConfig.

    Returns:
        (model, tokenizer). `tokenizer.eos_token` ends an assistant turn. `tokenizer.pad_token` is another token.

    Raises:
        MissingFileError: There is no such model.
        DependencyError: A package that reads the model is missing.
        ConfigurationError: `corpus` is missing, or the layers, the chat template or the tokenizer do not fit.
    """
    texts = None if corpus is None else list(corpus)
    if texts is None and (source == RANDOM or trim):
        raise ConfigurationError(
            "a corpus is needed to choose the vocabulary",
            where=f"load_language_model({str(source)!r}, trim={trim})",
            why="the vocabulary consists of the tokens that occur in the corpus",
            do="pass `corpus`: the texts of prompts and answers",
        )
    if source == RANDOM:
        model, tokenizer = random_model(texts or (), seed=seed, config=random_config)
    else:
        model, tokenizer = _load(resolve(source) if isinstance(source, str) else source, dtype)
    ensure_chat(model, tokenizer, seed)
    if layers is not None:
        keep_layers(model, layers)
    if trim:
        tokenizer = trim_vocabulary(model, tokenizer, texts or ())
    add_tokens(model, tokenizer, extra_tokens, seed)
    return _prepared(model, dtype), tokenizer


def save_language_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write the model (safetensors), the tokenizer and the chat template as a folder that transformers can load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_saved(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return (model in eval mode, tokenizer) from a folder that `save_language_model` wrote.

    Raises:
        MissingFileError: The folder does not exist or contains no model.
    """
    model, tokenizer = _load(Path(folder), dtype)
    return _prepared(model, dtype), tokenizer


def device() -> str:
    """Return the device on which models run: "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def best_dtype(device: str | torch.device) -> str:
    """Return "bf16" if bfloat16 autocast is faster than float32 on `device`, else "fp32".

    It is faster on a GPU with bfloat16 units and on a CPU with AVX512-BF16 or AMX. Other CPUs emulate bfloat16.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if kind == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if fast else "fp32"
    return "fp32"


def uses_bf16(choice: bool | None, device: str | torch.device) -> bool:
    """Return a choice whether to compute in bfloat16; None chooses the faster type of the device."""
    return best_dtype(device) == "bf16" if choice is None else choice


# ---- loading ---------------------------------------------------------------------------------------------------------


def _prepared(model: Any, dtype: torch.dtype) -> Any:
    """Return the model in eval mode with weights of this type, and with the attention for a CPU if there is no GPU."""
    from recbole_gr2.llm.attention import use_float32

    if device() == "cpu":
        use_float32(model)
    return model.to(dtype).eval()


def _load(source: Path | str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return model and tokenizer of a folder (Hugging Face, or a single GGUF file) or of a hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(source, Path) and not (source / "config.json").is_file():
        return _load_gguf(source)
    try:
        return (
            AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False),
            AutoTokenizer.from_pretrained(source, trust_remote_code=False),
        )
    except (OSError, ValueError) as error:  # ValueError: an unknown architecture, or one with code of its own.
        raise MissingFileError(
            f"transformers cannot load a language model from {str(source)!r}",
            where=str(error).strip().splitlines()[0],
            why="the stage needs this model",
            do="check the name, connect to the hub, or give the path of a folder with a model; its weights must be "
            "safetensors, and models with code of their own are not loaded, because pickles and code can do any harm",
        ) from error


def read_config(source: Path | str) -> Any:
    """Return the configuration of a model in a folder or on the Hugging Face Hub, without its weights.

    Raises:
        MissingFileError: There is no model, or it is incomplete.
        DependencyError: A package that reads the model is missing.
    """
    from transformers import AutoConfig

    try:
        if isinstance(source, Path) and not (source / "config.json").is_file():
            return AutoConfig.from_pretrained(source, gguf_file=_gguf_file(source).name, trust_remote_code=False)
        if isinstance(source, Path) and not [*source.glob("*.safetensors")]:
            raise OSError(f"{source} contains no weights (*.safetensors)")
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:  # ValueError: the type of the model is unknown
        raise MissingFileError(
            f"transformers cannot load a language model from {str(source)!r}",
            where=str(source),
            why=str(error).strip().splitlines()[0],
            do="check the name, connect to the hub, or give the path of a folder with a model",
        ) from error


def _load_gguf(folder: Path) -> tuple[Any, Any]:
    """Return the dequantized float32 model and the tokenizer of the single .gguf file in `folder`.

    transformers uses the pre-tokenizer of GPT-2 for every GGUF file. That of SmolLM2 also separates digits from spaces.
    The results differ only if several spaces or line breaks precede a digit, because no token of SmolLM2 has two
    digits.
    """
    from unittest.mock import patch

    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = _gguf_file(folder)
    # transformers prints a bar for the tensors, and has no option against it.
    with patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda all, desc: progress(all, "model file, tensor")):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file.name,
            # Without dequantize the model cannot be saved or trained.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
        )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file.name, trust_remote_code=False)


def _gguf_file(folder: Path) -> Path:
    """Return the only .gguf file in a folder, and check that the package that reads it is installed."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise MissingFileError(
            f"{folder} contains no model: no config.json, and {len(files)} .gguf files instead of one",
            where=str(folder),
            why="the format of a model is recognized by these files",
            do="give a folder with a Hugging Face model, or with exactly one .gguf file",
        )
    if importlib.util.find_spec("gguf") is None:
        raise DependencyError(
            "the package gguf is missing", where=str(files[0]), why="it reads GGUF model files", do="pip install gguf"
        )
    return files[0]


RANDOM_CONFIG: Mapping[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LEAST_VOCABULARY = 259  # 256 bytes and 3 special tokens


_TRIED: set[str] = set()  # settings of random models that can be built


def random_config(config: Mapping[str, Any]) -> Any:
    """Return the configuration of `random_model`. A model of it has been tried without weights, once in a process.

    Raises:
        ConfigurationError: A field does not exist, or no model can have these values.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if unknown := set(config) - set(LlamaConfig().to_dict()):
        near = nearest(str(min(unknown, key=str)), RANDOM_CONFIG)
        raise ConfigurationError(
            f"llm_random has the unknown fields {sorted(map(str, unknown))}",
            where="llm_random",
            why="transformers would ignore them without a message",
            do=(f"did you mean {', '.join(near)}? " if near else "")
            + "Use vocab_size and the fields of transformers' LlamaConfig",
        )
    settings = {**RANDOM_CONFIG, **config}
    try:
        if not settings["vocab_size"] >= LEAST_VOCABULARY:
            raise ValueError(f"vocab_size is below {LEAST_VOCABULARY}, the bytes and special tokens")
        built = LlamaConfig(pad_token_id=0, eos_token_id=2, **settings)
        if repr(settings) not in _TRIED:
            with torch.device("meta"):
                LlamaForCausalLM(built)(input_ids=torch.zeros(1, 4, dtype=torch.long))
            _TRIED.add(repr(settings))
    except Exception as error:  # torch and transformers raise many classes for values that do not fit each other
        raise ConfigurationError(
            f"no model can have llm_random {dict(config)!r:.300}: {' '.join(str(error).split())[:300]}",
            where="llm_random",
            why="the random model could not be built",
            do="correct the values; the number of key-value heads divides that of the heads, which divides hidden_size",
        ) from error
    return built


def random_model(corpus: Iterable[str], *, seed: int = 0, config: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Return an untrained Llama (2 layers, D 64) and a byte-level BPE tokenizer with ChatML, trained on `corpus`.

    Args:
        corpus: Texts from which the tokenizer learns merges. A small corpus gives fewer tokens than `vocab_size`.
        seed: Seed of the weights. The global random state does not change.
        config: `vocab_size` (at least 259: 256 bytes and 3 special tokens; default 2000) and fields of LlamaConfig.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    settings = {**RANDOM_CONFIG, **(config or {})}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=settings.pop("vocab_size"),
            special_tokens=[TEXT_END, TURN_START, TURN_END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=TEXT_END,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, **settings))
    return model, tokenizer


# ---- chat ------------------------------------------------------------------------------------------------------------


def ensure_chat(model: Any, tokenizer: Any, seed: int = 0) -> None:
    """Set the chat template (ChatML if there is none), the end token, and a pad token that differs from it.

    If both tokens were equal, the loss would mask the end of every answer, and the model would never learn to stop.
    The GGUF file of SmolLM2 pads with `<|im_end|>`. Its `<|endoftext|>` occurs in no chat and becomes the pad token.

    Raises:
        ConfigurationError: No special token ends an assistant turn of the model's chat template.
    """
    if tokenizer.chat_template is None:
        insert_tokens(model, tokenizer, [TURN_START, TURN_END], seed, special=True)
        tokenizer.chat_template = CHATML
    tokenizer.eos_token = turn_end(tokenizer)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        added = tokenizer.get_added_vocab()
        free = [name for name in PAD_NAMES if name in added and name != tokenizer.eos_token]
        if not free:
            insert_tokens(model, tokenizer, PAD_NAMES[:1], seed, special=True)
        tokenizer.pad_token = (free or PAD_NAMES)[0]
    sync_ids(model, tokenizer)


def turn_end(tokenizer: Any) -> str:
    """Return the first special token that the chat template writes after the text of an assistant turn."""
    answer = "ANSWER"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token_id in tokenizer(tail, add_special_tokens=False).input_ids:
        if token_id in special:
            return tokenizer.convert_ids_to_tokens(token_id)
    raise ConfigurationError(
        "the chat template of the model ends an assistant turn with no special token",
        where=f"{tokenizer.name_or_path}: {tail!r} follows the answer",
        why="generation would not know where to stop",
        do="use an instruction-tuned model, or remove its chat template: then ChatML is used",
    )


# ---- layers ----------------------------------------------------------------------------------------------------------


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Check that layers can be kept, see `keep_layers`.

    Args:
        layers: Layers to keep, counted from 0.
        depth: Number of layers of the model.

    Raises:
        ConfigurationError: `layers` is empty, not ascending, or names a layer that does not exist.
    """
    if not layers or list(layers) != [number for number in range(depth) if number in layers]:
        raise ConfigurationError(
            f"a model with {depth} layers cannot keep the layers {list(layers)}",
            where="llm_layers",
            why="the remaining layers run in their old order, each once",
            do=f"give layers from 0 to {depth - 1}, each once and in ascending order, or none to keep all",
        )


def keep_layers(model: Any, layers: Sequence[int]) -> None:
    """Remove all decoder layers except `layers`, in place.

    Args:
        model: A causal language model of transformers.
        layers: Layers to keep, counted from 0, in ascending order.

    Raises:
        ConfigurationError: `layers` is empty, not ascending, or names a layer that does not exist.
    """
    depth = len(model.model.layers)
    check_layers(layers, depth)
    numbers = list(layers)
    model.model.layers = nn.ModuleList(model.model.layers[number] for number in numbers)
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position  # the position in the key-value cache
    model.config.num_hidden_layers = len(numbers)
    if len(numbers) < depth:
        with torch.no_grad():
            model.model.norm.weight.mul_(CUT_NORM)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[number] for number in numbers]
