"""Samples of a sound: of a file's bytes or of an array, as one channel at 16,000 Hz.

Decoded, mixed and resampled block by block, so that a long file costs no more memory than what comes of it.
"""

from __future__ import annotations

import io
import operator
import wave
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ..errors import RequestError
from .source import DAMAGE, refuse, short

RATE_HZ = 16_000
RATES_HZ = range(1_000, 384_001)
LENGTH_S = 40 * 60
CHANNELS = 32
LOUDEST = 32_768.0
BLOCK_SAMPLES = 1 << 20


class Tape(io.BytesIO):
    """Bytes of a file in which a seek to before its beginning goes nowhere; soundfile could not hear of an error."""

    def seek(self, offset: int, whence: int = 0) -> int:
        """Where it is afterwards."""
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def samples(data: bytes) -> np.ndarray:
    """Samples float32 [n] of a file's bytes: plain wav by the standard library, all else by soundfile."""
    try:
        try:
            with wave.open(io.BytesIO(data)) as file:
                return mixed(wav_blocks(file), file.getframerate())
        except (wave.Error, EOFError) as error:
            return by_soundfile(data, error)
    except DAMAGE as error:
        refuse("the sound cannot be decoded", error, "send a whole wav, flac, mp3 or ogg file")


def array_samples(data: np.ndarray, rate: Any) -> np.ndarray:
    """Samples float32 [n] of an array [samples] or [samples, channels] at `rate` Hz: floats from -1 to 1, int16 or int32."""
    if data.ndim not in (1, 2) or (data.ndim == 2 and not 1 <= data.shape[1] <= CHANNELS):
        raise RequestError(f"a sound's array is [samples] or [samples, channels], this one has shape {list(data.shape)}: put channels last")
    scale = {"int16": 2.0**15, "int32": 2.0**31, "float32": 1.0, "float64": 1.0}.get(data.dtype.name)
    if scale is None:
        raise RequestError(f"a sound's array is float32 or float64 from -1 to 1, int16 or int32, this one is {data.dtype}: convert it")
    data = data[:, None] if data.ndim == 1 else data
    return mixed((data[at : at + BLOCK_SAMPLES] / scale for at in range(0, len(data), BLOCK_SAMPLES)), rate)


def mixed(blocks: Iterable[np.ndarray], rate: Any) -> np.ndarray:
    """Samples float32 [n] at 16,000 Hz of blocks [samples, channels] at `rate`: the mean of the channels, resampled."""
    rate = hertz(rate)
    resampled = resampler(rate)
    parts: list[np.ndarray] = []
    count = 0
    for block in blocks:
        if not (np.abs(block) <= LOUDEST).all():
            raise RequestError(f"the sound has values that are no numbers, or beyond {LOUDEST:.0f}, after {count / rate:.0f} s; mend them")
        count += len(block)
        if count > LENGTH_S * rate:
            raise RequestError(f"the sound is longer than {LENGTH_S // 60} minutes; cut it into parts")
        parts.append(resampled(block.mean(axis=1).astype(np.float32), False))
    parts.append(resampled(np.zeros(0, np.float32), True))
    found = np.concatenate(parts)
    if not len(found):
        raise RequestError(f"the sound is empty, {count} samples at {rate} Hz; send one that lasts")
    return found


def hertz(rate: Any) -> int:
    """A sampling rate that can be resampled from; `RequestError` for any other."""
    try:
        found = 0 if isinstance(rate, bool) else operator.index(rate)
    except TypeError:
        found = 0
    if found not in RATES_HZ:
        raise RequestError(
            f"sampling_rate is {short(rate)}; give samples a second, a whole number from {RATES_HZ[0]} to {RATES_HZ[-1]} (16000 for 16 kHz)"
        )
    return found


def resampler(rate: int) -> Callable[[np.ndarray, bool], np.ndarray]:
    """What makes of block after block, the last one said to be so, samples at 16,000 Hz; by soxr, as Mistral's own tools do."""
    if rate == RATE_HZ:
        return lambda block, last: block
    try:
        import soxr
    except ImportError as error:
        raise RequestError(f"a sound at {rate} Hz is resampled by soxr, which is not installed: pip install 'aollm[audio]'") from error
    stream = soxr.ResampleStream(rate, RATE_HZ, 1, dtype="float32", quality="HQ")
    return lambda block, last: np.asarray(stream.resample_chunk(block, last), np.float32)


def wav_blocks(file: wave.Wave_read) -> Iterator[np.ndarray]:
    """Blocks [samples, channels] from -1 to 1; where the file ends early, so do they."""
    width, channels = file.getsampwidth(), file.getnchannels()
    if width > 4:
        raise wave.Error(f"numbers of {width} bytes")
    check_channels(channels)
    while data := file.readframes(max(1, BLOCK_SAMPLES // channels)):
        numbers = np.frombuffer(data[: len(data) // (width * channels) * width * channels], np.uint8).reshape(-1, width)
        if width == 1:
            values = numbers[:, 0] / np.float32(128) - 1
        else:  # little-endian, put into the upper bytes of 32 bits
            upper = np.zeros((len(numbers), 4), np.uint8)
            upper[:, 4 - width :] = numbers
            values = upper.view("<i4")[:, 0] / 2.0**31
        yield values.reshape(-1, channels)


def by_soundfile(data: bytes, plain: Exception) -> np.ndarray:
    """Samples float32 [n] of any format that soundfile knows; `plain` is why it is no plain wav."""
    try:
        import soundfile
    except ImportError as error:
        raise RequestError(f"all but plain wav ({plain}) is read by soundfile, which is missing: pip install 'aollm[audio]'") from error
    with soundfile.SoundFile(Tape(data)) as file:
        check_channels(file.channels)

        def blocks() -> Iterator[np.ndarray]:
            while len(block := file.read(max(1, BLOCK_SAMPLES // file.channels), dtype="float32", always_2d=True)):
                yield block

        return mixed(blocks(), file.samplerate)


def check_channels(count: int) -> None:
    """Raise `RequestError` for a sound of too many channels."""
    if not 1 <= count <= CHANNELS:
        raise RequestError(f"the sound has {count} channels, 1 to {CHANNELS} are taken; mix it down")
