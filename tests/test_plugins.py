"""Objects of the user: their import, their signature, and the error of a call that fails."""

import sys

import pytest

from recbole_gr2.errors import ConfigurationError, GR2Error
from recbole_gr2.plugins import calling, check_call, check_method, find, misfit, name_of


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the module `mine_of_plugins`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str):
        (tmp_path / "mine_of_plugins.py").write_text(text)
        return tmp_path / "mine_of_plugins.py"

    yield write
    sys.modules.pop("mine_of_plugins", None)


@pytest.mark.parametrize(
    ("text", "what", "do"),
    [
        ("import no_such_package.part\n", "No module named 'no_such_package'", "install the package no_such_package"),
        ("from math import tau, nothing\n", "ImportError: cannot import name 'nothing'", "correct the module"),
        ("x = 1\ny = = 2\n", "SyntaxError: invalid syntax", "correct the module"),
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero", "correct the module"),
    ],
)
def test_a_module_that_cannot_be_imported(write, text, what, do):
    file = write(text)
    with pytest.raises(ConfigurationError) as error:
        find("mine_of_plugins:rank", {}, where="eval_rows")
    line = len(text.splitlines())
    assert what in error.value.what and f"({file}:{line})" in error.value.what and do in error.value.do


def test_a_module_or_an_attribute_that_does_not_exist(write):
    write("def ranked(): pass\n")
    with pytest.raises(ConfigurationError) as error:
        find("mine_of_plugins:rank", {}, where="eval_rows")
    assert error.value.do == "correct the attribute; the module has ranked"
    with pytest.raises(ConfigurationError) as error:
        find("mine_of_plugins.deeper:rank", {}, where="eval_rows")
    assert error.value.do == "install the module, or add its folder to PYTHONPATH"


def test_an_exception_of_an_object_names_its_line(write):
    file = write("def fail():\n    import json\n    json.loads('{')\n")
    fail = find("mine_of_plugins:fail", {}, where="x")
    with pytest.raises(GR2Error) as error, calling("mine_of_plugins:fail", where="request r"):
        fail()
    assert error.value.where == "request r" and error.value.what.startswith("'mine_of_plugins:fail' raised JSONDecode")
    assert error.value.what.endswith(f"({file}:3)") and error.value.__cause__ is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), GR2Error("wrong"), SystemExit(3)])
def test_some_exceptions_pass_unchanged(error):
    with pytest.raises(type(error)) as raised, calling("mine:fail", where="x"):
        raise error
    assert raised.value is error


def test_exceptions_of_built_in_objects_pass_unchanged():
    with pytest.raises(RuntimeError, match="out of memory"), calling("lambdamart", where="x"):
        raise RuntimeError("out of memory")


class Mine:
    def rank(self, requests):
        return requests

    @staticmethod
    def fit(train, valid):
        return None


def test_signatures():
    assert misfit(lambda request, *rest: 0, 1, 2) == misfit(max, 1, 2) == ""  # max has no signature
    assert "missing a required argument" in misfit(lambda request, catalog: 0, 1)
    check_call(Mine, "Mine()", name="mine:Mine", where="x")
    check_method(Mine, "rank(requests)", None, name="mine:Mine", where="x")
    check_method(Mine, "fit(train, valid)", None, None, name="mine:Mine", where="x")
    for form, count in (("rank(requests, catalog)", 2), ("argue(requests)", 1)):
        with pytest.raises(ConfigurationError, match="mine:Mine"):
            check_method(Mine, form, *[None] * count, name="mine:Mine", where="x")
    assert name_of(Mine) == f"{__name__}:Mine" and ":" not in name_of(GR2Error)
