"""Greedy decoding by litgpt 0.5.13 in bfloat16; prints one JSON line. Usage:
PEERS/litgpt/bin/python decode_litgpt.py PEERS/lg/checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct [NEW_TOKENS]"""

import json
import re
import subprocess
import sys
from pathlib import Path

n = sys.argv[2] if len(sys.argv) > 2 else "100"
command = [str(Path(sys.executable).parent / "litgpt"), "generate", sys.argv[1], "--prompt=Tell a long story."]
command += [f"--max_new_tokens={n}", "--precision=bf16-true", "--temperature=0.0", "--num_samples=3"]
done = subprocess.run(command, check=True, capture_output=True, text=True)
speeds = sorted(float(speed) for speed in re.findall(r"([\d.]+) tokens/sec", done.stdout + done.stderr))
print(json.dumps({"peer": "litgpt", "tokens_per_s": speeds[len(speeds) // 2]}))
