from flora.cli.times import times

CPU = {"plan": 0.1, "work": 3.0, "hashes": 0.01, "finish": 0.2, "total": 3.31, "write": 0.4} | {
    "read": 0.1, "copy": 0.0, "delta": 1.4, "factorize": 3.0, "fit": 1.0
}  # fmt: skip


def test_on_a_cpu_reading_and_subtracting_are_one():
    assert list(times(CPU, 2)) == [
        "3.7 s: tensors 3.0, making the adapter 0.2, writing 0.4",
        "of 2 workers, summed: reading and subtracting 1.5, computing 4.0",
    ]


def test_on_a_gpu_reading_copying_and_computing_stand_apart():
    assert list(times({**CPU, "copy": 0.7, "hashes": 1.0}, 6)) == [
        "3.7 s: tensors 3.0, waiting for the files' hashes 1.0, making the adapter 0.2, writing 0.4",
        "of 6 workers, summed: reading 0.1, copying 0.7, computing 5.4",
    ]


def test_parts_that_round_to_nothing_are_left_out():
    assert list(times(dict.fromkeys(CPU, 0.001), 1)) == ["0.0 s"]
