"""From a trained network to answers: the network that only infers, its folder, the predictor that a server calls."""

from .engines import ENGINES, EngineNetwork, to_inference
from .files import Deployed, is_deployed, open_deployed
from .network import InferenceNetwork
from .predictor import Predictor, QueueFull
from .store import load, save
from .traced import trace

__all__ = [
    'ENGINES', 'Deployed', 'EngineNetwork', 'InferenceNetwork', 'Predictor', 'QueueFull', 'is_deployed', 'load',
    'open_deployed', 'save', 'to_inference', 'trace']
