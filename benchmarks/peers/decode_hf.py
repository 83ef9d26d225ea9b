"""Greedy decoding by transformers in bfloat16; prints one JSON line. Usage:
PEERS/hf/bin/python decode_hf.py PEERS/SmolLM2-135M-Instruct [NEW_TOKENS]"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ckpt, n = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100
tokenizer = AutoTokenizer.from_pretrained(ckpt)
ids = tokenizer("Recommend a movie to watch on the weekend.", return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained(ckpt, dtype=torch.bfloat16).eval()
times = []
for _ in range(3):
    started = time.perf_counter()
    model.generate(**ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    times.append(time.perf_counter() - started)
print(json.dumps({"peer": "transformers", "tokens_per_s": n / sorted(times)[1]}))
