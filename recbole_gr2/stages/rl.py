"""RL: DAPO with verifiable rewards on train requests that contain their target (GR2, section 5).

Three stages share this module. `rl` starts from the sft model, or from the distilled model if `rl_start` names it.
`distilled` starts from the mid-trained model, with the same reward and a KL term to a teacher (GR2-TR, on-policy
distillation). `internalised` starts from the rl model and trains answers without reasoning (GR2-TR, reasoning
internalisation), which take less time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recbole_gr2.artifacts import load_catalog
from recbole_gr2.bridge.data import Data
from recbole_gr2.config import Settings
from recbole_gr2.distributed import WORLD_SIZE, check_replicas, check_shares
from recbole_gr2.errors import ConfigurationError, QualityCheckError
from recbole_gr2.lists import training_requests
from recbole_gr2.llm.adapter import merged, with_lora
from recbole_gr2.llm.card import write_model_card
from recbole_gr2.llm.curves import FIGURES, curve
from recbole_gr2.llm.endpoint import check_endpoint, check_url
from recbole_gr2.llm.model import save_language_model
from recbole_gr2.llm.train import FiniteLoss, ProgressLines
from recbole_gr2.policy import (
    answer_grammar,
    engine,
    engine_value,
    load_model,
    new_tokens,
    resolved_bf16,
    use_bf16,
)
from recbole_gr2.prompts import PromptMaker, encode_prompt, prompt_values
from recbole_gr2.rewards import REWARDS, WeightedRewards, overlong, reward_names
from recbole_gr2.seeding import derive_seed, seed_everything
from recbole_gr2.store import folder_hash, module_hash, write_json
from recbole_gr2.types import Context, Request, Stage

OVERLONG_WEIGHT = 0.1  # weight of the penalty of long reasoning. Our choice.
WARMUP_ROUNDS = 2  # rounds in which the learning rate rises. Our choice.
MAX_ROUNDS_WITHOUT_SIGNAL = 5  # consecutive rounds with zero-variance groups only, before training stops. Our choice.


def run(context: Context) -> dict[str, Any]:
    """Write model/, README.md, log.json and checkpoints/rollouts.jsonl. Several processes may run it together.

    The parameters of the stage are `start`, the stage whose model is trained; `reasoning`, whether answers reason;
    `distilled`, whether a teacher takes part; `seed`, the name that the seed is derived from; and for the model card
    `purpose`, what the model is trained for, and `excluded`, the settings that do not change the model.

    Raises:
        QualityCheckError: there are fewer requests than a round needs, or no round has a usable group.
    """
    from recbole_gr2.llm.checkpoints import last_checkpoint
    from recbole_gr2.llm.dapo import DAPOTrainer
    from recbole_gr2.llm.dapo_config import dapo_config
    from recbole_gr2.llm.distill import DistillTrainer

    settings, parameters = context.settings, context.parameters
    maker = PromptMaker.of(settings, load_catalog(context))
    requests = training_requests(context, purpose="rl")
    if len(requests) < settings["rl_prompts_per_step"]:
        raise QualityCheckError(
            f"{len(requests)} train requests contain their target, fewer than the {settings['rl_prompts_per_step']} of "
            "a round",
            where="rl_prompts_per_step",
            why="a round needs different requests",
            do="lower rl_prompts_per_step, or use a better base model",
        )
    model, tokenizer = load_model(context.folders[parameters["start"]])
    grammar = answer_grammar(tokenizer, settings, reasoning=parameters["reasoning"])
    prompts = [prompt_record(maker, request, tokenizer) for request in requests]
    rewards: dict[str, Any] = dict(REWARDS)
    weights: dict[str, Any] = dict(settings["rl_rewards"])
    if settings["rl_overlong_buffer"] and grammar.max_reasoning:
        rewards["overlong"] = overlong(grammar.max_reasoning, settings["rl_overlong_buffer"])
        weights["overlong"] = OVERLONG_WEIGHT
    seed = derive_seed(settings["seed"], parameters["seed"])
    seed_everything(seed)
    folder = context.folder / "checkpoints"
    config = dapo_config(
        str(folder),
        steps=settings["distilled_steps" if parameters["distilled"] else "rl_steps"],
        prompts_per_step=settings["rl_prompts_per_step"],
        num_generations=settings["rl_num_generations"],
        num_iterations=settings["rl_num_iterations"],
        micro_batch_size=settings["llm_micro_batch_size"],
        gradient_checkpointing=settings["llm_gradient_checkpointing"],
        learning_rate=settings["rl_learning_rate"],
        warmup_steps=WARMUP_ROUNDS,
        temperature=settings["rl_temperature"],
        epsilon_low=settings["rl_epsilon_low"],
        epsilon_high=settings["rl_epsilon_high"],
        bf16=use_bf16(settings, model.device.type),
        seed=seed,
        # A model that is being distilled has not learned to end its reasoning yet.
        mask_truncated=not parameters["distilled"] and settings["rl_mask_truncated"],
        save_steps=settings["rl_save_steps"],
        use_cpu=model.device.type == "cpu",
        processes=WORLD_SIZE,
    )
    model = with_lora(model, settings["llm_lora_rank"], new_tokens(tokenizer))
    options: dict[str, Any] = {
        "requests": {request.request_id: request for request in requests},
        "rewards": WeightedRewards(weights, rewards),
        "grammar": grammar,
        "tokenizer": tokenizer,
        "max_resample": settings["rl_max_resample"],
        "max_empty_rounds": MAX_ROUNDS_WITHOUT_SIGNAL,
        "callbacks": [ProgressLines(context.say, FIGURES), FiniteLoss()],
        "engine": engine(settings),
    }
    if parameters["distilled"]:
        teacher = _distillation_teacher(context, tokenizer)
        trainer: DAPOTrainer = DistillTrainer(
            model, config, prompts, teacher=teacher, kl=settings["distilled_kl"], **options
        )
    else:
        trainer = DAPOTrainer(model, config, prompts, **options)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    log = [line for line in trainer.state.log_history if "reward" in line]
    if trainer.accelerator.is_main_process:
        save_language_model(merged(model), tokenizer, context.folder / "model")
        write_model_card(
            context,
            purpose=parameters["purpose"],
            method=context.stage,
            settings=("llm", "prompt_", "rl_", *(["distilled_"] if parameters["distilled"] else [])),
            excluded=parameters["excluded"],
        )
        write_json(context.folder / "log.json", log)
    return {"requests": len(requests), "rounds": len(log), "curve": curve(log)}


def prompt_record(maker: PromptMaker, request: Request, tokenizer: Any) -> dict[str, Any]:
    """A request as the trainer reads it."""
    prompt = maker.render(request)
    return {
        "request_id": request.request_id,
        "prompt_ids": encode_prompt(prompt, tokenizer),
        "label_items": maker.label_items(request, prompt),
        "label_prior": maker.label_prior(request, prompt),
    }


def _distillation_teacher(context: Context, tokenizer: Any) -> Any:
    """The teacher of on-policy distillation: a stage of this run, the folder of a stage, or an endpoint."""
    from recbole_gr2.llm.distill import EndpointTeacher, LocalTeacher

    settings, name = context.settings, context.settings["distilled_teacher"]
    if name.startswith(("http://", "https://")):
        return EndpointTeacher(name, settings["distilled_endpoint_model"], concurrency=settings["trace_concurrency"])
    model, teacher_tokenizer = load_model(context.folders.get(name, Path(name)))
    return LocalTeacher(model, teacher_tokenizer, tokenizer)


def check_settings(settings: Settings) -> None:
    """Check the rewards, the address of the teacher's endpoint, and that several processes can share a round."""
    WeightedRewards(settings["rl_rewards"])
    if "://" in settings["distilled_teacher"]:
        check_url(settings["distilled_teacher"], where="distilled_teacher")
    check_shares("rl_prompts_per_step", settings["rl_prompts_per_step"])


