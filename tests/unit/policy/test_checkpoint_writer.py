"""Writer processes report at the same time, and no report is lost."""

import multiprocessing
import queue

import pytest

from megatron_rl.policy.checkpoint_writer import _Reports

WRITERS, FILES = 4, 100


def test_files_that_processes_report_at_the_same_time_all_arrive():
    reports, context = _Reports(), multiprocessing.get_context("fork")
    start = context.Event()

    def report(writer: int) -> None:
        start.wait()
        for number in range(FILES):
            reports.add_file(f"__{writer}_{number}.distcp", number, "0" * 32)

    processes = [context.Process(target=report, args=(writer,)) for writer in range(WRITERS)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    files, failure = reports.files()
    assert len(files) == WRITERS * FILES and failure is None
    assert files["__3_99.distcp"] == (99, "0" * 32)
    reports.close()


def test_results_larger_than_a_pipe_arrive_and_missing_ones_are_told():
    reports, results = _Reports(), {0: ["x" * 1_000_000]}
    with pytest.raises(queue.Empty):
        reports.get_nowait()
    process = multiprocessing.get_context("fork").Process(target=reports.put, args=(results,))
    process.start()
    process.join()
    assert reports.get_nowait() == results and reports.files() == ({}, None)
    reports.close()
