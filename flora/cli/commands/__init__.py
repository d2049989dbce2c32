"""The verbs. A module here imports typer and little else; what a verb drives, it imports when it runs."""
