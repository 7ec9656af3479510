"""What RecBole 1.2.1 needs to run beside current numpy, scipy, torch and without ray.

Called once by `bridge` before anything of RecBole is imported. Each patch is applied only where the thing it replaces
is missing or broken, so calling `apply` again changes nothing. pandas 3 is refused: under copy-on-write RecBole
silently turns missing values into garbage (dataset.py:501, 648, 650), and a wrong number is worse than no number.
"""

from __future__ import annotations

from recbole_gr2.errors import DependencyError

# Names RecBole uses that numpy 2 dropped, and the old builtin aliases that its Config re-creates too late.
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
    """Patch numpy, scipy and RecBole in this process.

    Raises:
        DependencyError: RecBole is absent, or pandas is 3 or newer.
    """
    _check_pandas()
    _patch_numpy()
    _patch_scipy()
    _patch_recbole()


def _check_pandas() -> None:
    import pandas

    if int(pandas.__version__.split(".")[0]) >= 3:
        raise DependencyError(
            f"pandas {pandas.__version__} is installed; RecBole 1.2.1 needs pandas < 3",
            where="recbole/data/dataset/dataset.py:501, 648, 650",
            why="with pandas 3 RecBole fills missing values with garbage and says nothing",
            do='pip install "pandas>=2.1.1,<3"',
        )


def _patch_numpy() -> None:
    import warnings

    import numpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hasattr on a removed alias warns before it fails
        for alias, name in NUMPY_ALIASES.items():
            if not hasattr(numpy, alias):
                setattr(numpy, alias, getattr(numpy, name))


def _patch_scipy() -> None:
    from scipy.sparse import dok_matrix

    if not hasattr(dok_matrix, "_update"):  # dropped in scipy 1.13; LightGCN and six other models call it
        dok_matrix._update = lambda self, entries: self._dict.update(entries)


def _patch_recbole() -> None:
    try:
        import recbole
    except ImportError as error:
        raise DependencyError(
            "RecBole is not installed",
            why="it proposes the candidates and scores the lists",
            do="Python 3.11: pip install recbole==1.2.1. Python 3.12 or newer, where its ray pin cannot be met: "
            "pip install --no-deps recbole==1.2.1, then pip install colorlog colorama tabulate thop texttable "
            "plotly tensorboard tqdm scikit-learn scipy",
        ) from error

    import copy

    # recbole/model/sequential_recommender/sine.py:25 turns autograd's anomaly detection on for the whole process as
    # soon as any sequential model is imported; every backward pass, the language model's too, then checks each
    # gradient twice.
    import recbole.model.sequential_recommender  # noqa: F401
    import torch
    from recbole.evaluator.collector import Collector

    if getattr(Collector.get_data_struct, "_recbole_gr2", False):
        return
    torch.autograd.set_detect_anomaly(False)

    def get_data_struct(self):
        """RecBole's own, but values that are no tensors (counts, Counters) stay as they are (collector.py:226)."""
        for key, value in self.data_struct._data_dict.items():
            if hasattr(value, "cpu"):
                self.data_struct._data_dict[key] = value.cpu()
        returned = copy.deepcopy(self.data_struct)
        for key in ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label"):
            if key in self.data_struct:
                del self.data_struct[key]
        return returned

    get_data_struct._recbole_gr2 = True
    Collector.get_data_struct = get_data_struct
