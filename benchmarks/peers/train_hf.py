"""LoRA fine-tuning by transformers + peft + trl; prints one JSON line. Usage:
  PEERS/hf/bin/python train_hf.py PEERS/SmolLM2-135M-Instruct DATA.json STEPS [bf16|fp32] [MAX_LEN] [4bit]
r=8 alpha=16 dropout=0.05 on q_proj and v_proj, micro-batch 4, global batch 8, loss on the response only."""

import json
import resource
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

ckpt, data, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
dtype = torch.float32 if len(sys.argv) > 4 and sys.argv[4] == "fp32" else torch.bfloat16
max_len = int(sys.argv[5]) if len(sys.argv) > 5 else 512
quant = (
    BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if sys.argv[6:] == ["4bit"]
    else None
)
WITH = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
rows = [
    {"prompt": (WITH if r["input"] else WITHOUT).format(**r), "completion": r["output"]}
    for r in json.loads(Path(data).read_text())
]
tokenizer = AutoTokenizer.from_pretrained(ckpt)
model = AutoModelForCausalLM.from_pretrained(ckpt, dtype=dtype, quantization_config=quant)
with tempfile.TemporaryDirectory() as out:
    args = SFTConfig(
        output_dir=out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=steps,
        learning_rate=3e-4,
        logging_steps=1,
        max_length=max_len,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        completion_only_loss=True,
        warmup_steps=2,
    )
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )
    result = trainer.train()
logs = [x for x in trainer.state.log_history if "loss" in x]
seconds, tokens = result.metrics["train_runtime"], logs[-1]["num_tokens"]
print(
    json.dumps(
        {
            "peer": "peft+trl",
            "precision": str(dtype),
            "quantize": bool(quant),
            "steps": steps,
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "examples_per_s": 8 * steps / seconds,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "first_loss": logs[0]["loss"],
            "last_loss": logs[-1]["loss"],
        }
    )
)
