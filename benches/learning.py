"""The peer of `learning.rs`: the same training step in plain PyTorch, as one would write it.

usage: .venv/bin/python benches/learning.py [seconds] [threads]
"""

import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 2)
B, T, H, L, HEADS, V, INNER = 128, 73, 128, 4, 4, 128, 352
D = H // HEADS
frequencies = torch.outer(torch.arange(T).float(), 1 / (10000 ** (torch.arange(0, D, 2).float() / D)))
cos, sin = torch.cat([frequencies.cos()] * 2, -1), torch.cat([frequencies.sin()] * 2, -1)


def rope(x):
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(H))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = Norm(), Norm()
        self.q, self.k, self.v = (nn.Linear(H, H) for _ in range(3))
        self.o, self.g, self.u = nn.Linear(H, H, False), nn.Linear(H, INNER, False), nn.Linear(H, INNER, False)
        self.d = nn.Linear(INNER, H, False)

    def forward(self, x):
        h = self.n1(x)
        q, k, v = (f(h).view(B, T, HEADS, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(B, T, H))
        h = self.n2(x)
        return x + self.d(F.silu(self.g(h)) * self.u(h))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer() for _ in range(L))
        self.norm = Norm()

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embedding.weight)


model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
ids = torch.randint(0, V, (B, T))


def step():
    logits = model(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


step()
begin, wall, processor = time.time(), 0.0, 0.0
while time.time() - begin < float(sys.argv[1] if len(sys.argv) > 1 else 10):
    start, used = time.time(), time.process_time()
    for _ in range(2):
        step()
    tokens = 2 * B * T
    wall = max(wall, tokens / (time.time() - start))
    processor = max(processor, tokens / (time.process_time() - used))
print(f"train: {wall:.0f} tokens/s, {processor:.0f} tokens per processor second (PyTorch)")
