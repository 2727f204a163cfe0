"""What users would write without `pipe`: a plain PyTorch loop over `transformers`, and TRL's `GRPOTrainer`.

usage: peers.py (sft | grpo) TOKENS CHECKPOINT STEPS THREADS

TOKENS and CHECKPOINT are the folders that `pipe show` names; `learning.py` calls this. It prints one JSON line: medians over
the steps but the first two, wall seconds and processor seconds, and the peak memory of the process.
"""

import glob
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time

import torch

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def median(values):
    return statistics.median(values[2:] if len(values) > 3 else values[1:] or values)


def report(**values):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**values, "peak_memory_bytes": peak}))


def rows(folder, split):
    """The rows of a split: token ids, mask, prompt text."""
    import pandas
    from safetensors.numpy import load_file

    file = load_file(glob.glob(f"{folder}/*.safetensors")[0])
    table = pandas.read_parquet(f"{folder}/rows.parquet")
    for row, prompt in zip(table.row[table.split == split], table.prompt[table.split == split]):
        begin, end = file["offsets"][row], file["offsets"][row + 1]
        yield file["ids"][begin:end].tolist(), file["mask"][begin:end].tolist(), prompt


def sft(folder, checkpoint, steps):
    """AdamW (fused), SDPA, batches of 64 random rows padded to the longest, fp32."""
    from transformers import Qwen2ForCausalLM

    data = [(torch.tensor(ids), torch.tensor(mask)) for ids, mask, _ in rows(folder, "train")]
    model = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    order = random.Random(0).sample(range(len(data)), len(data))
    pad = torch.nn.utils.rnn.pad_sequence
    wall, processor, losses = [], [], []
    for step in range(steps):
        began, used = time.perf_counter(), time.process_time()
        batch = [data[row] for row in order[step * 64 : (step + 1) * 64]]
        ids = pad([ids for ids, _ in batch], batch_first=True)
        mask = pad([torch.ones_like(ids) for ids, _ in batch], batch_first=True)
        labels = pad([torch.where(mask > 0, ids, -100) for ids, mask in batch], batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        real = int(mask.sum())
        wall.append((time.perf_counter() - began) / real)
        processor.append((time.process_time() - used) / real)
    report(
        tokens_per_second=1 / median(wall),
        tokens_per_processor_second=1 / median(processor),
        last_loss=losses[-1],
    )


def grpo(folder, checkpoint, steps, threads):
    """A step of 64 prompts with 8 samples each of at most 32 tokens, temperature 1, no KL, the loss `dapo`, fp32."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    chosen = list(rows(folder, "rl"))[: 64 * steps]
    ids, mask, prompt = chosen[0]
    assert tokenizer(prompt)["input_ids"] == ids[: mask.index(1)], "the prompts that `pipe` reads"
    lengths, spent = [], {"generation": [], "step": [], "processor": []}

    def reward(completion_ids, **_):
        lengths.extend(len(ids) for ids in completion_ids)
        # As costly as nothing, and never equal within a group.
        return [float(sum(ids) % 7) for ids in completion_ids]

    class Timed(GRPOTrainer):
        def _generate(self, *arguments, **named):
            began = time.perf_counter()
            made = super()._generate(*arguments, **named)
            spent["generation"].append(time.perf_counter() - began)
            return made

    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began, self.used = time.perf_counter(), time.process_time()

        def on_step_end(self, *_, **__):
            spent["step"].append(time.perf_counter() - self.began)
            spent["processor"].append(time.process_time() - self.used)

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=64,
            gradient_accumulation_steps=8,
            num_generations=8,
            max_completion_length=32,
            temperature=1.0,
            beta=0.0,
            loss_type="dapo",
            learning_rate=1e-4,
            max_steps=steps,
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            shuffle_dataset=False,
        )
        trainer = Timed(
            model=checkpoint,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for _, _, prompt in chosen]),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        torch.set_num_threads(threads)
        stdout, sys.stdout = sys.stdout, sys.stderr
        trainer.train()
        sys.stdout = stdout
    report(
        step_seconds=median(spent["step"]),
        step_processor_seconds=median(spent["processor"]),
        generation_seconds=median(spent["generation"]),
        mean_length=statistics.mean(lengths),
    )


if __name__ == "__main__":
    what, folder, checkpoint, steps, threads = sys.argv[1:]
    torch.manual_seed(0)
    torch.set_num_threads(int(threads))
    if what == "sft":
        sft(folder, checkpoint, int(steps))
    else:
        grpo(folder, checkpoint, int(steps), int(threads))
