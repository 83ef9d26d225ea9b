"""LoRA fine-tuning by this project; prints one JSON line. Usage:
  train_ours.py CHECKPOINT DATA STEPS [MICRO_BATCH] [PRECISION] [QUANTIZE] [--FLAG=VALUE ...]
DATA is as prepared for the checkpoint; further flags go to finetune/lora.py.
r=8 alpha=16 dropout=0.05 on query and value, global batch 8, loss on the response only."""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

more = [word for word in sys.argv if word.startswith("--")]
ckpt, data, steps, *chosen = (word for word in sys.argv[1:] if word not in more)
micro_batch, precision, quantize = (*chosen, *("4", "bf16-true", "none")[len(chosen) :])
with tempfile.TemporaryDirectory() as out:
    flags = {"checkpoint_dir": ckpt, "data_dir": data, "out_dir": out, "precision": precision}
    flags |= {"train.global_batch_size": "8", "train.micro_batch_size": micro_batch, "train.max_steps": steps}
    flags |= {"eval.interval": "0", "eval.final_validation": "false", "eval.max_new_tokens": "0"}
    flags |= {"quantize": quantize} if quantize != "none" else {}
    script = Path(__file__).parents[2] / "finetune" / "lora.py"
    command = [sys.executable, str(script)] + [f"--{key}={value}" for key, value in flags.items()] + more
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = json.loads(Path(out, "report.json").read_text())
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
told = {"peer": "ours", "micro_batch": micro_batch, "precision": precision, "quantize": quantize, "steps": steps}
figures = {"tokens": report["tokens"], "tokens_per_s": report["tokens_per_s"], "user_cpu_s": usage.ru_utime}
print(json.dumps({**told, **figures, "peak_rss_mb": usage.ru_maxrss / 1024}))
