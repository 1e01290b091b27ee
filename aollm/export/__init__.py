"""Exports: a model's weights as raw files, aligned as a drive wants them, with a manifest that says what they are.

`gds_export/` in the model's folder, or a folder of its own:
    manifest.json               {format, version, source, files: {path: {nbytes, checksum}},
                                tensors: {name: {dtype, shape, file, offset, nbytes, checksum}}, checksum}
    layer-0007/dense.raw        what layer 7 always needs
    layer-0007/expert-0003.raw  what its expert 3 needs; of a tensor that holds all experts, the row called `name[3]`
    rest.raw                    all else
    verified.json               which files, as the system knows them, were found whole; made on this machine
Tensors from 64 KiB on begin at a multiple of 4096 bytes, smaller ones at one of 64. Checksums are XXH3, 128 bits, in
hexadecimal; the manifest's own is over its JSON without it, sorted by key, without blanks. `source` is the fingerprint
of the safetensors files. Checksums find accidents: who can write the files can write the manifest too.
"""
