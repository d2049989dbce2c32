"""On-disk formats: safetensors files, PEFT folders, model cards."""
