"""The Python interface: `run` trains and compares methods, and `GR2` applies a trained one.

>>> from recbole_gr2 import GR2, run
>>> result = run(dataset="ml-100k", preset="smoke")  # doctest: +SKIP
>>> gr2 = GR2.load(result.path, method="rl")  # doctest: +SKIP
>>> gr2.rerank(history=["50", "181"], candidates=["172", "258", "121"]).ranking  # doctest: +SKIP
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recbole_gr2 import compat

compat.apply()  # Before RecBole is imported.

import recbole.data.dataset  # noqa: E402
from recbole.model.abstract_recommender import SequentialRecommender  # noqa: E402
from recbole.utils import InputType  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from recbole_gr2.artifacts import load_catalog, load_requests, read_answers, read_per_user, request_id  # noqa: E402
from recbole_gr2.bridge.data import Data, exact_time_dataset  # noqa: E402
from recbole_gr2.bridge.evaluator import rank_all  # noqa: E402
from recbole_gr2.bridge.scoring import scores_of_row  # noqa: E402
from recbole_gr2.config import ONEREC_THINK, Settings, load_settings, recbole_config  # noqa: E402
from recbole_gr2.console import quiet_libraries  # noqa: E402
from recbole_gr2.errors import ConfigurationError, GR2Error, MissingFileError, nearest  # noqa: E402
from recbole_gr2.lists import pool_size  # noqa: E402
from recbole_gr2.ranking import complete  # noqa: E402
from recbole_gr2.rerankers.apply import input_orders, rank_pools  # noqa: E402
from recbole_gr2.rerankers.base import Reranker, stage_name  # noqa: E402
from recbole_gr2.rerankers.external import FILE  # noqa: E402
from recbole_gr2.rerankers.registry import RERANKERS, find_reranker, orders  # noqa: E402
from recbole_gr2.run_comparison import compare_runs  # noqa: E402
from recbole_gr2.runs import find_run, finished_stages, one_seed, read_result, seed_runs, stage_folders  # noqa: E402
from recbole_gr2.serving import CandidateList, ListReranker, Reranked  # noqa: E402
from recbole_gr2.store import check_files, explained_disk_errors, numbered_lines, read_manifest, stage_key, write_text  # noqa: E402
from recbole_gr2.types import Candidate, Request, StageRecord  # noqa: E402

if TYPE_CHECKING:
    import pandas as pd
    from recbole.config import Config
    from recbole.data.dataset import Dataset
    from recbole.data.interaction import Interaction

PREFERRED = ("rl", "sft", "prior", "base")  # the method that `GR2.load` chooses: the first of these that the run has


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A finished run with its data set.

    Attributes:
        folder: folder of the run.
        settings: its settings.
        data: its data set.
        folders: folders of its stages, by name.
        records: manifests of its stages, by name.
    """

    folder: Path
    settings: Settings
    data: Data
    folders: Mapping[str, Path]
    records: Mapping[str, StageRecord]

    @property
    def methods(self) -> list[str]:
        """Names of the re-rankers of the run that can rank other lists, as far as no module of the user is needed."""
        named = [order.name for order in orders(self.settings) if order.name != "oracle"]
        named += [name for name in self.settings["eval_rows"] if not name.startswith(FILE)]
        return named + [ONEREC_THINK[model] for model in self.settings["models"] if model in ONEREC_THINK]

    def method(self, name: str) -> type[Reranker] | None:
        """The re-ranker of this name; None if the run has none. Other objects of the user are not imported."""
        by_name = {**{order.name: order for order in orders(self.settings)}, **RERANKERS}
        if name in self.methods:
            return by_name.get(name) or find_reranker(name)
        own = (find_reranker(entry) for entry in self.methods if ":" in entry)  # A class can have another name.
        return next((each for each in own if each.name == name), None)


