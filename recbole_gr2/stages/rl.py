"""RL: DAPO on train lists that hold their target (or get it, `rl_injected`), rewarded for moving it up.

`rl` starts from the sft model, or from the distill model if `rl_start` says so. `distill` stands in sft's place: from
the mid-trained model, with the same reward, near a teacher (GR2-TR, on-policy distillation). `internalise` is a second
run from the rl model, with the same reward and without the trace, for answers that are a ranking alone: the model that
is quick enough to be deployed (GR2-TR, reasoning internalisation).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from recbole_gr2.errors import GateError
from recbole_gr2.llm.adapter import merged, with_lora
from recbole_gr2.llm.backbone import save_backbone
from recbole_gr2.llm.finetune import ProgressLines
from recbole_gr2.processes import PROCESSES
from recbole_gr2.prompts import PromptMaker, encode_prompt
from recbole_gr2.rewards import REWARDS, WeightedRewards, overlong
from recbole_gr2.seeding import derive_seed, seed_everything
from recbole_gr2.stages import Context
from recbole_gr2.stages.evidence import injected_requests
from recbole_gr2.stages.midtrain import load_model, load_stage_model, new_tokens, use_bf16
from recbole_gr2.stages.tokenizer import load_items
from recbole_gr2.stages.traces import answer_grammar, training_requests
from recbole_gr2.store import write_json

FIGURES = (  # of a round, in the log and in the report
    "reward",
    "unchanged",
    "reward/rank_gain",
    "reward/ndcg",
    "truncated",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "frac_groups_kept",
    "entropy",
    "teacher_kl",
)


def run(context: Context) -> dict:
    """Writes model/, log.json and checkpoints/rollouts.jsonl. Several processes may run it together.

    Raises:
        GateError: no list to learn from, or `rl_max_dead` rounds in a row without a usable group.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from recbole_gr2.llm.dapo import DAPOTrainer, dapo_config
    from recbole_gr2.llm.distill import DistillTrainer

    settings = context.settings
    items = load_items(context.folders["tokenizer"], context.data.items)
    maker = PromptMaker.of(settings, items)
    requests = training_requests(context, items, None, "rl")
    if len(requests) < settings["rl_prompts_per_step"]:
        raise GateError(
            f"{len(requests)} lists hold their target, fewer than the {settings['rl_prompts_per_step']} of a round",
            where="rl_prompts_per_step",
            do="lower it, or train a better base model",
        )
    injected = injected_requests(context, items, settings["rl_injected"])
    requests += injected
    distill = context.stage == "distill"
    start = {"internalise": "rl", "distill": "midtrain"}.get(context.stage) or settings["rl_start"]
    model, tokenizer = load_stage_model(context, start)
    grammar = answer_grammar(tokenizer, settings, reasoning=context.stage != "internalise")
    rows = []
    for request in requests:
        prompt = maker.render(request)
        rows.append(
            {
                "request_id": request.request_id,
                "prompt_ids": encode_prompt(prompt, tokenizer),
                "label_items": maker.label_items(request, prompt),
                "label_prior": maker.label_prior(request, prompt),
            }
        )
    rewards, weights = dict(REWARDS), dict(settings["rl_rewards"])
    if settings["rl_overlong_buffer"] and grammar.max_reasoning:
        rewards["overlong"] = overlong(grammar.max_reasoning, settings["rl_overlong_buffer"])
        weights["overlong"] = settings["rl_overlong_weight"]
    seed = derive_seed(settings["seed"], context.stage)
    seed_everything(seed)
    bf16 = use_bf16(settings, model.device.type)
    folder = context.folder / "checkpoints"
    config = dapo_config(
        str(folder),
        steps=settings["distill_steps" if distill else "rl_steps"],
        prompts_per_step=settings["rl_prompts_per_step"],
        num_generations=settings["rl_num_generations"],
        num_iterations=settings["rl_num_iterations"],
        minibatches=settings["rl_minibatches"],
        micro_batch_size=settings["rl_micro_batch_size"],
        learning_rate=settings["rl_learning_rate"],
        warmup_steps=settings["rl_warmup_steps"],
        temperature=settings["rl_temperature"],
        epsilon_low=settings["rl_epsilon_low"],
        epsilon_high=settings["rl_epsilon_high"],
        bf16=bf16,
        seed=seed,
        mask_truncated=not distill and settings["rl_mask_truncated"],  # distill has yet to learn where to end
        save_steps=settings["rl_save_steps"],
        use_cpu=model.device.type == "cpu",
        processes=PROCESSES,
    )
    config.save_total_limit = 1
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    trainer_class, more = DAPOTrainer, {}
    if distill:
        trainer_class, more = DistillTrainer, {"teacher": teacher(context, tokenizer), "kl": settings["distill_kl"]}
    trainer = trainer_class(
        model,
        config,
        rows,
        requests={r.request_id: r for r in requests},
        rewards=WeightedRewards(weights, rewards),
        grammar=grammar,
        tokenizer=tokenizer,
        max_refill=settings["rl_max_refill"],
        max_dead=settings["rl_max_dead"],
        callbacks=[ProgressLines(context.say, FIGURES)],
        **more,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    log = [line for line in trainer.state.log_history if "reward" in line]
    if trainer.accelerator.is_main_process:
        save_backbone(merged(model), tokenizer, context.folder / "model")
        write_json(context.folder / "log.json", log)
    return {"requests": len(requests), "injected": len(injected), "rounds": len(log), "curve": curve(log)}


def teacher(context: Context, tokenizer):
    """The teacher of distill: the sft model of this run, one in a folder, or one behind an endpoint."""
    from recbole_gr2.llm.distill import EndpointTeacher, LocalTeacher

    settings, name = context.settings, context.settings["distill_teacher"]
    if name.startswith(("http://", "https://")):
        return EndpointTeacher(name, settings["distill_endpoint_model"], concurrency=settings["trace_concurrency"])
    model, known = load_model(context.folders["sft"] if name == "sft" else Path(name))
    return LocalTeacher(model, known, tokenizer)


def curve(log: Sequence[Mapping[str, float]], names: Iterable[str] = FIGURES, parts: int = 5) -> dict[str, list[float]]:
    """Means of what was logged over so many equal parts of the lines, or each line's where there are fewer.

    Names that a line lacks are left out.

    >>> curve([{"reward": 1.0, "loss": 2.0}, {"reward": 3.0, "loss": 2.0}, {"reward": 5.0, "loss": 0.0}], parts=2)
    {'reward': [2.0, 5.0]}
    """
    places = np.array_split(np.arange(len(log)), min(parts, len(log)))
    return {
        name: [float(np.mean([log[place][name] for place in part])) for part in places]
        for name in names
        if all(name in line for line in log)
    }
