"""Engines: the runtimes of other vendors that can run the network, behind the calls of the torch one."""

from .convert import ENGINES, load, to_inference
from .network import FORMAT, EngineNetwork

__all__ = ['ENGINES', 'FORMAT', 'EngineNetwork', 'load', 'to_inference']
