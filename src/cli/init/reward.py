"""A reward: short answers earn more. Batches of samples come as lines of JSON, and each gets one line back."""

import json
import sys


def reward(sample):
    """A finite number, None to abstain, or {"error": "why"}."""
    if sample["finish"] != "stop":
        return 0.0
    return 1.0 / max(1, len(sample["completion"]))


for line in sys.stdin:
    samples = json.loads(line)["samples"]
    print(json.dumps({"rewards": [reward(sample) for sample in samples]}), flush=True)
