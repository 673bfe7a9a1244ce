"""Bilinear transcoders for the MLPs of language models: fitted, measured, published and read.

The package's files lie at the root of the repository, since its two model files travel to the Hub from there; this
folder gives them the name `bilinear_tc` by links.
"""

from importlib.metadata import version

from .configuration_bilinear_tc import BilinearTCConfig
from .modeling_bilinear_tc import BilinearTC, BilinearTCSet, replaced

__all__ = ["BilinearTC", "BilinearTCConfig", "BilinearTCSet", "__version__", "replaced"]
__version__ = version("bilinear-tc")
