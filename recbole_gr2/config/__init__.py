"""Settings: declarations, sources, checks, and the settings that RecBole receives.

Sources, the strongest first: command line, `config_dict`, `--config_files`, property files (preset, then data set, then
`overall.yaml` and `stage/*.yaml`). A file `<data_path>/<dataset>/<dataset>.yaml` replaces the package's file of the
data set. There are three kinds of keys:

* Keys of this package. Each is declared once, on one line of `properties/overall.yaml` or `properties/stage/*.yaml`.
* RecBole options (`metrics`, `user_inter_num_interval`, ...). They are passed to RecBole unchanged.
* `base_<option>`: a RecBole option for the base model alone, for example `base_learning_rate`.

Any other key is an error that names the most similar keys. `values` reads YAML and intervals, `declaration` describes
and reads the declarations, `recbole_options` reads RecBole's own options, `rules` checks what a declaration cannot
express, and `settings` merges all sources. `python -m recbole_gr2.config` prints docs/settings.md.
"""

from recbole_gr2.config.declaration import (
    Declaration,
    declarations,
    first_comment,
    properties_folder,
    read_declarations,
)
from recbole_gr2.config.recbole_options import (
    GENERATOR,
    ONEREC_THINK,
    base_model_properties,
    recbole_models,
    recbole_properties,
)
from recbole_gr2.config.settings import Settings, load_settings, recbole_config
from recbole_gr2.config.values import read_value, read_yaml, read_yaml_file

__all__ = [
    "GENERATOR",
    "ONEREC_THINK",
    "Declaration",
    "Settings",
    "base_model_properties",
    "declarations",
    "first_comment",
    "load_settings",
    "properties_folder",
    "read_declarations",
    "read_value",
    "read_yaml",
    "read_yaml_file",
    "recbole_config",
    "recbole_models",
    "recbole_properties",
]
