"""Greedy decoding by this project in bfloat16; prints one JSON line. Usage:
decode_ours.py CHECKPOINT [NEW_TOKENS] [QUANTIZE]"""

import json
import sys
import time
from pathlib import Path

from lit_gpt.generation import generate
from lit_gpt.inference import Assistant

n, quantize = int(sys.argv[2]) if len(sys.argv) > 2 else 100, sys.argv[3] if len(sys.argv) > 3 else None
assistant = Assistant(Path(sys.argv[1]), "bf16-true", quantize=quantize)
ids = assistant.tokenizer.encode("Recommend a movie to watch on the weekend.")
times = []
for _ in range(3):
    started = time.perf_counter()
    assert len(list(generate(assistant.model, ids, n))) == n
    times.append(time.perf_counter() - started)
print(json.dumps({"peer": "ours", "quantize": quantize, "tokens_per_s": n / sorted(times)[1]}))
