"""A task: name the largest of three digits. Requests come as lines of JSON, and each gets one line back.

Equal requests must have equal answers: whatever is drawn is drawn from the seed and the index of the request.
"""

import json
import random
import sys

episodes = {}


def generate(ask):
    """The instances of some indices; what shares its `canonical` never stands in two splits."""
    instances = []
    for index in ask["indices"]:
        draw = random.Random(f"{ask['seed']} {index}")
        digits = [draw.randrange(10) for _ in range(3)]
        instances.append({"digits": digits, "canonical": str(digits)})
    return {"instances": instances}


def reset(ask):
    """Begins episodes: what the model reads first."""
    for episode in ask["episodes"]:
        episodes[episode["id"]] = {**episode["instance"], "solved": 0.0, "error": 9.0}
    shown = [" ".join(map(str, episode["instance"]["digits"])) for episode in ask["episodes"]]
    return {"observations": [f"{digits} =" for digits in shown]}


def step(ask):
    """Takes the model's replies: here one ends the episode."""
    turns = []
    for reply in ask["replies"]:
        episode = episodes[reply["id"]]
        text = reply["text"].strip()
        if text.isdigit() and reply["finish"] == "stop":
            episode["error"] = float(abs(int(text) - max(episode["digits"])))
            episode["solved"] = float(episode["error"] == 0)
        measurements = {"solved": episode["solved"], "error": episode["error"]}
        turns.append({"observation": "", "terminated": True, "truncated": False, "measurements": measurements})
    return {"turns": turns}


def verdict(ask):
    """The measurements of whole episodes, which are forgotten then."""
    ended = [episodes.pop(id) for id in ask["ids"]]
    return {"verdicts": [{"solved": episode["solved"], "error": episode["error"]} for episode in ended]}


def demonstrate(ask):
    """Replies that solve an instance, for supervised training."""
    instances = [one["instance"] for one in ask["demonstrations"]]
    return {"replies": [[str(max(instance["digits"]))] for instance in instances]}


CALLS = {"generate": generate, "reset": reset, "step": step, "verdict": verdict, "demonstrate": demonstrate}

for line in sys.stdin:
    ask = json.loads(line)
    print(json.dumps(CALLS[ask["call"]](ask)), flush=True)
