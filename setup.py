"""Lists the packages. All other metadata is in setup.cfg.

The property files are in `properties/` in a checkout and in `recbole_gr2/properties/` in a wheel. Setuptools cannot
combine such a folder with `packages = find:` in setup.cfg.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["recbole_gr2", "recbole_gr2.*"]), "recbole_gr2.properties"],
    package_dir={"recbole_gr2.properties": "properties"},
)
