"""Mid-training: its texts, what they leave out, and likelihoods against a plain forward pass."""

import copy
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError, MissingFileError
from recbole_gr2.policy import load_model
from recbole_gr2.stages import midtrain
from recbole_gr2.tasks import HELD_OUT, examples_of, general_texts, split_text, task_texts, vocabulary_texts
from recbole_gr2.types import Context


@pytest.fixture(scope="module")
def student(context):
    """(model, tokenizer) of the sft stage."""
    return load_model(context.folders["sft"])


def changed(context: Context, folder: Path, **changes) -> Context:
    """The same run with other settings, writing to `folder`."""
    return replace(context, folder=folder, settings={**dict(context.settings), **changes})


class Letters:
    """A tokenizer whose tokens are letters; 0 ends a text."""

    eos_token_id = 0
    chat_template = None
    added_tokens_decoder: ClassVar[dict] = {}

    def __len__(self):
        return 128

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


@settings(deadline=None)
@given(st.lists(st.text("abcdef", min_size=1, max_size=9), max_size=12), st.integers(3, 4), st.integers(12, 30))
def test_fitting_loses_no_piece_and_is_never_too_long(pieces, head, longest):
    texts = list(split_text(["H" * head, *pieces], Letters(), longest))
    whole = []
    for ids in texts:
        assert len(ids) <= longest
        assert ids[:head] == [ord("H")] * head and ids[-1] == 0
        whole += ids[head:-1]
    room = longest - head - 1
    assert whole == [ord(letter) for piece in pieces for letter in piece[:room]]
    cuts, borders = [0], {sum(len(piece[:room]) for piece in pieces[:n]) for n in range(len(pieces) + 1)}
    for ids in texts:
        cuts.append(cuts[-1] + len(ids) - head - 1)
    assert set(cuts) <= borders  # texts end between pieces
    assert len(texts) <= max(1, len(pieces))


def captured_histories(context, tmp_path, monkeypatch, **changes) -> dict:
    caught = {}

    def stop(items, histories, *args):
        caught["histories"] = histories
        raise StopIteration

    monkeypatch.setattr(midtrain, "task_texts", stop)
    with pytest.raises(StopIteration):
        midtrain.run(changed(context, tmp_path, **changes))
    return dict(zip(context.data.train_sequences(), caught["histories"], strict=True))


def test_midtrain_leaves_the_targets_of_the_train_lists_out(context, tmp_path, monkeypatch):
    held = captured_histories(context, tmp_path, monkeypatch)
    whole = captured_histories(context, tmp_path, monkeypatch, mid_hold_out=False)
    for user, sequence in context.data.sequences.items():
        assert held[user] == sequence[:-3].tolist() and whole[user] == sequence[:-2].tolist()
        assert not set(context.data.targets(user, "train")) & set(held[user])


@pytest.mark.slow
def test_only_the_second_model_learns_the_targets_of_the_train_lists(tiny_run, finished_copy):
    """After a change of item n-2 of every user, midtrain has the same weights. midtrain_all and OneRec-Think differ."""
    stages, other = ["midtrain", "onerec_think-no-think"], "midtrain_all"
    root = finished_copy()
    whole = tiny_run(root, stages)
    data = copy.copy(whole.data)
    del data.fingerprint  # it is computed from the sequences
    data.sequences = {user: items.copy() for user, items in data.sequences.items()}
    for items in data.sequences.values():
        items[-3] = items[-3] % data.item_count + 1
    changed = tiny_run(root, stages, data=data)
    seen = tiny_run(root, stages, data=whole.data, mid_hold_out=False)
    assert other in whole.folders and other in changed.folders and other not in seen.folders
    runs = (("whole", whole), ("changed", changed), ("seen", seen))
    weights = {
        (name, stage): (run.folders[stage] / "model" / "model.safetensors").read_bytes()
        for name, run in runs
        for stage in {*stages, other} & set(run.folders)
    }
    assert weights["whole", "midtrain"] == weights["changed", "midtrain"] != weights["whole", other]
    assert weights["whole", other] != weights["changed", other]
    assert weights["whole", stages[1]] != weights["changed", stages[1]]
    # Without mid_hold_out the stage midtrain is the same as the second model.
    assert weights["whole", other] == weights["seen", "midtrain"]
    assert weights["whole", stages[1]] == weights["seen", stages[1]]


def test_mixture_fills_each_share(context, catalog):
    _, tokenizer = load_model(context.folders["midtrain"])
    histories = [tuple(s[:-3]) for s in context.data.train_sequences().values()]
    learnt, _ = general_texts(None, 2000, seed=1)
    texts, mix = task_texts(catalog, histories, learnt, context.settings), context.settings["mid_mix"]
    rows, longest = examples_of(texts, tokenizer, mix, 6000, 256, seed=1), 256
    assert list(rows) == ["caption", "general", "persona", "sequential"]  # whatever the order of the setting
    assert rows == examples_of(texts, tokenizer, dict(reversed(mix.items())), 6000, 256, seed=1)
    for part, (task, share) in enumerate(sorted(mix.items()), start=1):
        count = sum(len(row.input_ids) for row in rows[task])
        assert share * 6000 <= count < share * 6000 + 40 * longest, task
        assert all(len(row.input_ids) <= longest and set(row.parts) == {part} for row in rows[task])
    assert rows == examples_of(texts, tokenizer, mix, 6000, 256, seed=1)
    assert rows != examples_of(texts, tokenizer, mix, 6000, 256, seed=2)
    assert examples_of(texts, tokenizer, {"persona": 1.0}, 0, 256, seed=1) == {"persona": []}
    few = examples_of({"caption": texts["caption"][:3]}, tokenizer, {"caption": 1.0}, 500, 256, seed=1)["caption"]
    times = Counter(tuple(row.input_ids) for row in few)  # in passes: each text once before any comes again
    assert len(times) == 3 and max(times.values()) - min(times.values()) <= 1 < min(times.values())


