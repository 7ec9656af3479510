"""Patches that let RecBole 1.2.1 run with current NumPy, SciPy and torch, and without Ray.

`bridge` and `config` call `apply` before they import RecBole. Each patch applies only if the patched object is missing
or broken, so a second call changes nothing. pandas 3 is refused: with copy-on-write, RecBole replaces missing values by
wrong values without an error (dataset.py:501, 648, 650).
"""

from __future__ import annotations

from typing import Any

from recbole_gr2.errors import DependencyError

# Names that RecBole uses and NumPy 2 removed, and the old built-in aliases that RecBole's Config restores too late.
NUMPY_ALIASES = {
    "float_": "float64",
    "complex_": "complex128",
    "unicode_": "str_",
    "bool8": "bool_",
    "float": "float64",
    "bool": "bool_",
    "int": "int_",
    "object": "object_",
    "str": "str_",
    "complex": "complex128",
    "long": "int_",
    "unicode": "str_",
}


def apply() -> None:
    """Patch NumPy, SciPy and RecBole in this process.

    Raises:
        DependencyError: RecBole is not installed, or pandas has version 3 or later.
    """
    _check_pandas()
    _patch_numpy()
    _patch_scipy()
    _patch_torch()
    _patch_recbole()


def missing_recbole() -> DependencyError:
    """Return the error that explains how to install RecBole."""
    return DependencyError(
        "RecBole is not installed",
        where="package recbole",
        why="it trains the base models and evaluates the lists",
        do="Python 3.11: pip install recbole==1.2.1. Python 3.12 or later, where its version of Ray is not available: "
        "pip install --no-deps recbole==1.2.1, then pip install colorlog colorama tabulate thop texttable "
        "plotly tensorboard tqdm scikit-learn scipy",
    )


def _check_pandas() -> None:
    import pandas

    if int(pandas.__version__.split(".")[0]) >= 3:
        raise DependencyError(
            f"pandas {pandas.__version__} is installed; RecBole 1.2.1 needs pandas < 3",
            where="recbole/data/dataset/dataset.py:501, 648, 650",
            why="with pandas 3 RecBole replaces missing values by wrong values without an error",
            do='pip install "pandas>=2.1.1,<3"',
        )


def _patch_numpy() -> None:
    import warnings

    import numpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hasattr emits a warning for a removed alias
        for alias, name in NUMPY_ALIASES.items():
            if not hasattr(numpy, alias):
                setattr(numpy, alias, getattr(numpy, name))


def _patch_scipy() -> None:
    from scipy.sparse import dok_matrix

    if not hasattr(dok_matrix, "_update"):  # removed in SciPy 1.13; LightGCN and six other models call it
        dok_matrix._update = lambda self, entries: self._dict.update(entries)


def _patch_torch() -> None:
    import inspect

    import torch

    original = torch.Tensor.__array_wrap__
    if "return_scalar" in inspect.signature(original).parameters:
        return

    def array_wrap(self: Any, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        """As in torch, with the parameters that NumPy 2 passes. RecBole sorts tensors by np.argsort."""
        return original(self, array)

    tensor: Any = torch.Tensor
    tensor.__array_wrap__ = array_wrap


def _patch_recbole() -> None:
    try:
        import recbole
    except ImportError as error:
        raise missing_recbole() from error

    import copy

    # recbole/model/sequential_recommender/sine.py:25 enables anomaly detection of autograd for the whole process when
    # any sequential model is imported. Every backward pass, also of the language model, then checks each gradient.
    import recbole.model.sequential_recommender  # noqa: F401
    import torch
    from recbole.evaluator.collector import Collector

    if getattr(Collector.get_data_struct, "_recbole_gr2", False):
        return
    torch.autograd.set_detect_anomaly(False)

    def get_data_struct(self: Any) -> Any:
        """As in RecBole, but values that are not tensors (counts, Counters) stay unchanged (collector.py:226)."""
        for key, value in self.data_struct._data_dict.items():
            if hasattr(value, "cpu"):
                self.data_struct._data_dict[key] = value.cpu()
        returned = copy.deepcopy(self.data_struct)
        for key in ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label"):
            if key in self.data_struct:
                del self.data_struct[key]
        return returned

    get_data_struct._recbole_gr2 = True  # type: ignore[attr-defined]
    Collector.get_data_struct = get_data_struct
