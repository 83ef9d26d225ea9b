"""LoRA fine-tuning by litgpt 0.5.13; prints one JSON line. Usage:
PEERS/litgpt/bin/python train_litgpt.py PEERS/lg/checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct DATA.json STEPS \\
    [bf16-true|32-true|bf16-mixed] [MAX_LEN]
r=8 alpha=16 dropout=0.05 on query and value, micro-batch 4, global batch 8; its own iterations' times, summed."""

import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ckpt, data, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
precision = sys.argv[4] if len(sys.argv) > 4 else "bf16-true"
max_len = sys.argv[5] if len(sys.argv) > 5 else "512"
with tempfile.TemporaryDirectory() as out:
    flags = {
        "data": "JSON",
        "data.json_path": data,
        "data.val_split_fraction": "0.05",
        "data.mask_prompt": "true",
        "data.num_workers": "0",
        "precision": precision,
        "out_dir": out,
        "train.global_batch_size": "8",
        "train.micro_batch_size": "4",
        "train.lr_warmup_steps": "1",
        "train.epochs": "100",
        "train.max_steps": str(steps),
        "train.max_seq_length": max_len,
        "train.save_interval": "100000",
        "eval.interval": "100000",
        "eval.max_new_tokens": "1",
        "eval.max_iters": "1",
        "eval.final_validation": "false",
    }
    command = [str(Path(sys.executable).parent / "litgpt"), "finetune_lora", ckpt] + [
        f"--{k}={v}" for k, v in flags.items()
    ]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
seconds = sum(float(x) for x in re.findall(r"iter time: ([\d.]+) ms", text)) / 1e3
tokens = int(re.search(r"Tokens w/ Prompt\s*:\s*(\d+)", text).group(1))
padded = int(re.search(r"Total Tokens \(w/ Padding\)\s*:\s*(\d+)", text).group(1))
losses = [float(x) for x in re.findall(r"loss train: ([\d.]+)", text)]
print(
    json.dumps(
        {
            "peer": "litgpt",
            "precision": precision,
            "steps": steps,
            "seconds": seconds,
            "tokens": tokens,
            "padded_tokens": padded,
            "tokens_per_s": tokens / seconds,
            "examples_per_s": 8 * steps / seconds,
            "user_cpu_s": usage.ru_utime,
            "sys_cpu_s": usage.ru_stime,
            "peak_rss_mb": usage.ru_maxrss / 1024,
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }
    )
)
