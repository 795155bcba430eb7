"""From a trained network to answers: the network that only infers, and the predictor that a server calls."""

from .fold import to_inference
from .network import InferenceNetwork

__all__ = ['InferenceNetwork', 'to_inference']
