"""Log-probabilities by `pipe score` and by `transformers` agree, for folders that either has written.

usage: parity.py

Makes folders of random weights with `transformers`, of every family and setting that changes a forward pass, and scores
random rows with both programs. Some of them `pipe` then trains for some steps, with tokens added or with adapters, and the
folders that it writes are scored in the same way. Exits with 1 where a log-probability differs by more than TOLERANCE.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

# name: configuration, its own settings, type of the stored weights, size of a shard
FOLDERS = {
    "qwen2 tied": (Qwen2Config, {"tie_word_embeddings": True}, torch.float32, "1GB"),
    "qwen2 untied, shards": (Qwen2Config, {}, torch.float32, "100KB"),
    "qwen2 yarn, bf16, shards": (Qwen2Config, {"rope_parameters": YARN}, torch.bfloat16, "100KB"),
    "qwen3 wide heads": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}, torch.float32, "1GB"),
    "qwen3 biases, f16": (Qwen3Config, {"head_dim": 16, "attention_bias": True}, torch.float16, "1GB"),
    "llama llama3": (LlamaConfig, {"rope_parameters": LLAMA3}, torch.float32, "1GB"),
    "llama linear, biases": (
        LlamaConfig,
        {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        torch.float32,
        "1GB",
    ),
    "llama wide heads, bf16": (LlamaConfig, {"head_dim": 24, "tie_word_embeddings": True}, torch.bfloat16, "1GB"),
}

# Stages that train a folder in NAME: with six new tokens, or with adapters.
GRAPH = """
[stages.words]
kind = "tokenizer"
from = "NAME"
ADDED
[stages.data]
kind = "dataset"
files = { train = "train.jsonl" }
[stages.tokens]
kind = "tokenize"
dataset = "data"
tokenizer = "words"
[stages.base]
kind = "model"
from = "NAME"
tokenizer = "words"
ROWS
[stages.sft]
kind = "sft"
model = "base"
data = "tokens"
steps = 5
batch_size = 8
learning_rate = 5e-3
LORA
run = { device = "cpu" }
"""
ADDED = [f"<new{index}>" for index in range(6)]
TRAINED = {
    "qwen2 untied, shards": "tokens",
    "qwen2 tied": "tokens",
    "qwen3 wide heads": "lora",
    "llama wide heads, bf16": "tokens",
    "llama linear, biases": "lora",
}


def make(folder: Path, config: type, own: dict, dtype: torch.dtype, shard: str) -> None:
    """A folder of random weights, large enough for every part to matter."""
    torch.manual_seed(len(str(own)))
    model = AutoModelForCausalLM.from_config(config(**{**SIZES, **own}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = byte_pairs() if config is LlamaConfig else words()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def words() -> Tokenizer:
    """A token a word. Three rows of the embedding have none: new tokens take them, and then grow it."""
    known = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>"])}
    known |= {f"w{index}": index for index in range(3, VOCABULARY - 3)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def byte_pairs() -> Tokenizer:
    """Merged bytes, as many tokens, cut up as Llama 3 and Qwen do it; a text begins with `<s>` by itself."""
    tokenizer = Tokenizer(models.BPE())
    cut = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(cut), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, specials = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 3, initial_alphabet=alphabet, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY - 3
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def check_texts(folder: Path, texts: list[str]) -> None:
    """Texts have the same ids here as in `transformers`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for text, line in zip(texts, score(folder, [{"text": text} for text in texts]), strict=True):
        assert line["ids"] == tokenizer(text)["input_ids"], f"{text!r}: {line['ids']}"


