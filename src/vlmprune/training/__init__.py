"""Training of the methods that learn: LLaVA-format data, Hugging Face's `Trainer`, PEFT's LoRA."""
