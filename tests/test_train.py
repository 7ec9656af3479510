"""Supervised training: the weighted loss by hand, exact resume, and LoRA."""

import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_gr2.config import properties_folder
from recbole_gr2.distributed import check_launch, check_replicas
from recbole_gr2.errors import ConfigurationError, QualityCheckError
from recbole_gr2.llm.adapter import merged, new_rows_alone, with_lora
from recbole_gr2.llm.beam import SidTrie
from recbole_gr2.llm.checkpoints import CompleteCheckpoints, last_checkpoint
from recbole_gr2.llm.sampler import LengthSampler
from recbole_gr2.llm.scoring import ListInput, train_lists
from recbole_gr2.llm.train import Collator, Example, FiniteLoss, ProgressLines, Training, check_sharding, finetune


@pytest.fixture(name="tokenizer")
def letters():
    """A fast tokenizer of single letters. TRL reads many attributes of a tokenizer."""
    return letter_tokenizer()


def letter_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{chr(ord("a") + n): n + 2 for n in range(26)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")), pad_token="<pad>", eos_token="<eos>"
    )


def tiny(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=28,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


EXAMPLES = [Example(input_ids=[2 + n % 5, 3, 4 + n % 3, 5, 6, 1], parts=[0, 0, 1, 1, 2, 2]) for n in range(12)] + [
    Example(input_ids=[7, 8 + n % 2, 9, 1], parts=[0, 1, 2, 2]) for n in range(4)
]
WEIGHTS = {"reasoning": 0.5, "ranking": 1.0}
ONE_STEP = Training(
    steps=1,
    batch_size=1,
    micro_batch_size=1,
    learning_rate=1e-3,
    warmup_share=0.0,
    seed=7,
    bf16=False,
    save_steps=100,
)


def train(model, tokenizer, folder, examples=EXAMPLES, **changes):
    defaults = dict(
        steps=6, batch_size=8, micro_batch_size=4, learning_rate=1e-2, warmup_share=0.0, seed=7, save_steps=2
    )
    training, others = training_of(**{"bf16": False, **defaults, **changes})
    options = {"part_weights": WEIGHTS, "max_length": 16, **others}
    return finetune(model, tokenizer, examples, folder, training=training, **options)


def training_of(**options):
    """The training with some options, and the options that are not those of a training."""
    names = {field.name for field in fields(Training)}
    own = {name: value for name, value in options.items() if name in names}
    return Training(**own), {name: value for name, value in options.items() if name not in names}


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_reads_each_layer_twice_and_changes_no_weight(tokenizer, tmp_path, rank):
    weights, calls = [], []
    for number, checkpointing in enumerate([False, True]):
        torch.manual_seed(0)
        model = tiny()
        calls.append(0)
        attention = model.model.layers[0].self_attn
        attention.register_forward_hook(lambda *call, run=number: calls.__setitem__(run, calls[run] + 1))
        model = with_lora(model, rank, [26, 27])
        train(model, tokenizer, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        weights.append(merged(model).state_dict())
    assert calls[1] == 2 * calls[0] > 0
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert any(not torch.equal(tiny().state_dict()[name], value) for name, value in weights[1].items())


def test_loss_is_the_weighted_sum_over_parts(tokenizer, tmp_path):
    rows = EXAMPLES[:2]
    model = tiny()
    batch = Collator(0)(
        [
            vars(row) | {"labels": [t if p else -100 for t, p in zip(row.input_ids, row.parts, strict=True)]}
            for row in rows
        ]
    )
    log_probs = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    expected = {1: [], 2: []}
    for r, row in enumerate(rows):
        for t in range(1, len(row.input_ids)):
            if row.parts[t]:
                expected[row.parts[t]].append(-log_probs[r, t - 1, row.input_ids[t]].item())
    total = 0.5 * sum(expected[1]) + 1.0 * sum(expected[2])
    log = finetune(
        tiny(),
        tokenizer,
        rows,
        tmp_path,
        training=replace(ONE_STEP, batch_size=2),
        part_weights=WEIGHTS,
        max_length=16,
    )
    assert log[0]["loss"] == pytest.approx(total / (len(expected[1]) + len(expected[2])), rel=1e-4)
    assert log[0]["loss/reasoning"] == pytest.approx(sum(expected[1]) / len(expected[1]), rel=1e-4)
    assert log[0]["loss/ranking"] == pytest.approx(sum(expected[2]) / len(expected[2]), rel=1e-4)


def test_a_code_is_a_choice_among_those_that_lead_to_an_item(tokenizer, tmp_path):
    """Codes 10, 11 and then 20, 21, 22; the catalogue lacks (11, 20) and (11, 22)."""
    trie = SidTrie.build([(0, 0), (0, 1), (0, 2), (1, 1)], [(10, 11, 12), (20, 21, 22)], begin_id=9)
    row = Example(input_ids=[3, 10, 21, 4, 11, 21, 1], parts=[0, 1, 1, 1, 1, 1, 1])
    logits = tiny()(input_ids=torch.tensor([row.input_ids])).logits[0]
    among = {1: [10, 11], 2: [20, 21, 22], 4: [10, 11], 5: [21]}
    expected = []
    for place in range(1, 7):
        step = logits[place - 1] - logits[place - 1][among.get(place, range(28))].logsumexp(0)
        expected.append(-step[row.input_ids[place]].item())
    assert expected[4] == pytest.approx(0, abs=1e-6)  # only one code is possible
    log = finetune(
        tiny(),
        tokenizer,
        [row],
        tmp_path,
        training=ONE_STEP,
        part_weights={"all": 1.0},
        trie=trie,
        max_length=16,
    )
    assert log[0]["loss"] == pytest.approx(sum(expected) / 6, rel=1e-4)


def test_a_choice_by_hand(tokenizer, tmp_path):
    choices = {2: {12: 0.5, 11: -1.0}, 3: {10: 0.0, 5: 2.0, 7: -3.0}}
    rows = [
        Example(input_ids=[2, 3, 11, 10, 1], parts=[0, 0, 1, 1, 1], choices=choices, from_prior=frozenset([3])),
        Example(input_ids=[4, 5, 6], parts=[0, 1, 1]),
    ]
    expected = []
    for text in rows:
        logits = tiny()(input_ids=torch.tensor([text.input_ids])).logits[0]
        for t in (t for t, part in enumerate(text.parts) if part):
            among = text.choices.get(t, dict.fromkeys(range(28), 0.0))
            weight = 0.2 if t in text.choices else 1.0
            scores = weight * logits[t - 1, list(among)] + torch.tensor(list(among.values()))
            goal = torch.eye(len(among))[list(among).index(text.input_ids[t])]
            if t in text.from_prior:
                goal = torch.tensor(list(among.values())).softmax(-1)
            expected.append(-(goal * scores.log_softmax(-1)).sum().item())
    log = finetune(
        tiny(),
        tokenizer,
        rows,
        tmp_path,
        training=replace(ONE_STEP, batch_size=2, micro_batch_size=2),
        part_weights={"reasoning": 1.0},
        max_length=16,
        llm_weight=0.2,
    )
    assert len(expected) == 5 and log[0]["loss"] == pytest.approx(sum(expected) / 5, rel=1e-4)


def equal(one, two) -> bool:
    return all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


def kill_after(step: int):
    """`say` that stops training as Ctrl-C does, after a step and before its checkpoint."""

    def say(text):
        if text.startswith(f"step {step}/"):
            raise KeyboardInterrupt

    return say


def kill_within_checkpoint(step: int, monkeypatch) -> None:
    """Stop training within the checkpoint of a step: the second half of its files is not written."""
    whole = CompleteCheckpoints.on_save

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == step:
            files = sorted(Path(args.output_dir, f"checkpoint-{step}").iterdir())
            for file in files[len(files) // 2 :]:
                file.unlink()
            raise KeyboardInterrupt
        return whole(self, args, state, control, **kwargs)

    monkeypatch.setattr(CompleteCheckpoints, "on_save", on_save)


MANY = [
    Example(input_ids=[2 + (7 * n + t) % 24 for t in range(3 + n % 5)] + [1], parts=[1] * (4 + n % 5))
    for n in range(20)
]
PASSES = {"steps": 8, "save_steps": 1, "part_weights": {"text": 1.0}}  # 2 2/3 passes of 8, 8 and 4 texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bf16", "stops"),
    [
        (False, [5]),
        pytest.param(False, range(2, 9), marks=pytest.mark.slow),
        pytest.param(True, range(2, 9), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_with_the_same_weights_and_log(tokenizer, tmp_path, bf16, stops):
    whole = tiny()
    log = train(whole, tokenizer, tmp_path / "whole", MANY, bf16=bf16, **PASSES)
    for step in stops:
        folder = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tokenizer, folder, MANY, say=kill_after(step), bf16=bf16, **PASSES)
        resumed, seen = tiny(seed=99), []  # other weights: those of the checkpoint replace them
        assert train(resumed, tokenizer, folder, MANY, say=seen.append, bf16=bf16, **PASSES) == log, step
        assert seen[0].startswith(f"step {step}/"), "the run must continue, not start again"
        assert equal(whole, resumed), step
    again = tiny(seed=99)  # after the last checkpoint, before the end of the stage
    assert train(again, tokenizer, folder, MANY, bf16=bf16, **PASSES) == log and equal(whole, again)


LISTS = [
    ListInput(
        input_ids=[2 + (5 * n + t) % 24 for t in range(4 + n % 3)],
        places=[3 + n % 3] * 3,
        tokens=[5, 6, 7],
        prior=[0.1 * n, 0.0, -0.5],
        relevance=[float(place == n % 3) for place in range(3)],
    )
    for n in range(10)
]


def score(model, tokenizer, folder):
    """Train a model to score lists: three steps with four, four and two of them, and a second pass."""
    options = dict(steps=5, batch_size=4, micro_batch_size=1, learning_rate=1e-2, warmup_share=0.0, save_steps=2)
    training, others = training_of(seed=3, bf16=False, **options)
    return train_lists(model, tokenizer, LISTS, folder, training=training, loss="listwise", llm_weight=0.5, **others)


WORKER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import pytest, torch
from test_train import MANY, NEW, PASSES, kill_after, letter_tokenizer, new_rows_alone, on_cpu, score, tiny, train
on_cpu({parallelism!r})
from recbole_gr2.distributed import RANK, wait_for_all
wait_for_all()
folder, options = Path({folder!r}), {{**PASSES, "micro_batch_size": 2}}
with pytest.raises(KeyboardInterrupt):
    train(tiny(), letter_tokenizer(), folder / "killed", MANY, say=kill_after(5), **options)
wait_for_all()
model, seen = tiny(seed=99), []
log = train(model, letter_tokenizer(), folder / "killed", MANY, say=seen.append, **options)
again = tiny(seed=98)
assert train(again, letter_tokenizer(), folder / "killed", MANY, **options) == log
assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
scorer, rows = tiny(seed=1, tied=False), tiny(seed=2)
scores = score(scorer, letter_tokenizer(), folder / "score")
with new_rows_alone(rows, NEW):
    losses = train(rows, letter_tokenizer(), folder / "rows", MANY, **options)
kinds = {{type(parameter) for each in (model, scorer, rows) for parameter in each.parameters()}}
assert kinds == {{torch.nn.Parameter}}
results = [(each.state_dict(), lines) for each, lines in ((model, log), (scorer, scores), (rows, losses))]
torch.save((results, seen), folder / f"result-{{RANK}}.pt")
"""
NEW = [24, 25, 26, 27]  # tokens whose embeddings are trained alone


def on_cpu(parallelism: str) -> None:
    """Let accelerate use FSDP or DeepSpeed on CPUs. It offers both on GPUs only, and would use DDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if parallelism == "ddp":
        return
    if parallelism == "fsdp":
        torch.distributed.init_process_group("gloo")
    else:
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    PartialState._prepare_backend = lambda *arguments: ("gloo", DistributedType.MULTI_GPU)


def launch_environment(parallelism: str) -> dict[str, str]:
    """The variables that `accelerate launch` sets for a file in properties/accelerate."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = properties_folder() / "accelerate" / f"{parallelism}.yaml"
    words = ["--config_file", str(file), "--num_processes", "2", "run_recbole_gr2.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    if parallelism == "deepspeed":
        arguments.deepspeed_fields_from_accelerate_config = ""
        _, variables = prepare_deepspeed_cmd_env(arguments)
    else:
        variables = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("parallelism", "file"), [("ddp", "optimizer.pt"), ("fsdp", "pytorch_model_fsdp.bin"), ("deepspeed", "latest")]
)
def test_two_processes_give_the_results_of_one_and_resume(tokenizer, tmp_path, parallelism, file):
    """The last batch of each pass has four texts, so that each process has one more without loss."""
    variables = {"OMP_NUM_THREADS": "1"}
    if parallelism == "deepspeed":
        pytest.importorskip("deepspeed")
        variables |= {"DS_ACCELERATOR": "cpu"}
    if parallelism != "ddp":
        variables |= {**launch_environment(parallelism), "ACCELERATE_TORCH_DEVICE": "cpu"}
    two, worker, tests = tmp_path / "two", tmp_path / "worker.py", Path(__file__).parent
    two.mkdir()
    worker.write_text(WORKER.format(tests=str(tests), root=str(tests.parent), folder=str(two), parallelism=parallelism))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (two / "killed" / "checkpoint-8" / file).exists()  # It was used, and not replaced by another one.
    trained, scorer, rows = tiny(), tiny(seed=1, tied=False), tiny(seed=2)
    log = train(trained, tokenizer, tmp_path / "one", MANY, **PASSES)
    scores = score(scorer, tokenizer, tmp_path / "score")
    with new_rows_alone(rows, NEW):
        losses = train(rows, tokenizer, tmp_path / "rows", MANY, **PASSES)
    (first, seen), (second, _) = (torch.load(two / f"result-{rank}.pt") for rank in (0, 1))
    assert seen[0].startswith("step 5/")  # the killed run continued
    for place, (model, lines) in enumerate(((trained, log), (scorer, scores), (rows, losses))):
        weights, shared = first[place]
        assert shared == second[place][1] and [line["step"] for line in shared] == [line["step"] for line in lines]
        for name in {"loss", "loss/text", "grad_norm"} & set(lines[0]):
            assert [line[name] for line in shared] == pytest.approx([line[name] for line in lines], rel=1e-4), name
        for name, value in model.state_dict().items():
            assert torch.equal(weights[name], second[place][0][name])
            assert torch.allclose(value, weights[name], atol=1e-5)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "version 1 of FSDP"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "only the first process",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "stage 3 of ZeRO"),
    ],
)
def test_a_launch_that_is_not_supported_is_an_error(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"(?s){message}.*where.*why.*do .*properties/accelerate/"):
        check_launch()


def test_the_configuration_of_fsdp_is_supported_but_not_in_rl_and_not_with_every_adapter(monkeypatch):
    for name, value in launch_environment("fsdp").items():
        monkeypatch.setenv(name, value)
    check_launch()
    with pytest.raises(ConfigurationError, match=r"(?s)rl does not support FSDP.*ddp\.yaml"):
        check_replicas("rl")
    assert hasattr(with_lora(tiny(tied=False), 2, [26, 27]), "merge_and_unload")
    with pytest.raises(ConfigurationError, match="(?s)whose head is its embedding.*llm_lora_rank"):
        with_lora(tiny(), 2, [26, 27])


def test_a_checkpoint_of_another_parallelism_is_an_error(tmp_path):
    check_sharding(tmp_path, "DDP")
    (tmp_path / "latest").touch()
    check_sharding(tmp_path, "DeepSpeed")
    with pytest.raises(ConfigurationError, match=r"(?s)written with DeepSpeed, and this run uses DDP.*deepspeed\.yaml"):
        check_sharding(tmp_path, "DDP")


@pytest.mark.slow
def test_the_log_does_not_depend_on_the_steps_between_checkpoints(tokenizer, tmp_path):
    """With 60 steps there is a line of the log for every second step; a checkpoint in between would shorten a mean."""
    options = {**PASSES, "steps": 60, "save_steps": 100}
    log = train(tiny(), tokenizer, tmp_path / "whole", MANY, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tokenizer, tmp_path / "killed", MANY, say=kill_after(32), **{**options, "save_steps": 29})
    assert train(tiny(), tokenizer, tmp_path / "killed", MANY, **options) == log


def test_an_incomplete_checkpoint_is_skipped_and_removed(tokenizer, tmp_path, monkeypatch):
    whole = tiny()
    train(whole, tokenizer, tmp_path / "whole", MANY, **PASSES)
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_within_checkpoint(5, patch)
        train(tiny(), tokenizer, folder, MANY, **PASSES)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    (folder / "checkpoint-7").mkdir()
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4"}
    resumed, seen = tiny(seed=99), []
    train(resumed, tokenizer, folder, MANY, say=seen.append, **PASSES)
    assert seen[0].startswith("step 5/") and equal(whole, resumed)
    (checkpoint,) = folder.glob("checkpoint-*")
    with open(checkpoint / "optimizer.pt", "r+b") as handle:
        handle.truncate(100)
    assert last_checkpoint(folder) is None and not checkpoint.exists()


def test_the_order_of_a_pass_depends_on_the_seed_and_the_pass():
    lengths = [3 + n % 7 for n in range(20)]

    def order(step, seed=7):
        return list(LengthSampler(lengths, batch_size=8, seed=seed, step=lambda: step))

    assert order(0) == order(2) != order(3) == order(5) != order(6)  # three steps are a pass
    assert all(sorted(order(step)) == list(range(20)) for step in (0, 3, 6)) and order(0) != order(0, seed=8)
    filled = LengthSampler(lengths, batch_size=8, seed=7, step=lambda: 0, filler=20)
    assert list(filled) == [*order(0), 20, 20, 20, 20] and len(filled) == 24


def test_training_lowers_every_part(tokenizer, tmp_path):
    log = train(tiny(), tokenizer, tmp_path, steps=30, save_steps=100)
    for part in ("loss/reasoning", "loss/ranking"):
        assert log[-1][part] < 0.7 * log[0][part]


@pytest.mark.parametrize(("examples", "change"), [(EXAMPLES, {"max_length": 5}), ([], {"steps": 1})])
def test_texts_that_do_not_fit_are_an_error(tokenizer, tmp_path, examples, change):
    with pytest.raises(ConfigurationError, match="do not fit"):
        train(tiny(), tokenizer, tmp_path, examples=examples, **change)


def test_training_stops_at_the_first_loss_that_is_not_finite(tokenizer, tmp_path):
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = 1e38
    with pytest.raises(QualityCheckError, match="is nan at step 1"):
        train(model, tokenizer, tmp_path, steps=20)


@pytest.mark.parametrize(
    ("logs", "message"), [({"loss": math.inf}, "the loss"), ({"grad_norm": math.nan}, "gradients")]
)
def test_a_loss_or_gradient_that_is_not_finite_is_an_error(logs, message):
    class State:
        global_step = 7

    class Arguments:
        output_dir = "somewhere"

    FiniteLoss().on_log(Arguments, State, None, {"loss": 1.0, "grad_norm": 2.0})
    with pytest.raises(QualityCheckError, match=f"(?s){message} is .* at step 7.*somewhere"):
        FiniteLoss().on_log(Arguments, State, None, {"loss": 1.0, **logs})


@pytest.mark.parametrize(("at_most", "passes"), [(8, 1), (5, 2), (100, 1), (1, 8)])
def test_the_micro_batch_is_a_divisor_of_the_batch(tokenizer, tmp_path, at_most, passes):
    """Of 8 texts, at most 5 at once: 4 and 4."""
    model = tiny()
    sizes = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    train(model, tokenizer, tmp_path, steps=1, micro_batch_size=at_most, learning_rate=0.0)
    assert sizes == [8 // passes] * passes


def test_progress_lines_print_the_named_values():
    class State:
        global_step, max_steps = 3, 10

    lines = []
    progress = ProgressLines(lines.append, ("reward",))
    progress.on_log(None, State, None, {"reward": 0.5, "loss": 1.25, "loss/trace": 2.0, "grad_norm": 9.0})
    progress.on_log(None, State, None, {"train_runtime": 9.0, "loss": 1.0})
    progress.on_log(None, State, None, {"grad_norm": 9.0})
    progress.on_log(None, State, None, {"loss": 1.0, "reward": None})  # TRL has no value
    assert lines == ["step 3/10  reward 0.5000  loss 1.2500  loss/trace 2.0000", "step 3/10  loss 1.0000"]


@pytest.mark.parametrize("tied", [True, False])
def test_lora_merges_to_the_trained_model(tokenizer, tmp_path, tied):
    new = [24, 25, 26, 27]
    model = tiny(tied=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    adapted = with_lora(model, 2, new)
    rows = [Example(input_ids=[2, 24, 25, 26, 27, 1], parts=[1] * 6)] * 4
    log = finetune(
        adapted,
        tokenizer,
        rows,
        tmp_path,
        training=replace(ONE_STEP, steps=8, batch_size=4, micro_batch_size=4, learning_rate=3e-2),
        part_weights={"text": 1.0},
        max_length=16,
    )
    assert log[-1]["loss"] < log[0]["loss"]
    tokens = torch.tensor([[2, 24, 25, 3, 26, 27]])
    adapted.eval()
    with torch.no_grad():
        trained = adapted(tokens).logits
        plain = merged(adapted)
        assert torch.allclose(plain(tokens).logits, trained, atol=1e-5)
    after = plain.get_input_embeddings().weight
    assert not torch.allclose(after[new], before[new]), "new tokens must train"
    assert torch.equal(after[2:24], before[2:24]), "all other tokens must not"


@pytest.mark.parametrize("tied", [True, False])
def test_token_rows_train_alone(tokenizer, tmp_path, tied):
    new = [24, 25, 26, 27]
    model = tiny(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [Example(input_ids=[2, 24, 25, 26, 27, 1], parts=[1] * 6)] * 4
    with new_rows_alone(model, new):
        log = finetune(
            model,
            tokenizer,
            rows,
            tmp_path,
            training=replace(ONE_STEP, steps=8, batch_size=4, micro_batch_size=4, learning_rate=3e-2),
            part_weights={"text": 1.0},
            max_length=16,
        )
    assert log[-1]["loss"] < log[0]["loss"] and all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    for name in before:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(after[name][:24], before[name][:24])
            assert not torch.equal(after[name][24:], before[name][24:])
        else:
            assert torch.equal(after[name], before[name]), name
    model(torch.tensor([[2, 3]])).logits.sum().backward()  # the masks are removed
    assert model.get_input_embeddings().weight.grad[2].abs().sum() > 0


def test_rank_zero_trains_the_model_itself():
    model = tiny()
    assert with_lora(model, 0, [3]) is model and merged(model) is model


def test_collator_masks_padding_that_looks_like_a_token():
    plain = {"choice_at": [], "choices": [], "choice_prior": [], "from_prior": []}
    batch = Collator(1)(
        [
            {"input_ids": [5, 1], "parts": [0, 1], "labels": [-100, 1], **plain},
            {"input_ids": [5, 6, 7], "parts": [0, 1, 1], "labels": [-100, 6, 7], **plain},
        ]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 1, -100], [-100, 6, 7]]
    assert batch["parts"].tolist() == [[0, 1, 0], [0, 1, 1]]
    assert batch["input_ids"].tolist() == [[5, 1, 1], [5, 6, 7]]
