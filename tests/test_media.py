"""Images and sounds as callers give them: every way that is taken gives the right array, every other a reason, and soon."""

import base64
import io
import os
import struct
import sys
import tracemalloc
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from PIL import Image
from transformers.image_utils import load_image

from aollm.errors import RequestError
from aollm.media import Media, read_part

GENERATOR = np.random.default_rng(3)
PIXELS = GENERATOR.integers(0, 256, (7, 11, 3), dtype=np.uint8)
SAMPLES = (np.sin(np.arange(16_000) / 8) * 0.5).astype(np.float32)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def wav(numbers: np.ndarray, rate: int = 16_000, width: int = 2) -> bytes:
    """Whole numbers [samples] or [samples, channels] as a wav file of `width` bytes each."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1 if numbers.ndim == 1 else numbers.shape[1])
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(numbers.astype("<i4").reshape(-1, 1).view(np.uint8)[:, :width].tobytes())
    return file.getvalue()


def sounded(samples: np.ndarray, rate: int, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **options)
    return file.getvalue()


def uri(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


def audio(source: Any, **more: Any) -> dict[str, Any]:
    return {"type": "audio", "audio": source, **more}


PNG = saved(Image.fromarray(PIXELS))
WAV = wav((SAMPLES * 32768).astype(int))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "a b.png").write_bytes(PNG)
    (tmp_path / "a.wav").write_bytes(WAV)
    return tmp_path


IMAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "path": lambda folder: image(folder / "a b.png"),
    "path as text": lambda folder: image(str(folder / "a b.png")),
    "file uri": lambda folder: image((folder / "a b.png").as_uri()),
    "file uri with a host": lambda folder: image(f"file://localhost{folder}/a%20b.png"),
    "under path": lambda folder: {"type": "image", "path": str(folder / "a b.png")},
    "under url": lambda folder: {"type": "image", "url": str(folder / "a b.png"), "image": None},
    "bytes": lambda folder: image(PNG),
    "bytearray": lambda folder: image(bytearray(PNG)),
    "memory": lambda folder: image(memoryview(PNG)),
    "pillow": lambda folder: image(Image.open(io.BytesIO(PNG))),
    "array": lambda folder: image(PIXELS),
    "array upside down": lambda folder: image(PIXELS[::-1].copy()[::-1]),
    "array with alpha": lambda folder: image(np.dstack([PIXELS, PIXELS[..., 0]])),
    "data uri": lambda folder: image(uri(PNG)),
    "data uri in capitals": lambda folder: image(uri(PNG).replace("data:image/png;base64", "DATA:image/PNG;BASE64")),
    "data uri with parameters": lambda folder: image(uri(PNG, "image/png;name=a.png")),
    "data uri in lines": lambda folder: image("\r\n".join([uri(PNG)[:60], uri(PNG)[60:], ""])),
    "image_url": lambda folder: {"type": "image_url", "image_url": {"url": uri(PNG), "detail": "high"}},
    "image_url, short": lambda folder: {"type": "image_url", "image_url": uri(PNG)},
    "base64": lambda folder: {"type": "image", "base64": base64.b64encode(PNG).decode()},
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_the_same_however_it_is_given(files: Path, name: str) -> None:
    found = read_part(IMAGES[name](files))
    assert found.kind == "image" and found.data.dtype == np.uint8 and found.data.flags.c_contiguous
    assert np.array_equal(found.data, PIXELS)
    assert found.digest == Media.of("image", PIXELS).digest
    assert repr(found).startswith("<Media image 11 × 7 ")


def test_digests_differ_where_values_do() -> None:
    arrays = [PIXELS, PIXELS[:, ::-1], PIXELS[:5], np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)]
    sounds = [np.zeros(18, np.float32), np.zeros(17, np.float32)]
    made = [Media.of("image", each) for each in arrays] + [Media.of("audio", each) for each in sounds]
    assert len({each.digest for each in made}) == len(made)


def mode(name: str) -> Image.Image:
    """The picture in another mode of Pillow's."""
    if name == "I;16":
        return Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 3)
    if name == "palette with transparency":
        found = Image.fromarray(PIXELS).quantize(16)
        found.info["transparency"] = bytes(range(0, 256, 16))
        return found
    return Image.fromarray(PIXELS).convert(name)