@lru_cache(maxsize=2)
def open_run(folder: Path, data_path: str | None = None) -> OpenRun:
    """Read a finished run and its data set.

    The stages are looked for beside the folder of the run, so that a results folder can be moved.

    Args:
        folder: folder of the run.
        data_path: folder of data sets, if it is another one than that of the run.

    Raises:
        MissingFileError: a stage of the run is not there any more.
        GR2Error: the data set is another one than that of the run.
    """
    folders = finished_stages(folder)
    records = {}
    for name, stage in folders.items():
        record = read_manifest(stage)
        assert record is not None, "the stage is finished"
        check_files(stage, record)
        records[name] = record
    quiet_libraries()
    changed = {} if data_path is None else {"data_path": data_path}
    settings = load_settings(config_files=[folder / "config.yaml"], command_line=changed)
    data = Data(settings)
    record = records["tokenizer"]
    if stage_key(record.stage, record.version, record.settings, record.needs, data.fingerprint) != record.key:
        raise GR2Error(
            f"the data set {settings['dataset']} has changed since the run",
            where=f"{folder}, data_path {settings['data_path']}",
            why="features and item ids would belong to other interactions and items",
            do="restore the data files of the run, or name their folder with data_path",
        )
    return OpenRun(folder=folder, settings=settings, data=data, folders=folders, records=records)