def check_data(settings: Settings, data: Data) -> None:
    """Check that the data set has enough users for a round, and that the processes and the engine can make rollouts."""
    check_replicas("reinforcement learning (the stages rl, distilled and internalised)")
    engine(settings)
    users = len(data.rows("train")[1])
    if users < settings["rl_prompts_per_step"]:
        raise ConfigurationError(
            f"a round needs {settings['rl_prompts_per_step']} train requests, and {users} users have one",
            where="rl_prompts_per_step",
            why="a round needs different requests",
            do=f"choose at most {users}",
        )


def _check_distillation(settings: Settings, data: Data) -> None:
    """Check the data set, and that the teacher of distillation exists or there is a client for its endpoint."""
    check_data(settings, data)
    name = settings["distilled_teacher"]
    if name.startswith(("http://", "https://")):
        check_endpoint(name, where="distilled_teacher")
    else:
        _teacher_values(settings)


def key_values(settings: Settings) -> dict[str, Any]:
    """Return the hashes of the prompt template and of the user's own rewards, the precision and the engine."""
    values: dict[str, Any] = {**prompt_values(settings), **resolved_bf16(settings), **engine_value(settings)}
    for name in reward_names(settings["rl_rewards"]):
        if ":" in name:
            values[f"{name}.sha"] = module_hash(name.partition(":")[0], where="rl_rewards")
    return values


