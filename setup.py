"""The rest is in setup.cfg."""

from setuptools import Distribution, setup

# Data files are for editable installs as for others; setuptools asks for them there by a name that it does not have.
Distribution.has_data = Distribution.has_data_files
setup()
