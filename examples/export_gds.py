"""A model's weights as raw aligned files: written, checked, and answered from without the files they came from.

python examples/export_gds.py [model]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import anyio

from aollm import Runtime
from aollm.checkpoint import open_checkpoint
from aollm.disk.auto import open_disk
from aollm.export.opening import open_export
from aollm.export.writer import write_export
from aollm.port import Port
from aollm.reference import find


async def main() -> None:
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__)
    model = await find((sys.argv[1:] or ["demo"])[0])
    with TemporaryDirectory() as folder:
        target = Path(folder) / "exported"
        async with Port() as port:
            disk, reason = open_disk("auto", port, model)
            start = perf_counter()
            written = await write_export(await open_checkpoint(model, disk), target, disk)
            print(f"wrote {len(written.files)} files, {written.nbytes / 1e6:.1f} MB, in {perf_counter() - start:.2f} s ({reason})")
            start = perf_counter()
            checkpoint = await open_export(target, disk, again=True)
            print(f"read and checked {len(checkpoint.tensors)} tensors in {perf_counter() - start:.2f} s")
            await disk.aclose()
        for summed in written.files[:3]:
            print(f"\n{summed.file.path}")
            for place in summed.file.places[:4]:
                print(f"{place.offset:>12,}  {place.entry.name}  {place.entry.dtype} {list(place.entry.shape)}")
        print()
        for place in (model, target):
            async with Runtime.open(place) as runtime:
                print(f"{place.name}: {(await runtime.generate('Once upon a time', max_new_tokens=16)).text!r}")


anyio.run(main)
