"""What a front end does apart from HTTP, without torch.

models.py      a request's model name to base or adapter version
tokenizer.py, guard.py, prompts.py   text to ids; what a user types never becomes a control token
template.py, sandbox.py              chat templates, in processes of their own
client.py, engine_process.py, refusals.py   the engine: its socket, its process, its errors
run.py, answer.py, detokenize.py, stop.py   token events to text, choice by choice
"""
