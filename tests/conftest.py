"""The order of the test files: the longest are begun first, so that both processes of `make test` end at about the same
time."""

LONGEST = ["test_runs", "test_notebooks", "test_machine", "test_slurm", "test_processes", "test_device", "test_inputs",
           "test_browser", "test_grid", "test_compile"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