def test_general_texts(tmp_path):
    learnt, held = general_texts(None, 500, seed=1)
    assert len(held) == HELD_OUT and not set(held) & set(learnt) and 2000 <= sum(map(len, learnt)) < 12000
    assert general_texts(None, 500, seed=1) == (learnt, held) != general_texts(None, 500, seed=2)
    assert general_texts(None, 0, seed=1) == ([], held)
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Paragraph {letter} is " + "long " * 40 for letter in "ABC") + "\n\nshort\n\n")
    learnt, held = general_texts(str(file), 1000, seed=1)
    assert len(learnt) == 1 and len(held) == 2 and all(part.startswith("Paragraph ") for part in learnt + held)
    file.write_text("short\n")
    with pytest.raises(ConfigurationError, match="no paragraph"):
        general_texts(str(file), 1000, seed=1)
    with pytest.raises(MissingFileError, match="there is no text file"):
        general_texts(str(tmp_path / "absent.txt"), 1000, seed=1)


def test_midtrain_trains_the_embeddings_first(context, finished):
    """Two logs in one: the first phase knows one task, the second logs each task's loss by itself."""
    folder, summary = finished.folders["midtrain"], finished.records["midtrain"].summary
    log = json.loads((folder / "log.json").read_text())
    assert "loss/persona" in log[0] and not {"loss/sequential", "loss/general"} & set(log[0])
    assert {f"loss/{task}" for task in ("sequential", "persona", "caption", "general")} <= set().union(*log)
    assert summary["embedding_tokens"] >= 1000 and summary["tokens"]["general"] > 0
    assert summary["perplexity"]["after"] > 1 and 1 < summary["perplexity"]["before"] < 1e6
    assert not list((folder / "checkpoints").rglob("checkpoint-*"))


@pytest.mark.slow
def test_lora_starts_from_the_same_weights_after_a_kill_in_phase_2(context, tmp_path):
    """Phase 1 is then loaded instead of trained, and leaves another random state."""

    def kill(text):
        if "phase 2" in text:
            raise KeyboardInterrupt

    options = {"llm_lora_rank": 2, "mid_tokens": 600, "mid_embedding_tokens": 600}
    whole, again = (changed(context, tmp_path / name, **options) for name in ("whole", "again"))
    midtrain.run(whole)
    with pytest.raises(KeyboardInterrupt):
        midtrain.run(replace(again, say=kill))
    midtrain.run(again)
    one, two = (load_file(each.folder / "model" / "model.safetensors") for each in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_corpus_depends_on_nothing_outside_midtrains_key(context):
    texts = [
        vocabulary_texts(Catalog(context.data.catalog[:30]), {**dict(context.settings), "prompt_history": n})
        for n in (2, 9)
    ]
    assert texts[0] == texts[1]


def test_continuation_log_likelihood_is_that_of_a_plain_forward(student):
    from recbole_gr2.llm.likelihood import continuation_log_likelihood

    model, tokenizer = student
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 400) for _ in range(length)] for length in (7, 1, 30, 7, 12)]
    continuations = [[[rng.randrange(5, 400) for _ in range(6)] for _ in range(count)] for count in (3, 3, 3, 2, 5)]
    for batch_size in (1, 2, 16):
        scores = continuation_log_likelihood(
            model, prompts, continuations, pad_id=tokenizer.pad_token_id, batch_size=batch_size
        )
        for prompt, options, row in zip(prompts, continuations, scores, strict=True):
            assert len(row) == len(options)
            for option, score in zip(options, row, strict=True):
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + option])).logits[0].log_softmax(-1)
                plain = sum(logits[len(prompt) - 1 + n, token].item() for n, token in enumerate(option))
                assert score == pytest.approx(plain, abs=1e-3)


def test_a_perplexity_that_is_too_large_is_infinite():
    from types import SimpleNamespace

    from recbole_gr2.llm.likelihood import perplexity

    class Wrong(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, **options):
            return SimpleNamespace(logits=torch.tensor([1e5, 0.0]).expand(*input_ids.shape, 2))

    assert perplexity(Wrong(), [[0, 1, 1]], pad_id=0) == math.inf
    assert perplexity(Wrong(), [[0, 0, 0]], pad_id=0) == 1


def test_perplexity_is_that_of_a_plain_forward(student):
    from recbole_gr2.llm.likelihood import perplexity

    model, tokenizer = student
    texts = [[5, 9, 30, 31], [7, 8], [40, 41, 42, 43, 44, 45, 46]]
    total, count = 0.0, 0
    for ids in texts:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logits[n - 1, ids[n]].item() for n in range(1, len(ids)))
        count += len(ids) - 1
    for batch_size in (1, 2, 8):
        found = perplexity(model, texts, pad_id=tokenizer.pad_token_id, batch_size=batch_size)
        assert found == pytest.approx(math.exp(total / count), rel=1e-4)
