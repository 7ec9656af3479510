"""Teachers: they write the reasoning traces that the language model learns from (GR2 section 4).

A teacher is built as `Teacher(catalog=..., settings=..., seed=...)` and has a `name` and a method `argue`, see
`recbole_gr2.teachers.base.Teacher`. The setting `trace_teacher` names a built-in teacher or `module:attribute`.
"""

from recbole_gr2.teachers.base import Teacher, TeacherReply, ask
from recbole_gr2.teachers.local_llm import LocalLLM
from recbole_gr2.teachers.registry import TEACHERS, build_teacher, find_teacher
from recbole_gr2.teachers.rules import RulesTeacher, phrases, true_statements

__all__ = [
    "TEACHERS",
    "LocalLLM",
    "RulesTeacher",
    "Teacher",
    "TeacherReply",
    "ask",
    "build_teacher",
    "find_teacher",
    "phrases",
    "true_statements",
]