class GR2(SequentialRecommender):
    """A method of a finished run: a re-ranker of lists, and a model class of RecBole.

    `GR2.load` opens a run, and `rerank` ranks lists. As a model of RecBole, `full_sort_predict` returns the re-ranked
    scores of the run, so that RecBole's evaluator, `full_sort_topk` and `full_sort_scores` work on it, and
    `load_data_and_model` on the file that `save` writes. After `from recbole_gr2 import GR2`, RecBole's `get_model`
    finds the class.

    Args:
        config: RecBole's configuration with `gr2_run`, the folder of the run, and `gr2_method`, a method of the run.
            `GR2.load` makes it.
        dataset: RecBole's data set.
    """

    input_type = InputType.POINTWISE

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.unused = nn.Parameter(torch.zeros(1))  # RecBole's trainer builds an optimizer, which needs a parameter.
        self.opened = open_run(Path(config["gr2_run"]), config["data_path_of_run"])
        self.method = str(config["gr2_method"])
        known = self.opened.data
        for field, tokens in ((known.uid, known.user_tokens), (known.iid, known.item_tokens)):
            if [str(token) for token in dataset.field2id_token[field]] != tokens:
                raise GR2Error(
                    f"the internal ids of {field} differ from those of the run",
                    where=f"model GR2, run {self.opened.folder}",
                    why="the scores would belong to other users or items",
                    do="make the data set with GR2.load(...).config and recbole.data.create_dataset",
                )
        self.ranker = ListReranker(
            self.opened.settings, known, self.opened.folders, self.opened.records, self._find(), lambda text: None
        )
        self.config = config

    def _find(self) -> type[Reranker]:
        """The re-ranker of this name. Raises a ConfigurationError if the run has no such method."""
        found, methods = self.opened.method(self.method), self.opened.methods
        if found is not None:
            return found
        near = nearest(self.method, methods)
        raise ConfigurationError(
            f"the run has no method {self.method!r} that can rank other lists",
            where=str(self.opened.folder),
            why="it applies what its stages have learned",
            do=(f"did you mean {', '.join(near)}? " if near else "") + f"Choose from {', '.join(methods)}",
        )

    @classmethod
    def load(cls, run: str | Path, method: str | None = None, *, data_path: str | Path | None = None) -> GR2:
        """Open a finished run.

        Args:
            run: a run of one seed: its folder, its result.json, or its name below `saved/gr2/*/runs/`.
            method: a method of the run; by default rl, and if the run has none sft, prior or base.
            data_path: folder of data sets, if the data have moved since the run.

        Raises:
            MissingFileError: there is no such run, or its files are incomplete.
            ConfigurationError: the run has no such method.
            GR2Error: the data set has changed.
        """
        opened = open_run(one_seed(find_run(run)), None if data_path is None else str(data_path))
        if method is None:
            method = next(name for name in PREFERRED if name in opened.methods)
        config = run_config(str(opened.folder), method, None if data_path is None else str(data_path))
        return cls(config, opened.data.built[0]).eval()

    def rerank(
        self,
        history: Sequence[str],
        candidates: Sequence[str],
        *,
        scores: Sequence[float] | None = None,
        times: Sequence[float] | None = None,
        items: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Reranked:
        """Re-rank one list. `rerank_batch` is faster for several lists.

        Args:
            history: item tokens of the user's interactions, oldest first. The user need not be in the training data.
            candidates: item tokens, best first.
            scores: a score of each candidate, higher is better. They define the base order. Without them the base
                models of the run score the candidates.
            times: time of each interaction of the history, in the unit of the data file.
            items: texts of items that the data set does not contain, by token: `title`, and optionally `categories`,
                `brand` and `description`. Items of the `.item` file without interactions need not be given.

        Returns:
            The ranking with titles, probabilities and reasoning. Unknown candidates keep their places.

        Raises:
            ConfigurationError: a candidate occurs twice, or scores or times do not fit.
        """
        return self.rerank_batch(
            [CandidateList(history=history, candidates=candidates, scores=scores, times=times, items=items or {})]
        )[0]

    def rerank_batch(self, lists: Iterable[CandidateList]) -> list[Reranked]:
        """Re-rank lists. The result of a list does not depend on the other lists, up to rounding.

        Raises:
            ConfigurationError: a list is not valid. The error names it.
        """
        return self.ranker.rerank(list(lists))

    def save(self, file: str | Path) -> None:
        """Write a checkpoint that RecBole's `load_data_and_model` reads. It refers to the folder of the run.

        >>> from recbole.quick_start.quick_start import load_data_and_model
        >>> config, model, *_ = load_data_and_model("gr2.pth")  # doctest: +SKIP
        """
        path = self.config["data_path_of_run"]
        state = {"config": _Config(str(self.opened.folder.absolute()), self.method, path)}
        torch.save({**state, "state_dict": self.state_dict(), "other_parameter": None}, file)

    # --- RecBole's interface ------------------------------------------------------------------------------------------

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Not available.

        Raises:
            ConfigurationError: always. The stages of a run train GR2.
        """
        raise ConfigurationError(
            "RecBole's trainer cannot train GR2",
            where="model GR2",
            why="its training consists of several stages",
            do="train it with recbole_gr2.run(...), and open the result with GR2.load",
        )

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Return re-ranked scores without ties, (B, N + 1) float32: the item at rank r has -r; masked items -inf.

        Rows of the split that the run reports have the answers of the run. All other rows are ranked now. The
        candidates come first, in the order of the method, and the other items follow in base order.

        Args:
            interaction: rows of a sequential data set. Only the history is read.
        """
        data, base = self.opened.data, self.ranker.base_model
        rows = interaction.to("cpu")
        users, splits, histories = self._histories(rows)
        with torch.no_grad():
            batch = base.score(interaction, histories)
        order = rank_all(batch.scores.cpu())
        count = (batch.scores > -torch.inf).sum(1).tolist()
        size = min(pool_size(self.opened.settings), data.item_count)
        answers: dict[int, tuple[int, ...]] = {}
        live: dict[int, Request] = {}
        for row, (user, split) in enumerate(zip(users, splits, strict=True)):
            name, width = request_id(split, data.user_tokens[user]), min(size, count[row])
            if split == self.opened.settings["eval_split"] and name in self._stored:
                answers[row] = self._stored[name]
            elif width >= 2:
                items = order[row, :width].tolist()
                found = scores_of_row(base, batch, row, items)
                live[row] = Request(
                    request_id=name,
                    user_token=data.user_tokens[user],
                    split=split,
                    history=histories[row],
                    times=() if split == "new" else data.history_times(user, split),
                    candidates=tuple(
                        Candidate(item_id=item, score=score, rank=rank)
                        for rank, (item, score) in enumerate(zip(items, found.scores, strict=True), start=1)
                    ),
                    sources=found.sources,
                    target=0,
                    provider=base.name,
                )
        for row, answer in zip(live, self.ranker.rank(list(live.values())), strict=True):
            answers[row] = answer.ranking
        for row, ranking in answers.items():
            first = torch.tensor(ranking)
            order[row] = torch.cat([first, order[row][~torch.isin(order[row], first)]])
        scores = torch.empty_like(batch.scores, device="cpu")
        scores.scatter_(1, order, -torch.arange(1, order.size(1) + 1, dtype=scores.dtype).expand_as(order))
        return scores.masked_fill(batch.scores.cpu() == -torch.inf, -torch.inf).to(interaction[self.ITEM_SEQ].device)

    def predict(self, interaction: Interaction) -> Tensor:
        """Return the score of one item per row, (B,)."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    @cached_property
    def _stored(self) -> dict[str, tuple[int, ...]]:
        """The ranking of each pool of the split that the run reports, by request id."""
        ranker, method = self.ranker, self.ranker.method
        requests = load_requests(ranker.run, self.opened.settings["eval_split"])
        folder = self.opened.folders.get(stage_name(method.name))
        if folder is None:  # an order that every run has
            rankings = [answer.ranking for answer in rank_pools(ranker.reranker, requests)]
        else:
            answers = read_answers(folder, load_catalog(ranker.run))
            inputs = input_orders(requests, self.opened.settings, method)
            rankings = [
                complete(answers[request.request_id].ranking if request.request_id in answers else (), order)
                for request, order in zip(requests, inputs, strict=True)
            ]
        return {r.request_id: ranking for r, ranking in zip(requests, rankings, strict=True)}

    def _histories(self, rows: Interaction) -> tuple[list[int], list[str], list[tuple[int, ...]]]:
        """User, split and whole history of each row. Rows of no user of the data set have the split `new`."""
        data, longest = self.opened.data, rows[self.ITEM_SEQ].size(1)
        users = rows[data.uid].tolist() if data.uid in rows else [0] * len(rows)
        found: list[tuple[str, tuple[int, ...]]] = []
        for user, items, length in zip(
            users, rows[self.ITEM_SEQ].tolist(), rows[self.ITEM_SEQ_LEN].tolist(), strict=True
        ):
            seen = tuple(items[:length])
            known = {split: data.history(user, split) for split in ("test", "valid") if user in data.sequences}
            split = next((split for split, history in known.items() if history and history[-longest:] == seen), "new")
            found.append((split, known.get(split, seen)))
        return users, [split for split, _ in found], [history for _, history in found]


class _Config:
    """Stands for a Config in a checkpoint. It is read as the Config that `run_config` makes."""

    def __init__(self, run: str, method: str, data_path: str | None) -> None:
        self.arguments = run, method, data_path

    def __reduce__(self) -> tuple[Any, ...]:
        return run_config, self.arguments


def run_config(run: str, method: str, data_path: str | None) -> Config:
    """Return RecBole's configuration of `GR2` for a run.

    Args:
        run: folder of the run.
        method: a method of the run.
        data_path: folder of data sets; None for that of the run.
    """
    settings = open_run(Path(run), data_path).settings
    options = {"gr2_run": run, "gr2_method": method, "data_path_of_run": data_path, "loss_type": "CE"}
    return recbole_config(settings, GR2, base=False, **options)


class GR2Dataset(exact_time_dataset(sequential=True)):  # type: ignore[misc]
    """The data set of a run, with its exact time order and its split. `create_dataset` looks for this name."""

    def build(self) -> Any:
        """Split the data set into training, validation and test."""
        self.user_split = open_run(Path(self.config["gr2_run"]), self.config["data_path_of_run"]).data.split
        return super().build()


# RecBole finds models and data sets by name in its own modules.
sys.modules["recbole.model.sequential_recommender.gr2"] = sys.modules[__name__]
recbole.data.dataset.GR2Dataset = GR2Dataset
torch.serialization.add_safe_globals([run_config])


def rerank_file(
    run: str | Path,
    lists: str | Path,
    output: str | Path | None = None,
    *,
    method: str | None = None,
    data_path: str | Path | None = None,
) -> int:
    """Re-rank the lists of a file, and write the rankings as JSON lines.

    Args:
        run: a run, see `GR2.load`.
        lists: JSON lines with `history` and `candidates` (or `candidate_item_ids`), and optionally `user_id`,
            `request_id`, `scores`, `times`, `sources` and `items`, see `CandidateList`. Candidate files of a run have
            this form. Other fields are ignored, also `target`.
        output: file of the rankings; None writes to stdout. A line has `user_id` or `request_id` of the list,
            `ranking`, `titles`, `probabilities`, `reasoning`, `status` and `unknown`. `eval_rows` reads such a file.
        method: a method of the run, see `GR2.load`.
        data_path: folder of data sets, if the data have moved since the run.

    Returns:
        The number of lists.

    Raises:
        MissingFileError: there is no such file.
        ConfigurationError: a line is not valid. The error names it, and nothing is written.
    """
    file = Path(lists)
    if not file.is_file():
        raise MissingFileError(f"there is no file {file}", where="lists", do="correct the path of the lists")
    if output is not None and (Path(output).is_dir() or not Path(output).parent.is_dir()):
        raise ConfigurationError(
            f"{output} cannot be written: it is a folder, or its folder does not exist",
            where="output",
            why="the rankings are written there",
            do="name a file in an existing folder",
        )
    read = [_read_list(line, f"{file}:{number}") for number, line in numbered_lines(file)]
    if not read:
        raise ConfigurationError(
            "the file has no list", where=str(file), why="there is nothing to rank", do="write one JSON object per line"
        )
    results = GR2.load(run, method, data_path=data_path).rerank_batch([each for _, each in read])
    records = (
        json.dumps({**names, **asdict(found)}, ensure_ascii=False)
        for (names, _), found in zip(read, results, strict=True)
    )
    text = "".join(f"{record}\n" for record in records)
    if output is None:
        sys.stdout.write(text)
    else:
        with explained_disk_errors(Path(output).parent):
            write_text(Path(output), text)
    return len(read)


def objective_function(
    config_dict: Mapping[str, Any] | None = None,
    config_file_list: Sequence[str | Path] | None = None,
    saved: bool = True,
) -> dict[str, Any]:
    """Run with other settings and return the metrics of the validation split, for RecBole's `HyperTuning`.

    `recbole-gr2 tune` searches with Optuna and evaluates the best configuration on the test split.

    Args:
        config_dict: settings by name, and optionally `gr2_method`, the method to optimise; by default as in `GR2.load`.
        config_file_list: YAML files with settings.
        saved: has no effect. Finished stages are always kept.

    Returns:
        `model`; `best_valid_score`, the value of `valid_metric`; `valid_score_bigger`; `best_valid_result`, all metrics
        of the method over all users; `test_result`, which is empty, because no test target is read.
    """
    given = dict(config_dict or {})
    method = given.pop("gr2_method", None)
    found = run(given, config_files=config_file_list or (), eval_split="valid")
    metrics = found.methods.loc["all_users"]
    method = method or next(name for name in PREFERRED if name in metrics.index)
    metric = load_settings(config_files=[found.path / "config.yaml"])["valid_metric"].lower()
    values = metrics.loc[method].drop("users").to_dict()
    return {
        "model": "GR2",
        "best_valid_score": values[metric],
        "valid_score_bigger": True,
        "best_valid_result": values,
        "test_result": {},
    }


def _read_list(line: Any, where: str) -> tuple[dict[str, Any], CandidateList]:
    """The names and the list of a line.

    Raises:
        ConfigurationError: a field is missing or of the wrong type.
    """
    values = line if isinstance(line, dict) else {}
    candidates = values.get("candidates", values.get("candidate_item_ids"))
    history, items = values.get("history"), values.get("items") or {}
    tokens = [*candidates, *history] if isinstance(candidates, list) and isinstance(history, list) else [None]
    numbers = [values.get(name) for name in ("scores", "times")]
    if (
        any(type(token) not in (str, int) for token in tokens)
        or any(each is not None and not _are_numbers(each) for each in numbers)
        or not isinstance(items, dict)
        or not all(isinstance(texts, dict) for texts in items.values())
    ):
        raise ConfigurationError(
            f"the line has no list to re-rank: {json.dumps(line)[:100]}",
            where=where,
            why="a list needs a history and candidates as item ids",
            do='write {"history": ["I1", "I2"], "candidates": ["I7", "I4"]}; scores and times '
            "are lists of numbers, and items maps new item ids to their texts",
        )
    scores, times = numbers
    user = values.get("user_id")
    given = CandidateList(
        history=history or [],
        candidates=candidates or [],
        scores=scores,
        times=times or None,
        sources=_sources(values.get("sources"), where),
        user=None if user is None else str(user),
        items=items,
    )
    return {name: values[name] for name in ("request_id", "user_id") if name in values}, given


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def _sources(values: Any, where: str) -> Mapping[str, Any] | None:
    """Ranks and scores by each base model. Raises a ConfigurationError if they have another form."""
    if not values:
        return None
    fields = [each.get(name) for each in values.values() for name in ("ranks", "scores")] if _is_table(values) else [0]
    if not all(map(_are_numbers, fields)):
        raise ConfigurationError(
            "sources cannot be read",
            where=where,
            why="they are ranks and scores of the candidates by each base model",
            do='write {"CausalSASRec": {"ranks": [1, 4], "scores": [2.5, 0.3]}}, or leave them out',
        )
    return values


def _is_table(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(each, dict) for each in values.values())


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: folder of the run. It may be given as the path of result.json, or as the name of a run, see `GR2.load`.

    Raises:
        MissingFileError: there is no such run.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", find_run(self.path))

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of result.json, see docs/result.schema.json."""
        return read_result(self.path)

    @property
    def methods(self) -> pd.DataFrame:
        """Metrics of each method in each scope, as means over the seeds: one row for each method and scope."""
        import pandas as pd

        rows = [
            {
                "method": entry["method"],
                "scope": entry["scope"],
                "users": entry["n"][0] if len(set(entry["n"])) == 1 else float(np.mean(entry["n"])),
                **{metric: values["mean"] for metric, values in entry["metrics"].items()},
            }
            for entry in self.result["methods"]
        ]
        return pd.DataFrame(rows).set_index(["scope", "method"])

    @property
    def comparisons(self) -> pd.DataFrame:
        """Differences of the methods to the base order and to each other, with 95 % intervals and p-values.

        The columns are `scope`, `method`, `versus`, `metric`, `diff`, `low`, `high`, `p` and `p_holm`, the p-value
        after the Holm adjustment of all comparisons of the scope. Diagnostic methods have no `p_holm`.
        """
        import pandas as pd

        with_base = [
            {"scope": e["scope"], "method": e["method"], "versus": "base", "metrics": e["vs_base"]}
            for e in self.result["methods"]
            if e["vs_base"]
        ]
        rows = [
            {"scope": pair["scope"], "method": pair["method"], "versus": pair["versus"], "metric": metric, **values}
            for pair in [*with_base, *self.result["comparisons"]]
            for metric, values in pair["metrics"].items()
        ]
        return pd.DataFrame(rows)

    @property
    def stages(self) -> pd.DataFrame:
        """Seconds, peak memory in MiB and key of each stage; means and first key over the seeds."""
        import pandas as pd

        rows = [
            {
                "stage": stage["stage"],
                "key": stage["key"][0],
                "seconds": float(np.mean(stage["seconds"])),
                "peak_memory_mb": float(np.max(stage["peak_memory_mb"])),
            }
            for stage in self.result["stages"]
        ]
        return pd.DataFrame(rows).set_index("stage")

    @property
    def per_user(self) -> pd.DataFrame:
        """The rank of the target of each hit user under each method, from 1, with the seed of the run."""
        import pandas as pd

        frames = [
            read_per_user(stage_folders(folder)["evaluate"]).assign(seed=seed)
            for seed, folder in zip(self.result["seeds"], seed_runs(self.path), strict=True)
        ]
        return pd.concat(frames, ignore_index=True)

    def compare(self, other: Run | str | Path, *, methods: Sequence[str] = ()) -> pd.DataFrame:
        """Compare the methods of two runs on the same users: this run minus the other one.

        Args:
            other: a run with the same data set and users.
            methods: methods to compare; by default all that both runs have and that make a claim.

        Returns:
            One row for each method and metric with `this`, `other`, and, where a test is possible, `diff`, `low`,
            `high`, `p` and `p_holm`, see `recbole_gr2.run_comparison.compare_runs`.

        Raises:
            ConfigurationError: the runs have other data sets or users, or a method is not in both.
        """
        import pandas as pd

        path = other.path if isinstance(other, Run) else find_run(other)
        found = compare_runs(path, self.path, methods=methods)["methods"]
        frame = pd.DataFrame(found).rename(columns={"first": "other", "second": "this"})
        return frame.set_index(["method", "metric"])

    def reranker(self, method: str | None = None) -> GR2:
        """Return a method of the run, see `GR2.load`."""
        return GR2.load(self.path, method)


def run(
    config_dict: Mapping[str, Any] | None = None,
    *,
    config_files: Sequence[str | Path] = (),
    seeds: Sequence[int] = (),
    from_stage: str | None = None,
    force: bool = False,
    **settings: Any,
) -> Run:
    """Train and evaluate all methods of a run, or read what is finished, as the command does.

    Args:
        config_dict: settings by name.
        config_files: YAML files with settings.
        seeds: repeat the run with each of these seeds, and report them together.
        from_stage: run this stage and all that depend on it again.
        force: run every stage again.
        **settings: settings by name, such as `dataset`, `preset` and `eval_rows`. They have priority.

    Raises:
        GR2Error: with four parts: what is wrong, where, why it matters, and what to do. Finished stages are kept.

    >>> run(dataset="ml-100k", preset="smoke").methods.loc["all_users", "ndcg@10"]  # doctest: +SKIP
    """
    from recbole_gr2 import quick_start

    path = quick_start.run(
        command_line=settings,
        config_dict=config_dict,
        config_files=config_files,
        seeds=seeds,
        from_stage=from_stage,
        force=force,
        command=f"recbole_gr2.run({', '.join(f'{key}={value!r}' for key, value in settings.items())})",
    )
    assert path is not None, "a run of all stages has a result"
    return Run(path)
