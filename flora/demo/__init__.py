"""A whole model life on the spot: a language of skills, a small Llama, its training, its checkpoints.

Everything here is real and small: `flora demo` trains a base model, fine-tunes all of its weights three times, and then
uses the rest of Flora on the checkpoints as on anyone's. Only the CLI imports this package.

    language.py      what is learnt: examples, the base's skills, the three tasks, the held-out side
    alphabet.py      characters to token ids, and the tokenizer file that says the same to others
    model.py         a Llama in plain torch, with Hugging Face's tensor names
    training.py      the loop, and the settings of base and fine-tunes
    folders.py       ordinary Hugging Face checkpoint folders
    scoring.py       exact match by greedy decoding
"""

from flora.demo.folders import load_model, save_model
from flora.demo.language import BASE_SKILLS, TASKS, Example, Skill, held_out
from flora.demo.model import LlamaShape, TinyLlama
from flora.demo.scoring import exact_match, is_right
from flora.demo.training import BASE_TRAINING, TASK_TRAINING, Training, TrainingProgress, fine_tune, train_base

__all__ = [
    "BASE_SKILLS",
    "BASE_TRAINING",
    "TASKS",
    "TASK_TRAINING",
    "Example",
    "LlamaShape",
    "Skill",
    "TinyLlama",
    "Training",
    "TrainingProgress",
    "exact_match",
    "fine_tune",
    "held_out",
    "is_right",
    "load_model",
    "save_model",
    "train_base",
]
