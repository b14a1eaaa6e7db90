#!/bin/sh
# Training of a random Llama on this machine's GPU beside TRL's, in at most ten minutes. Without a GPU a tiny model is trained,
# which shows that the script works and nothing else. PYTHON names the interpreter; everything it needs has to be installed.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    timeout 180 "$PYTHON" tests/device/training.py --size 1b --methods lora,full,dpo --rows 32 --batch 8 --micro 4 || true
    timeout 90 "$PYTHON" tests/device/training.py --size 1b --methods lora --mixed --rows 64 --batch 16 --micro 8 || true
    timeout 320 "$PYTHON" tests/device/training.py --size 8b --methods lora,qlora,dpo --rows 16 --batch 4 --micro 2 || true
else
    "$PYTHON" tests/device/training.py --size tiny --rows 8 --batch 4 --tokens 200
fi
