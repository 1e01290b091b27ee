"""The bundled model: a small llama trained here, on text that `corpus` writes, so that
the demo and the tests need no download. `MODEL` is its folder, with a card in README.md.
This file imports nothing heavy; `python -m aollm.demo.train` makes the model again."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