def _teacher_values(settings: Settings) -> dict[str, Any]:
    """The hashes of `key_values`, and that of a distillation teacher in a folder."""
    values, name = key_values(settings), settings["distilled_teacher"]
    if name != "sft" and "://" not in name:
        values["distilled_teacher"] = folder_hash(Path(name) / "model", where="distilled_teacher")
    return values


def stages(settings: Settings) -> list[Stage]:
    """Declare rl, distilled and internalised."""

    def variant(
        name: str,
        start: str,
        needs: Iterable[str] = (),
        *,
        own: tuple[str, ...] = (),
        excluded: tuple[str, ...] = ("rl_start",),
        values: Callable[[Settings], dict[str, Any]] = key_values,
        check_data: Callable[[Settings, Data], None] = check_data,
        **parameters: Any,
    ) -> Stage:
        steps = "distilled_steps" if "distilled_" in own else "rl_steps"
        return Stage(
            name=name,
            version=9,
            run=run,
            settings=(
                "rl_",
                "cand_num",
                "cand_ranker",
                "prompt_",
                "llm_lora_rank",
                "llm_bf16",
                "llm_micro_batch_size",
                "seed",
                *own,
            ),
            excluded=(*excluded, "prompt_items"),  # the key has it if it is not the default
            needs=("tokenizer", "prior", start, *needs),
            check=check_settings,
            check_data=check_data,
            key_values=values,
            parameters={"start": start, "reasoning": True, "distilled": False, "excluded": excluded, **parameters},
            distributed=True,
            amount=steps,
            tokens=lambda settings: (
                settings[steps]
                * settings["rl_prompts_per_step"]
                * settings["rl_num_generations"]
                * settings["rl_num_iterations"]
                * settings["sft_max_length"]
            ),
        )

    return [
        variant(
            "distilled",
            "midtrain",
            ("sft",) if settings["distilled_teacher"] == "sft" else (),
            own=("distilled_",),
            excluded=("rl_start", "rl_steps", "rl_mask_truncated"),
            values=_teacher_values,
            check_data=_check_distillation,
            distilled=True,
            purpose="answers with reasoning and a ranking, by on-policy distillation from the mid-trained model",
            seed="distill",  # the former name of the stage, kept so that its random numbers stay the same
        ),
        variant(
            "rl",
            settings["rl_start"],
            purpose="answers with reasoning and a ranking, by reinforcement learning (DAPO)",
            seed="rl",
        ),
        variant(
            "internalised",
            "rl",
            reasoning=False,
            purpose="answers without reasoning, by a second run of reinforcement learning",
            seed="internalise",
        ),
    ]
