"""A task: add two digits. Requests come as lines of JSON, and each gets one line back.

Equal requests must have equal answers: whatever is drawn is drawn from the seed and the index of the request.
"""

import json
import random
import sys

episodes = {}


def generate(ask):
    """The instances of some indices; `length` sorts them, and `canonical` says what must not stand in two splits."""
    instances = []
    for index in ask["indices"]:
        draw = random.Random(f"{ask['seed']} {index}")
        a, b = draw.randrange(10), draw.randrange(10)
        instances.append({"a": a, "b": b, "canonical": f"{min(a, b)} {max(a, b)}"})
    return {"instances": instances}


def reset(ask):
    """Begins episodes: what the model reads first."""
    for episode in ask["episodes"]:
        episodes[episode["id"]] = {**episode["instance"], "solved": 0.0, "error": 18.0}
    return {"observations": [f"{e['instance']['a']} + {e['instance']['b']} =" for e in ask["episodes"]]}


def step(ask):
    """Takes the model's replies: here one ends the episode."""
    turns = []
    for reply in ask["replies"]:
        episode = episodes[reply["id"]]
        text = reply["text"].strip()
        if text.isdigit() and reply["finish"] == "stop":
            episode["error"] = float(abs(int(text) - episode["a"] - episode["b"]))
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
    return {"replies": [[str(instance["a"] + instance["b"])] for instance in instances]}


CALLS = {"generate": generate, "reset": reset, "step": step, "verdict": verdict, "demonstrate": demonstrate}

for line in sys.stdin:
    ask = json.loads(line)
    print(json.dumps(CALLS[ask["call"]](ask)), flush=True)
