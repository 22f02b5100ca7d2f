"""The rest is in setup.cfg, which can name only packages that lie where they are called."""

from setuptools import Distribution, find_packages, setup

# Data files are for editable installs as for others; setuptools asks for them there by a name that it does not have.
Distribution.has_data = Distribution.has_data_files
# The users' recipes go into the package, where `recipe:NAME` finds them.
RECIPES = "dllm_memdlm.training.recipes"
setup(
    packages=[*find_packages(include=["dllm_memdlm", "dllm_memdlm.*"]), RECIPES],
    package_dir={RECIPES: "recipes"},
)
