"""What the KV cache on disk survives: its process's end at every operation, errors, full disks, damage and a power cut.

    python -m survival --seconds 60       in the folder tests: all programmes, and the counts as JSON

Each programme is a loop of trials; a trial runs a load, breaks something, opens the store again and compares every byte.
"""
