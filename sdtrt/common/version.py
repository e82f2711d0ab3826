"""The version of sdtrt: in each entry of the engine directory, in each picture, and in the package's metadata."""

__version__ = "0.1.0"
