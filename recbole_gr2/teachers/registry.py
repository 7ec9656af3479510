"""Build a teacher by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recbole_gr2.catalog import Catalog
from recbole_gr2.errors import ConfigurationError
from recbole_gr2.plugins import calling, check_call, check_method, find
from recbole_gr2.teachers.base import Teacher
from recbole_gr2.teachers.local_llm import LocalLLM

# The built-in teachers as module:attribute. A teacher is imported only when a run uses it.
TEACHERS: Mapping[str, str] = {
    "rules": "recbole_gr2.teachers.rules:RulesTeacher",
    "local_llm": "recbole_gr2.teachers.local_llm:LocalLLMTeacher",
    "openai_api": "recbole_gr2.teachers.openai_api:OpenAITeacher",
    "recorded": "recbole_gr2.teachers.recorded:RecordedTeacher",
}


def find_teacher(name: str) -> Any:
    """Return the class or function of a teacher of the user, or `module:attribute` of a built-in one.

    Raises:
        ConfigurationError: the teacher does not exist, does not accept `catalog`, `settings` and `seed`, or is a class
            without a method `argue`.
    """
    build = find(name, TEACHERS, where="trace_teacher")
    if ":" in name:
        form = "teacher(catalog=..., settings=..., seed=...)"
        check_call(build, form, name=name, where="trace_teacher", catalog=None, settings=None, seed=None)
        if isinstance(build, type):
            form = "argue(requests, targeted=..., attempt=...)"
            check_method(build, form, None, name=name, where="trace_teacher", targeted=True, attempt=0)
    return build


def build_teacher(
    name: str,
    *,
    catalog: Catalog,
    settings: Mapping[str, Any],
    seed: int,
    language_model: Callable[[], LocalLLM] | None = None,
    replies: Path | None = None,
) -> Teacher:
    """Build a teacher.

    Args:
        name: a key of `TEACHERS`, or `module:attribute`, a class or a function that is called with the keyword
            arguments `catalog`, `settings` and `seed`.
        catalog: the items, with their semantic IDs.
        settings: settings of the run.
        seed: seed of the teacher.
        language_model: loads the language model of the `local_llm` teacher. No other teacher uses it.
        replies: the file in which the `openai_api` teacher stores responses. No other teacher uses it.

    Raises:
        ConfigurationError: the teacher does not exist, one of its settings is wrong, or it has no name or no method
            `argue`.
    """
    build = find_teacher(name)
    given: dict[str, Any] = {"catalog": catalog, "settings": settings, "seed": seed}
    if name in TEACHERS:
        build = find(TEACHERS[name], {}, where="trace_teacher")
    if name == "local_llm":
        assert language_model is not None, "the local_llm teacher needs a language model"
        given["language_model"] = language_model()
    if name == "openai_api":
        given["replies"] = replies
    with calling(name, where="trace_teacher"):
        teacher: Teacher = build(**given)
    teacher_name = getattr(teacher, "name", None)
    if not callable(getattr(teacher, "argue", None)) or not isinstance(teacher_name, str) or not teacher_name:
        raise ConfigurationError(
            f"the teacher {name!r} has no method argue, or its attribute `name` is no text: {teacher_name!r}",
            where="trace_teacher",
            why="the traces stage calls argue and writes the name to each trace",
            do="write the method argue(requests, targeted=..., attempt=...), and set `name`",
        )
    return teacher
