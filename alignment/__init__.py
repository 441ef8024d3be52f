"""Fine-tune and align Hugging Face models: the library behind the recipes."""
