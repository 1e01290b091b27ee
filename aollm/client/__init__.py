"""One runtime for threads: blocking calls, and one thread with an event loop behind them."""

from .client import RuntimeClient
from .tokens import Tokens

__all__ = ["RuntimeClient", "Tokens"]
