"""Host memory for packed adapters: handed out in ranges, filled by another process."""

import os
import subprocess
import sys

from flora.serve.engine.loading.arena import Arena, bytes_of, map_arena, map_pages

PAGE = 4096
FILL = """
import sys
from flora.serve.engine.loading.arena import bytes_of, map_arena, map_pages
fd, num_bytes, start = map(int, sys.argv[1:])
arena = map_arena(fd, num_bytes)
map_pages(arena, start, 5000)
bytes_of(arena)[start : start + 5000] = 7
"""


def test_ranges_start_on_pages_and_come_back_as_one_gap():
    arena = Arena(3 * PAGE - 1, pinned=False)

    starts = [arena.allocate(PAGE - 1), arena.allocate(1), arena.allocate(PAGE)]

    assert starts == [0, PAGE, 2 * PAGE]
    assert arena.allocate(1) is None
    for start, length in ((PAGE, 1), (0, PAGE - 1), (2 * PAGE, PAGE)):
        arena.release(start, length)
    assert arena.num_free == 3 * PAGE
    assert arena.allocate(3 * PAGE) == 0
    arena.close()


def test_what_another_process_writes_to_its_range_is_here_and_nothing_beside_it():
    arena = Arena(8 * PAGE, pinned=False)
    arena.memory.fill_(1)

    words = [str(arena.fd), str(arena.num_bytes), str(2 * PAGE)]
    subprocess.run([sys.executable, "-c", FILL, *words], pass_fds=[arena.fd], check=True)

    assert (arena.memory[2 * PAGE : 2 * PAGE + 5000] == 7).all()
    assert (arena.memory[: 2 * PAGE] == 1).all()
    assert (arena.memory[2 * PAGE + 5000 :] == 1).all()
    arena.close()


def test_mapping_pages_changes_no_byte_and_a_range_that_has_none_yet_gets_zeros():
    arena = Arena(1 << 20, pinned=False)
    arena.memory[:PAGE] = 3
    other = map_arena(arena.fd, arena.num_bytes)

    map_pages(other, 0, arena.num_bytes)

    assert (bytes_of(other)[:PAGE] == 3).all()
    assert not bytes_of(other)[PAGE:].any()
    assert os.fstat(arena.fd).st_size == arena.num_bytes
    arena.close()
