"""Keys and values of settings in earlier versions. docs/migration.md lists them too."""

from __future__ import annotations

_ONEREC_THINK = (
    "variant",
    "texts",
    "steps",
    "passes",
    "batch_size",
    "learning_rate",
    "max_trace",
    "samples",
    "temperature",
    "beams",
    "similar",
    "rl_steps",
    "rl_prompts_per_step",
    "rl_num_generations",
    "rl_beams",
    "rl_learning_rate",
    "rl_kl",
)
RENAMED: dict[str, str] = {
    "distill_endpoint_model": "distilled_endpoint_model",
    "distill_kl": "distilled_kl",
    "distill_steps": "distilled_steps",
    "distill_teacher": "distilled_teacher",
    "evidence_providers": "prior_features",
    "evidence_steps": "prior_steps",
    "mid_micro_batch_size": "llm_micro_batch_size",
    "mid_save_steps": "llm_save_steps",
    "models_words": "models_options",
    **{f"ort_{name}": f"onerec_think_{name}" for name in _ONEREC_THINK},
    "ort_micro_batch_size": "llm_micro_batch_size",
    "ort_rl_micro_batch_size": "llm_micro_batch_size",
    "ort_rl_save_steps": "rl_save_steps",
    "ort_save_steps": "llm_save_steps",
    "rl_max_refill": "rl_max_resample",
    "rl_micro_batch_size": "llm_micro_batch_size",
    "sft_micro_batch_size": "llm_micro_batch_size",
    "sft_save_steps": "llm_save_steps",
}
_CONSTANT = "It is now a constant."
_FOLDS = "The ensemble has one network for each fold of the users."
REMOVED: dict[str, tuple[str, str]] = {  # key: (fixed value, reason)
    "evidence_dropout": ("0.2", _CONSTANT),
    "evidence_fits": ("5", _FOLDS),
    "evidence_folds": ("5", _CONSTANT),
    "evidence_hidden": ("32", _CONSTANT),
    "evidence_learning_rate": ("0.003", _CONSTANT),
    "evidence_weight_decay": ("0.01", _CONSTANT),
    "mid_warmup_share": ("0.05", _CONSTANT),
    "normalize_all": ("False", "The time order is exact for either value."),
    "ort_trace_weight": ("1.0", "OneRec-Think defines one loss over trace and item."),
    "ort_warmup_share": ("0.1", "OneRec-Think's released code defines it."),
    "prior_fits": ("5", _FOLDS),
    "prompt_evidence": ("[]", "Features in the prompt gave no improvement (results/tried.md)."),
    "repeatable": ("True", "RecBole requires it for sequential data."),
    "rl_injected": ("0", "No base model makes lists with an inserted target."),
    "rl_max_dead": ("5", _CONSTANT),
    "rl_minibatches": ("1", _CONSTANT),
    "rl_overlong_weight": ("0.1", _CONSTANT),
    "rl_warmup_steps": ("2", _CONSTANT),
    "sft_others": ("prior", "It was the best choice (results/tried.md)."),
    "sft_ranking_weight": ("1.0", "Only its ratio to sft_reasoning_weight matters."),
    "sft_warmup_share": ("0.05", _CONSTANT),
}
RENAMED_VALUES: dict[tuple[str, str], str] = {
    ("eval_scope", "all"): "all_users",
    ("eval_scope", "in_list"): "hit_users",
    ("rl_start", "distill"): "distilled",
}
