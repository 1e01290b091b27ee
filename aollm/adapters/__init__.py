"""Adapters: low-rank changes to a model (LoRA, Hu et al., 2021) that are computed beside its weights, several in one batch.

An adapter is a folder as PEFT saves it. Nothing is merged: the base's weights stream past as they are, and what an adapter
adds to a product comes to the rows that chose it. It refuses to know how rows came into a batch.
"""

from .adapter import Adapter as Adapter
from .adapters import Adapters as Adapters
from .adapters import load_adapters as load_adapters