def train(root: Path, folder: Path, how: str) -> Path:
    """The checkpoint of a few steps of training by `pipe`; checks what must have moved and what not."""
    torch.manual_seed(1)
    words = [f"w{index}" for index in range(3, 60)] + (ADDED if how == "tokens" else [])
    text = lambda count: " ".join(words[index] for index in torch.randint(0, len(words), (count,)))
    lines = [json.dumps({"prompt": text(5), "completion": text(9)}) for _ in range(40)]
    (root / "train.jsonl").write_text("\n".join(lines))
    graph = GRAPH.replace("NAME", folder.name)
    added = f"added_tokens = {json.dumps(ADDED)}" if how == "tokens" else ""
    begin = 'new_tokens = { init = "mean", std = 0.02 }' if how == "tokens" else ""
    lora = 'lora = { rank = 4, targets = ["q_proj", "o_proj", "down_proj"] }' if how == "lora" else ""
    graph = graph.replace("ADDED", added).replace("ROWS", begin).replace("LORA", lora)
    file = root / f"trained-{folder.name}.toml"
    file.write_text(graph)
    command = [ROOT / "pipe", "--store", root / "store"]
    done = subprocess.run([*command, "run", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    show = [*command, "show", "--json", f"{file.stem}/sft"]
    written = Path(json.loads(subprocess.run(show, check=True, capture_output=True, text=True).stdout)["path"])
    before = {name: tensor.float() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    after = load_file(written / "model.safetensors")
    moved = {name for name, tensor in after.items() if tensor.shape != before[name].shape or not tensor.equal(before[name])}
    if how == "lora":
        assert {name.split(".")[-2] for name in moved} == {"q_proj", "o_proj", "down_proj"}, moved
    else:
        assert moved == set(after), set(after) - moved
        assert not (written / "new_tokens.json").exists(), "every new token occurred"
        tokenizer = PreTrainedTokenizerFast.from_pretrained(written)
        assert tokenizer.convert_tokens_to_ids(ADDED) == list(range(VOCABULARY - 3, VOCABULARY + 3))
        check_texts(written, ["w3 <new1>w4", "w5</s><new5><new0> w6"])
    return written


def rows() -> list[list[int]]:
    """Rows of many lengths, the longest as long as the positions reach."""
    torch.manual_seed(0)
    return [torch.randint(0, VOCABULARY, (length,)).tolist() for length in (256, 2, 17, 1, 100, 64, 33)]


def ours(folder: Path, rows: list[list[int]]) -> list[list[float | None]]:
    """Log-probabilities by `pipe score`."""
    return [line["logprobs"] for line in score(folder, [{"ids": ids} for ids in rows])]


def score(folder: Path, rows: list[dict]) -> list[dict]:
    """What `pipe score` says of rows."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        command = [ROOT / "pipe", "score", folder, file.name, "--device", "cpu", "--batch-size", "3"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def theirs(folder: Path, rows: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of all tokens but the first by `transformers`, from weights widened to fp32."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    model.eval()
    found = []
    for ids in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return found


def compare(folder: Path, rows: list[list[int]]) -> tuple[float, int]:
    """The largest difference, and how many log-probabilities were compared."""
    worst, tokens = 0.0, 0
    for mine, other in zip(ours(folder, rows), theirs(folder, rows), strict=True):
        assert mine[0] is None
        for one, two in zip(mine[1:], other, strict=True):
            worst, tokens = max(worst, abs(one - two)), tokens + 1
    return worst, tokens


def main() -> None:
    failed = False
    print(f"{'log-probabilities by pipe and by transformers':46} {'tokens':>7} {'max |difference|':>17}")

    def report(name: str, folder: Path) -> bool:
        worst, tokens = compare(folder, rows())
        verdict = "" if worst <= TOLERANCE else f"  more than {TOLERANCE}"
        print(f"{name:46} {tokens:7} {worst:17.1e}{verdict}")
        return bool(verdict)

    with tempfile.TemporaryDirectory() as root:
        for name, (config, own, dtype, shard) in FOLDERS.items():
            folder = Path(root) / name.replace(" ", "-").replace(",", "")
            make(folder, config, own, dtype, shard)
            failed |= report(name, folder)
            if config is LlamaConfig:
                check_texts(folder, ["It's 12345 cats,\n\n  été 日本 </s>!", " a", "<s>", "x  \t\n y"])
            if how := TRAINED.get(name):
                failed |= report(f"{name}, trained here ({how})", train(Path(root), folder, how))
        subprocess.run(["chmod", "-R", "u+w", root], check=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
