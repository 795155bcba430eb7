"""From a trained network to answers: the network that only infers, its folder, the predictor that a server calls."""

from .engines import ENGINES, EngineNetwork, to_inference
from .network import InferenceNetwork
from .predictor import Predictor, QueueFull
from .store import load, save

__all__ = ['ENGINES', 'EngineNetwork', 'InferenceNetwork', 'Predictor', 'QueueFull', 'load', 'save', 'to_inference']
