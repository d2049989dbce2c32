"""Many processes that register at the same moment: nothing is lost, no number is given twice."""

import json
import subprocess
import sys

from flora.registry import Registry
from tests.conftest import IS_FULL

WRITERS = 200 if IS_FULL else 12

# All forked writers open the registry for themselves and start at once, half of them under one shared name.
SCRIPT = """
import json, os, sys
from tests.registry.adapters import random_adapter
from flora.registry import Registry

folder, writers = sys.argv[1], int(sys.argv[2])
adapters = [random_adapter(seed) for seed in range(writers)]
Registry.open(folder).close()
go_read, go_write = os.pipe()
told_read, told_write = os.pipe()
for seed in range(writers):
    if os.fork() == 0:
        os.close(go_write)
        os.read(go_read, 1)  # until the parent closes its end
        with Registry.open(folder) as registry:
            version = registry.add(adapters[seed], "shared" if seed % 2 else f"own-{seed}")
        os.write(told_write, (json.dumps([version.ref, version.digest]) + "\\n").encode())  # whole: shorter than a page
        os._exit(0)
os.close(told_write)
os.close(go_write)
with os.fdopen(told_read) as told:
    sys.stdout.write(told.read())
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(writers)]
assert codes == [0] * writers, codes
"""


def test_writers_at_one_moment_lose_nothing(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(WRITERS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    with Registry.open(tmp_path) as registry:
        stored = {(v.ref, v.digest) for entry in registry.names() for v in registry.versions(entry.name)}
        numbers = [version.number for version in registry.versions("shared")]
        problems = registry.fsck()

    assert len(told) == WRITERS
    assert stored == set(told)
    assert numbers == list(range(1, WRITERS // 2 + 1))
    assert problems == []
