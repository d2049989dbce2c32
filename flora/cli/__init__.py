"""The command line: the one room that prints.

    app.py        the verbs, and `main`: every way that a command can end, as an exit code
    options.py    flags that several verbs share, and the words their values are written in
    output.py     data on stdout, for people, for pipes or as JSON; everything else on stderr
    progress.py, logs.py, sizes.py, verdict.py, machine.py, sizing.py, remote.py   what the verbs need besides
    demonstration.py, gates.py, server_process.py   the demo's steps, its bounds, its server
    commands/     one file per verb or family of verbs, imported when one of them is asked for; what it drives is
                  imported only when it runs

`flora --help` imports no torch, nor anything else that is slow.
"""

from flora.cli.app import main

__all__ = ["main"]
