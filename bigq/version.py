"""The version of bigq: read by setuptools, and written into every output."""

__version__ = "0.1.0"
