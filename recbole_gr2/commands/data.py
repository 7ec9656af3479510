"""`recbole-gr2 data check`: load a data set as a run does."""

from __future__ import annotations

from recbole_gr2.commands.run import Words
from recbole_gr2.errors import ConfigurationError

PROGRAM = "recbole-gr2 data check"


def check(words: Words = None) -> None:
    """Load a data set as a run does, and print its summary and its errors.

    The options are those of a run that concern the data: --dataset, --data_path, --config_files, and settings as
    --key=value. Nothing is trained or written, except that RecBole downloads a data set that it knows and that is not
    in --data_path.

    \b
    Examples:
      recbole-gr2 data check --dataset ml-100k
      recbole-gr2 data check --config_files mine.yaml --data_path data
      recbole-gr2 data check --dataset mine --text_title=name --user_inter_num_interval=[5,inf)
    """
    from recbole_gr2 import preflight
    from recbole_gr2.config import load_settings
    from recbole_gr2.quick_start import option_parser, parse

    options, command_line = parse(words or [], program=PROGRAM)
    defaults = vars(option_parser().parse_args([]))
    settings = ("model", "dataset", "base_model", "models", "preset", "config_files")
    of_runs = [key for key, value in vars(options).items() if key not in settings and value != defaults[key]]
    if of_runs:
        raise ConfigurationError(
            f"{', '.join(f'--{key}' for key in of_runs)} belongs to a run",
            where=PROGRAM,
            why="the command loads the data and runs no stage",
            do="remove the option, or use recbole-gr2 run --dry_run, which checks the data too",
        )
    preflight.check_dataset(load_settings(command_line=command_line, config_files=options.config_files, machine=False))
    from recbole_gr2.bridge.data import Data
    from recbole_gr2.console import quiet_libraries

    quiet_libraries()
    summary = Data(load_settings(command_line=command_line, config_files=options.config_files)).summary()
    print(summary.text())
    summary.check()
