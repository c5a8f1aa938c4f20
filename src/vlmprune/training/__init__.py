"""Training of the methods that learn: LLaVA-format data, Hugging Face's `Trainer`, PEFT's LoRA.

Here belongs what a training run needs and a trained method does not.
May import `study` for accuracies on the way, `io`, and what stands below; `cli` alone imports it.
"""
