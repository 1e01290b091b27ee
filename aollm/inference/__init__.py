"""For scripts that come from oLLM: its names and shapes of calls, with a `RuntimeClient` behind them."""

from .generator import Generator
from .inference import AutoInference, DiskCache, Inference, file_get_contents
from .streamer import TextStreamer

__all__ = ["AutoInference", "DiskCache", "Generator", "Inference", "TextStreamer", "file_get_contents"]