MODES = [
    *(("PNG", name) for name in ("1", "L", "LA", "P", "RGBA", "I;16", "palette with transparency")),
    *(("TIFF", name) for name in ("F", "CMYK", "LAB")), *(("JPEG", name) for name in ("CMYK", "L")),
    ("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB"), ("PPM", "L"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize("kind, name", MODES)
def test_every_mode_becomes_rgb_as_transformers_has_it(kind: str, name: str) -> None:
    data = saved(mode(name), kind)
    with Image.open(io.BytesIO(data)) as theirs:
        assert np.array_equal(read_part(image(data)).data, np.asarray(load_image(theirs)))


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / "photo.jpg"
    path.write_bytes(saved(Image.fromarray(PIXELS), "JPEG", exif=exif))
    found = read_part(image(path)).data
    assert found.shape == ((7, 11, 3) if turn < 5 else (11, 7, 3))
    assert np.array_equal(found, np.asarray(load_image(str(path))))


def test_one_frame_of_a_gif_and_a_photo_with_a_preview_are_images() -> None:
    assert read_part(image(saved(Image.fromarray(PIXELS), "GIF"))).data.shape == (7, 11, 3)
    photo = saved(Image.fromarray(PIXELS), "MPO", save_all=True, append_images=[Image.fromarray(PIXELS[:3])])
    assert read_part(image(photo)).data.shape == (7, 11, 3)


def test_a_progressive_photo_is_an_image() -> None:
    large = Image.fromarray(GENERATOR.integers(0, 256, (200, 300, 3), dtype=np.uint8))
    assert read_part(image(saved(large, "JPEG", progressive=True))).data.shape == (200, 300, 3)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size, and has a few bytes of it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 16))) + chunk(b"IEND", b"")


