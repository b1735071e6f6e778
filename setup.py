"""Package metadata, read from settings.ini: the one place where nbdev and setuptools look."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
config = parser["DEFAULT"]


def listed(key: str) -> list[str]:
    return config[key].split()


setup(
    name=config["lib_name"],
    version=config["version"],
    description=config["description"],
    packages=find_packages(include=[config["lib_name"], f"{config['lib_name']}.*"]),
    include_package_data=True,
    package_data={config["lib_name"]: ["*.yaml", "**/*.yaml", "**/*.json", "**/*.css", "**/*.js"]},
    install_requires=listed("requirements"),
    extras_require={"dev": listed("dev_requirements"), "quant": listed("quant_requirements")},
    python_requires=f">={config['min_python']}",
    entry_points={"console_scripts": config["console_scripts"].splitlines()},
    zip_safe=False,
)
