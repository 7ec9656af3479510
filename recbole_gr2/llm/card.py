"""Model cards: the README.md in the folder of a stage that trains a language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from recbole_gr2.config import declarations
from recbole_gr2.llm.download import HUB_ID, PACKAGED
from recbole_gr2.llm.model import RANDOM
from recbole_gr2.store import write_text
from recbole_gr2.types import Context

FILE = "README.md"
# Settings that a card leaves out: what it names in words, and values that depend on the machine.
OMITTED = ("llm", "llm_bf16", "llm_engine", "mid_general", "prompt_template")

BODY = """
# {stage} on {dataset}

A causal language model for the re-ranking of recommendations, trained by the stage `{stage}` of recbole-gr2.

- Base model: {base}
- License of the base model: {license}
- Data set: {dataset}. Its own terms apply to models that were trained on it.
- Trained for: {purpose}

## How to load it

{loading}

`model/` has the format of transformers, with safetensors. `manifest.json` contains all settings, the figures of the
training and the checksums of the files. `log.json` contains the logged values of the training. The stage `evaluate`
measures the quality of the answers, which is in the report of each run that uses this model.

## Settings

```yaml
{settings}```

## Limits

- The model knows the semantic IDs of one catalogue, of {levels} levels with {codes} codes each, and the labels of
  {candidates} candidates. It cannot be used with the semantic IDs of another run.
- The answers follow a grammar and the prior of the run. Text that the model generates without them is not a ranking.
- Reasoning can be wrong. The report of a run states the share of answers whose statements are true.
- The model has learned from users with a history. Items need texts or training interactions.{untrained}
"""

WITH_METHOD = """```python
from recbole_gr2 import GR2

gr2 = GR2.load("RUN", method="{method}")  # RUN: the name or folder of a run with this method
gr2.rerank(history=["ITEM", "ITEM"], candidates=["ITEM", "ITEM", "ITEM"])
```

The method also reads other stages of the run, such as semantic IDs, item texts and features. So the folder of the run
is loaded, and not this folder alone."""

WITHOUT_METHOD = """```python
from recbole_gr2.llm.model import load_saved

model, tokenizer = load_saved("model")
```

No re-ranker uses this model directly. Recommenders of `models` and the stages of OneRec-Think start from it."""


def write_model_card(
    context: Context,
    *,
    purpose: str,
    method: str | None,
    settings: Sequence[str],
    excluded: Sequence[str] = (),
) -> None:
    """Write README.md, the model card, to the folder of a stage that wrote `model/`.

    The card is a function of the settings in the key of the stage, so that the same key gives the same card. It
    contains no absolute path.

    Args:
        context: context of the stage.
        purpose: what the model was trained for: the end of the sentence "Trained for: ...".
        method: name of the method that applies the model to lists. None if there is no such method.
        settings: prefixes of the settings that the card lists.
        excluded: settings with such a prefix that are not in the key of the stage.
    """
    speed = (key for key, entry in declarations().items() if entry.speed)
    left_out = {*OMITTED, *excluded, *speed}
    if context.settings["prompt_items"] == declarations()["prompt_items"].default:
        left_out.add("prompt_items")  # the key does not have it either
    names = sorted(name for name in context.settings if name.startswith(tuple(settings)) and name not in left_out)
    write_text(context.folder / FILE, _card(context, purpose, method, {name: context.settings[name] for name in names}))


def _card(context: Context, purpose: str, method: str | None, shown: dict[str, Any]) -> str:
    """The text of the card."""
    values, llm = context.settings, context.settings["llm"]
    hub_id, license_name, base, license_text = _origin(llm)
    data = ModelCardData(
        base_model=hub_id,
        datasets=[values["dataset"]],
        library_name="transformers",
        license=license_name,
        pipeline_tag="text-generation",
        tags=["recbole", "recommendation", "re-ranking", "semantic-ids"],
    )
    untrained = "\n- The base model is untrained. The answers of this model mean nothing." if llm == RANDOM else ""
    body = BODY.format(
        stage=context.stage,
        dataset=values["dataset"],
        base=base,
        license=license_text,
        purpose=purpose,
        loading=WITHOUT_METHOD if method is None else WITH_METHOD.format(method=method),
        settings=yaml.safe_dump(shown, sort_keys=True),
        levels=values["sid_levels"],
        codes=values["sid_codes"],
        candidates=values["cand_num"],
        untrained=untrained,
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _origin(llm: str) -> tuple[str | None, str | None, str, str]:
    """Hub id and license of a base model for the metadata, None if unknown, and both in words."""
    if llm == RANDOM:
        return None, None, "none. The weights started at random.", "none"
    if llm in PACKAGED:
        model = PACKAGED[llm]
        link = f"[{model.hub_id}](https://huggingface.co/{model.hub_id}), the packaged model `{llm}` {model.version}"
        return model.hub_id, model.license.lower(), link, model.license
    if HUB_ID.fullmatch(llm) and not Path(llm).expanduser().is_dir():
        return llm, None, f"[{llm}](https://huggingface.co/{llm})", "see the page of the base model"
    return None, None, f"the folder `{Path(llm).name}`", "see the files of the base model"
