"""Engines: the runtimes of other vendors that can run the network, behind the calls of the torch one."""

from .convert import ENGINES, load, to_inference
from .measured import fastest_engine, record_engine, record_path
from .network import FORMAT, EngineNetwork

__all__ = ['ENGINES', 'FORMAT', 'EngineNetwork', 'fastest_engine', 'load', 'record_engine', 'record_path',
           'to_inference']