def many_scans() -> bytes:
    """A progressive JPEG whose last scan comes a thousand times."""
    data = saved(Image.fromarray(PIXELS), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + b"\xff\xd9"


def frames(kind: str) -> bytes:
    return saved(Image.fromarray(PIXELS), kind, save_all=True, append_images=[Image.fromarray(PIXELS[::-1].copy())])


def unlike(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "no image": (image(b"GIF but not really" * 40), "cannot be decoded.*send a whole PNG"),
    "text": (image(uri(b"hello")), "cannot be decoded"),
    "postscript": (image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"), "cannot be decoded"),
    "a format that is not tried": (image(saved(Image.fromarray(PIXELS), "TGA")), "cannot be decoded"),
    "truncated png": (image(PNG[:-60]), "cannot be decoded"),
    "truncated jpeg": (image(saved(Image.fromarray(PIXELS), "JPEG")[:-200]), "cannot be decoded"),
    "half a header": (image(PNG[:20]), "cannot be decoded"),
    "damaged": (image(unlike(PNG, 60, PNG[60] ^ 255)), "cannot be decoded"),
    "30,000 wide": (image(bomb(30_000, 10)), "30000 × 10 pixels; at most 16384 a side"),
    "64 million and more": (image(bomb(16_000, 5_000)), "16000 × 5000 pixels"),
    "a bomb": (image(bomb(16_000, 16_000)), "too large"),
    "a larger bomb": (image(bomb(1 << 30, 1 << 30)), "too large|cannot be decoded"),
    "no pixels": (image(bomb(0, 10)), "empty|cannot be decoded"),
    "a thousand scans": (image(many_scans()), "more than 64 scans"),
    "animated gif": (image(frames("GIF")), "2 frames; send one"),
    "animated webp": (image(frames("WEBP")), "2 frames"),
    "animated png": (image(frames("PNG")), "2 frames"),
    "pages": (image(frames("TIFF")), "2 frames"),
    "large pillow": (image(Image.new("1", (16_385, 1))), "16385 × 1"),
    "float array": (image(PIXELS / 255), "uint8, 0 to 255, this one is float64"),
    "float array of NaN": (image(np.full((3, 3, 3), np.nan)), "uint8"),
    "bool array": (image(PIXELS > 3), "uint8"),
    "objects": (image(np.array([[None]])), "uint8"),
    "channels first": (image(np.zeros((3, 7, 11), np.uint8)), r"shape \[3, 7, 11\]: put channels last"),
    "a batch": (image(PIXELS[None]), "shape"),
    "a row": (image(PIXELS[0, :, 0]), "shape"),
    "no rows": (image(PIXELS[:0]), "empty, 11 × 0"),
    "no columns": (image(PIXELS[:, :0]), "empty, 0 × 7"),
    "a wide array": (image(np.zeros((1, 20_000), np.uint8)), "20000 × 1"),
    "a list": (image([[1, 2], [3, 4]]), "not list"),
    "a number": (image(7), "not int"),
    "no bytes": (image(b""), "0 bytes"),
    "no base64": (image("data:image/png;base64,"), "0 bytes"),
    "absurd base64": (image("data:image/png;base64,*&^%"), "base64"),
    "cut base64": (image(uri(PNG)[:-3]), "base64"),
    "base64 in another alphabet": (image("data:image/png;base64,äöü="), "base64"),
    "percent encoded": (image("data:image/svg+xml,%3Csvg%3E"), "write it as data:image/…;base64"),
    "no comma": (image("data:image/png;base64"), "no data URI"),
    "http": (image("http://example.com/a.png"), "not fetched; download it first"),
    "https in image_url": ({"type": "image_url", "image_url": {"url": "HTTPS://example.com/a.png"}}, "not fetched"),
    "no file": (image("/nowhere/a.png"), r"^'/nowhere/a.png' cannot be read \(No such file or directory\); give the path"),
    "a folder": (image("/"), "cannot be read.*directory"),
    "zeros without end": (image("/dev/zero"), "device or a pipe"),
    "a terminal": (image("/dev/tty"), "cannot be read|device"),
    "a long name": (image("a" * 100_000), "cannot be read"),
    "a name with a zero": (image("a\0b"), "cannot be read"),
    "a home of nobody": (image("~nobody-at-all/a.png"), "cannot be read"),
    "an empty name": (image(""), "cannot be read"),
    "proc": (image("/proc/self/status"), "cannot be decoded"),
    "nothing": ({"type": "image"}, "has 0 of them"),
    "two": ({"type": "image", "image": PNG, "url": "a.png"}, "has 2 of them"),
    "a nest": ({"type": "image_url", "image_url": {"url": {"url": {"url": "a"}}}}, "not dict"),
    "an empty nest": ({"type": "image_url", "image_url": {}}, "has 0 of them"),
    "unknown type": ({"type": "video", "video": "a.mp4"}, "'video' is no image and no sound"),
    "no type": ({"image": PNG}, "None is no image"),
    "a type that is none": ({"type": ["image"], "image": PNG}, "no image and no sound"),
    "no part": (PNG, "no image and no sound"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_refused_with_a_reason(name: str) -> None:
    part, why = BAD_IMAGES[name]
    with pytest.raises(RequestError, match=f"(?s){why}") as refusal:
        read_part(part)
    assert len(str(refusal.value)) < 600


def test_a_pipe_that_nobody_writes_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="pipe"):
        read_part(image(tmp_path / "pipe"))


def test_a_file_too_large_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RequestError, match="larger than the 67108864 bytes"):
        read_part(image(tmp_path / "large.png"))


@pytest.mark.parametrize("source", ["/etc/hostname", "file:///etc/hostname", Path("/etc/hostname"), "../a.png", "nowhere"])
@pytest.mark.parametrize("make", [image, audio, lambda source: {"type": "image_url", "image_url": {"url": source}}])
def test_files_of_the_machine_can_be_out_of_bounds(make: Callable[[Any], dict[str, Any]], source: Any) -> None:
    with pytest.raises(RequestError, match="no files of this machine"):
        read_part(make(source), files=False)
    assert read_part(image(uri(PNG)), files=False).data.shape == (7, 11, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_no_damage_to_an_image_is_any_other_error(kind: str) -> None:
    whole = saved(Image.fromarray(PIXELS), kind)
    draw = np.random.default_rng(5)
    for _ in range(150):
        data = bytearray(whole)
        for at in draw.integers(0, len(data), 3):
            data[at] = draw.integers(256)
        try:
            assert read_part(image(bytes(data[: draw.integers(1, len(data) + 1)]))).data.ndim == 3
        except RequestError:
            pass


NUMBERS = np.concatenate([[0, 1, -1, 2**31 - 1, -(2**31)], GENERATOR.integers(-(2**31), 2**31, 300)])


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_a_wav_has_the_samples_that_soundfile_finds(width: int, channels: int) -> None:
    numbers = (NUMBERS >> (32 - 8 * width)) + (128 if width == 1 else 0)
    data = wav(numbers[:300].reshape(-1, channels), width=width)
    theirs, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    found = read_part(audio(data))
    assert found.kind == "audio" and found.data.dtype == np.float32
    np.testing.assert_allclose(found.data, theirs.mean(axis=1), rtol=0, atol=1e-7)


SOUNDS: dict[str, tuple[Callable[[Path], dict[str, Any]], float]] = {
    "path": (lambda folder: audio(folder / "a.wav"), 1e-4),
    "under path": (lambda folder: {"type": "audio", "path": str(folder / "a.wav")}, 1e-4),
    "under url": (lambda folder: {"type": "audio", "url": (folder / "a.wav").as_uri()}, 1e-4),
    "bytes": (lambda folder: audio(WAV), 1e-4),
    "data uri": (lambda folder: audio(uri(WAV, "audio/wav")), 1e-4),
    "input_audio": (lambda folder: {"type": "input_audio", "input_audio": {"data": base64.b64encode(WAV).decode(), "format": "wav"}}, 1e-4),
    "input_audio as uri": (lambda folder: {"type": "input_audio", "input_audio": {"data": uri(WAV, "audio/wav"), "format": "wav"}}, 1e-4),
    "float32": (lambda folder: audio(SAMPLES, sampling_rate=16_000), 0),
    "float64": (lambda folder: audio(SAMPLES.astype(float), sampling_rate=np.int64(16_000)), 0),
    "big-endian": (lambda folder: audio(SAMPLES.astype(">f4"), sampling_rate=16_000), 0),
    "int16": (lambda folder: audio((SAMPLES * 2**15).astype(np.int16), sampling_rate=16_000), 1e-4),
    "int32": (lambda folder: audio((SAMPLES * 2.0**31).astype(np.int32), sampling_rate=16_000), 1e-6),
    "stereo": (lambda folder: audio(np.stack([SAMPLES * 2, SAMPLES * 0], 1), sampling_rate=16_000), 1e-7),
    "float wav": (lambda folder: audio(sounded(SAMPLES, 16_000, "WAV", subtype="FLOAT")), 0),
    "extensible wav": (lambda folder: audio(sounded(SAMPLES, 16_000, "WAVEX", subtype="PCM_16")), 1e-4),
    "flac": (lambda folder: audio(sounded(SAMPLES, 16_000, "FLAC")), 1e-4),
    "aiff": (lambda folder: audio(sounded(SAMPLES, 16_000, "AIFF")), 1e-4),
    "wav without a length": (lambda folder: audio(WAV[:4] + b"\xff" * 4 + WAV[8:40] + b"\xff" * 4 + WAV[44:]), 1e-4),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_a_sound_is_the_same_however_it_is_given(files: Path, name: str) -> None:
    make, tolerance = SOUNDS[name]
    found = read_part(make(files))
    assert found.data.dtype == np.float32 and found.data.flags.c_contiguous
    np.testing.assert_allclose(found.data, SAMPLES, rtol=0, atol=tolerance)
    assert repr(found).startswith("<Media audio 1.00 s ")


@pytest.mark.parametrize("kind, error", [("OGG", 0.05), ("MP3", 0.05)])
def test_lossy_formats_are_read(kind: str, error: float) -> None:
    found = read_part(audio(sounded(SAMPLES, 16_000, kind))).data
    assert abs(len(found) - len(SAMPLES)) < 3000
    assert abs(float(np.abs(found[4000:12_000]).max()) - 0.5) < error


@pytest.mark.parametrize("rate", [1_000, 8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 384_000])
def test_other_rates_are_resampled_as_soxr_does_at_once(rate: int) -> None:
    samples = np.random.default_rng(rate).normal(0, 0.1, int(rate * 3.3)).astype(np.float32)
    theirs = soxr.resample(samples, rate, 16_000, quality="HQ")
    for part in (audio(samples, sampling_rate=rate), audio(sounded(samples, rate, "WAV", subtype="FLOAT"))):
        found = read_part(part).data
        assert len(found) == len(theirs)
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-5)


def test_forty_minutes_are_read_in_the_memory_of_what_comes_of_them(files: Path) -> None:
    path, quiet = files / "long.flac", np.zeros((8_000 * 60, 2), np.int16)
    with soundfile.SoundFile(path, "w", 8_000, 2, "PCM_16") as file:
        for _ in range(40):
            file.write(quiet)
    tracemalloc.start()
    try:
        assert len(read_part(audio(path)).data) == 40 * 60 * 16_000
        assert tracemalloc.get_traced_memory()[1] < 2.3 * 40 * 60 * 16_000 * 4
    finally:
        tracemalloc.stop()


def header(**fields: int) -> bytes:
    """A wav whose header says something else."""
    layout = {"format": ("<H", 20), "channels": ("<H", 22), "rate": ("<I", 24), "bits": ("<H", 34)}
    data = bytearray(WAV)
    for name, value in fields.items():
        struct.pack_into(layout[name][0], data, layout[name][1], value)
    return bytes(data)


BAD_SOUNDS: dict[str, tuple[Any, str]] = {
    "no sound": (audio(b"RIFF but not really" * 40), "cannot be decoded.*send a whole wav"),
    "an image": (audio(PNG), "cannot be decoded"),
    "half a header": (audio(WAV[:30]), "cannot be decoded|empty"),
    "no samples": (audio(wav(np.zeros(0, int))), "empty, 0 samples"),
    "rate 0 in a file": (audio(header(rate=0)), "sampling_rate is 0|cannot be decoded"),
    "an absurd rate in a file": (audio(header(rate=2**31)), "sampling_rate is 2147483648|cannot be decoded"),
    "no channels": (audio(header(channels=0)), "channels|cannot be decoded"),
    "a thousand channels": (audio(header(channels=1000)), "1000 channels"),
    "bits that are none": (audio(header(bits=64)), "cannot be decoded|bits"),
    "rate missing": (audio(SAMPLES), "sampling_rate is None"),
    "rate 0": (audio(SAMPLES, sampling_rate=0), "sampling_rate is 0"),
    "rate below 0": (audio(SAMPLES, sampling_rate=-16_000), "sampling_rate is -16000"),
    "rate absurd": (audio(SAMPLES, sampling_rate=10**30), "sampling_rate is 1000"),
    "rate a fraction": (audio(SAMPLES, sampling_rate=16_000.5), "sampling_rate"),
    "rate NaN": (audio(SAMPLES, sampling_rate=float("nan")), "sampling_rate"),
    "rate a word": (audio(SAMPLES, sampling_rate="16 kHz"), "sampling_rate is '16 kHz'"),
    "rate true": (audio(SAMPLES, sampling_rate=True), "sampling_rate"),
    "empty": (audio(SAMPLES[:0], sampling_rate=16_000), "empty"),
    "next to nothing": (audio(SAMPLES[:1], sampling_rate=384_000), "empty, 1 samples at 384000"),
    "NaN": (audio(np.append(SAMPLES, np.nan), sampling_rate=16_000), "no numbers"),
    "infinite": (audio(np.append(SAMPLES, -np.inf), sampling_rate=8_000), "no numbers"),
    "too loud": (audio(SAMPLES * 1e30, sampling_rate=16_000), "beyond 32768"),
    "NaN in a file": (audio(sounded(np.append(SAMPLES, np.float32("nan")), 16_000, "WAV", subtype="FLOAT")), "no numbers"),
    "channels first": (audio(np.zeros((2, 16_000), np.float32), sampling_rate=16_000), r"shape \[2, 16000\]: put channels last"),
    "no channel": (audio(np.zeros((16_000, 0), np.float32), sampling_rate=16_000), "shape"),
    "a scalar": (audio(np.array(0.5), sampling_rate=16_000), "shape"),
    "a cube": (audio(np.zeros((2, 2, 2)), sampling_rate=16_000), "shape"),
    "uint8": (audio(np.zeros(9, np.uint8), sampling_rate=16_000), "this one is uint8"),
    "float16": (audio(np.zeros(9, np.float16), sampling_rate=16_000), "this one is float16"),
    "complex": (audio(np.zeros(9, complex), sampling_rate=16_000), "this one is complex128"),
    "too long": (audio(np.broadcast_to(np.float32(0), (1_000 * 2401,)), sampling_rate=1_000), "longer than 40 minutes"),
    "a list": (audio([0.0, 0.1], sampling_rate=16_000), "not list"),
    "a tuple as transformers takes it": (audio((SAMPLES, 16_000)), "not tuple"),
    "http": (audio("https://example.com/a.wav"), "not fetched"),
    "no data": ({"type": "input_audio", "input_audio": {"format": "wav"}}, "has 0 of them"),
    "absurd base64": ({"type": "input_audio", "input_audio": {"data": "§§§", "format": "wav"}}, "base64"),
    "a path as data": ({"type": "input_audio", "input_audio": {"data": "/etc/passwd", "format": "wav"}}, "base64"),
    "zeros without end": (audio("/dev/zero"), "device or a pipe"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", BAD_SOUNDS)
def test_a_bad_sound_is_refused_with_a_reason(name: str) -> None:
    part, why = BAD_SOUNDS[name]
    with pytest.raises(RequestError, match=f"(?s){why}") as refusal:
        read_part(part)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "AIFF", "AU"])
def test_no_damage_to_a_sound_is_any_other_error(kind: str) -> None:
    whole = sounded(SAMPLES[:3000], 16_000, kind)
    draw = np.random.default_rng(6)
    for _ in range(100):
        data = bytearray(whole)
        for at in draw.integers(0, min(len(data), 300), 3):
            data[at] = draw.integers(256)
        try:
            assert read_part(audio(bytes(data[: draw.integers(1, len(data) + 1)]))).data.ndim == 1
        except RequestError:
            pass


MISSING = {
    "PIL": (image(PNG), r"pip install 'aollm\[images\]'"),
    "soundfile": (audio(sounded(SAMPLES, 16_000, "FLAC")), r"pip install 'aollm\[audio\]'"),
    "soxr": (audio(SAMPLES, sampling_rate=8_000), r"pip install 'aollm\[audio\]'"),
}


@pytest.mark.parametrize("package", MISSING)
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    part, why = MISSING[package]
    with pytest.raises(RequestError, match=why):
        read_part(part)
    assert read_part(image(PIXELS)).data.shape == PIXELS.shape and len(read_part(audio(WAV)).data) == len(SAMPLES)
