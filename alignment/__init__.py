"""Fine-tune and align Hugging Face models: the library behind the recipes."""

import logging

# On import bitsandbytes warns that a kernel from a hub is not there; it only serves faster 4-bit inference on the CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
